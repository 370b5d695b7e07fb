//! What happens to a device after an attempt to wake it: it is done, or tried again with growing pauses.

use std::collections::HashMap;
use std::time::Duration;

use tracing::debug;

use crate::push::providers::PushResult;
use crate::push::queue::{Job, JobOutcome};
use crate::tasks::jittered;

/// The longest pause between two attempts for one device.
const LONGEST_RETRY: Duration = Duration::from_hours(1);
/// After this many attempts a device is not tried again until there is newer mail, or a day has passed.
const ATTEMPTS: u32 = 10;
/// Devices whose failed attempts are counted.
const COUNTED: usize = 10_000;

/// Failed attempts in a row, since this node started.
#[derive(Default)]
pub(super) struct Attempts(HashMap<Job, u32>);

impl Attempts {
    /// What happens to a job after an attempt. `first_pause` is the pause after the first failure.
    pub(super) fn outcome(&mut self, job: Job, pushed: &PushResult, first_pause: Duration) -> JobOutcome {
        match pushed {
            PushResult::Accepted | PushResult::TokenGone => {
                self.0.remove(&job);
                JobOutcome::Done
            }
            // It says nothing about the device, so it isn't counted.
            PushResult::Unavailable { .. } => JobOutcome::RetryAfter(jittered(first_pause).max(pushed.asked_to_wait())),
            PushResult::Missing | PushResult::Refused { .. } | PushResult::InvalidTarget => {
                if self.0.len() >= COUNTED {
                    self.0.clear();
                }
                let attempts = self.0.entry(job).or_default();
                *attempts += 1;
                let failed = *attempts;
                if failed >= ATTEMPTS {
                    self.0.remove(&job);
                    debug!("a device could not be woken, and is left alone for now");
                    return JobOutcome::Done;
                }
                let pause = first_pause.saturating_mul(1 << (failed - 1).min(16)).min(LONGEST_RETRY);
                JobOutcome::RetryAfter(jittered(pause).max(pushed.asked_to_wait()))
            }
        }
    }
}
