//! What has not reached the push queue yet. Adding to it never waits, and equal jobs merge. What doesn't fit is found
//! in the inboxes later.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::model::ids::DeviceNo;
use crate::push::queue::Job;

/// Jobs that may wait, and as many sessions that have ended.
const MAX_PENDING: usize = 65_536;

#[derive(Default)]
pub(super) struct PendingPushes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: HashMap<Job, Instant>,
    ended: HashSet<DeviceNo>,
}

impl PendingPushes {
    /// Of two equal jobs the earlier one counts.
    pub(super) fn add(&self, jobs: impl IntoIterator<Item = Job>, due: Instant) {
        let mut state = self.state();
        jobs.into_iter().for_each(|job| state.add(job, due));
    }

    pub(super) fn ended(&self, device: DeviceNo) {
        let mut state = self.state();
        if state.ended.len() < MAX_PENDING {
            state.ended.insert(device);
        }
    }

    /// Everything that waits for the queue.
    pub(super) fn take_jobs(&self) -> Vec<(Job, Instant)> {
        std::mem::take(&mut self.state().jobs).into_iter().collect()
    }

    /// The queue didn't take them.
    pub(super) fn requeue(&self, jobs: Vec<(Job, Instant)>) {
        let mut state = self.state();
        jobs.into_iter().for_each(|(job, due)| state.add(job, due));
    }

    /// At most so many devices whose sessions have ended.
    pub(super) fn take_ended(&self, limit: usize) -> Vec<DeviceNo> {
        let mut state = self.state();
        let some: Vec<_> = state.ended.iter().take(limit).copied().collect();
        some.iter().for_each(|device| {
            state.ended.remove(device);
        });
        some
    }

    /// No code panics while it holds the state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, job: Job, due: Instant) {
        if let Some(waiting) = self.jobs.get_mut(&job) {
            *waiting = due.min(*waiting);
        } else if self.jobs.len() < MAX_PENDING {
            self.jobs.insert(job, due);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::push::queue::Reason;

    fn job(device: usize) -> Job {
        Job { device: DeviceNo(device as i64), reason: Reason::NewMessages }
    }

    #[test]
    fn equal_jobs_merge_and_the_earlier_one_counts() {
        let (pending, now) = (PendingPushes::default(), Instant::now());
        let later = now + Duration::from_secs(1);
        pending.add([job(1)], later);
        pending.add([job(1), job(1)], now);
        let taken = pending.take_jobs();
        assert_eq!(taken, [(job(1), now)]);
        pending.add([job(1)], later);
        pending.requeue(taken);
        assert_eq!(pending.take_jobs(), [(job(1), now)]);
        assert_eq!(pending.take_jobs(), []);
    }

    #[test]
    fn past_its_bound_nothing_more_is_taken() {
        let pending = PendingPushes::default();
        pending.add((0..2 * MAX_PENDING).map(job), Instant::now());
        (0..2 * MAX_PENDING).for_each(|device| pending.ended(DeviceNo(device as i64)));
        assert_eq!(pending.take_jobs().len(), MAX_PENDING);
        assert_eq!(pending.take_ended(usize::MAX).len(), MAX_PENDING);
    }
}
