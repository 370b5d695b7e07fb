//! Which of the leased devices are woken now, and the start of their pushes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::model::ids::DeviceNo;
use crate::push::provider_client::{Blocked, Slot};
use crate::push::queue::{Job, JobOutcome, Leased, Reason};
use crate::push::waiting_jobs::{ReadyJobs, WaitingJob};
use crate::push::worker::{FinishedPush, RoundError, SHUTDOWN_GRACE, Worker};
use crate::store::{PushCandidate, StoreError};
use crate::tasks::{Tasks, jittered};

/// The longest time that one push may take in all.
const PUSH_TIMEOUT: Duration = Duration::from_secs(15);
/// A second reason to wake a device that is just being woken waits for this time.
const DUPLICATE_DELAY: Duration = Duration::from_secs(2);
/// A device for which there is neither a slot nor a place to wait for one is due again after this many looks, so that others
/// get their turn.
const FULL_RETRY_ROUNDS: u32 = 3;

impl Worker {
    /// Decides for each device whether it is to be woken, and starts that. They were leased at `since` or later.
    pub(super) async fn dispatch(
        &mut self,
        leased: Vec<Leased>,
        since: Instant,
        tasks: &Tasks,
    ) -> Result<(), RoundError> {
        if leased.is_empty() {
            return Ok(());
        }
        let push_candidates = self.push_candidates(leased.iter().map(|leased| leased.job)).await?;
        let (mut finished_leases, mut started_devices) = (Vec::new(), HashSet::new());
        for leased in leased {
            if let Some(outcome) = self.early_outcome(leased.job, &push_candidates, &mut started_devices).await? {
                finished_leases.push((leased, outcome));
                continue;
            }
            let candidate = push_candidates[&leased.job.device].clone();
            let client = self.clients.of(&candidate.target).clone();
            let outcome = match client.try_acquire(&candidate.target) {
                Ok(slot) => {
                    self.start(leased, since, candidate, slot, tasks);
                    continue;
                }
                Err(Blocked::Paused(pause)) => (leased, paused(pause)),
                Err(Blocked::Full) => match self.waiting.add(WaitingJob { leased, since, target: candidate.target }) {
                    Ok(()) => continue,
                    Err(leased) => (leased, self.postpone()),
                },
            };
            finished_leases.push(outcome);
        }
        self.end_leases(finished_leases).await
    }

    /// Starts those that have waited for a slot and have one now. They are looked at again: their mail may have been fetched.
    pub(super) async fn start_waiting(&mut self, tasks: &Tasks) -> Result<(), RoundError> {
        let ReadyJobs { started, late, paused: alone } = self.waiting.take_ready(&self.clients);
        let mut finished_leases: Vec<_> = late.into_iter().map(|leased| (leased, self.postpone())).collect();
        finished_leases.extend(alone.into_iter().map(|(leased, pause)| (leased, paused(pause))));
        let push_candidates = self.push_candidates(started.iter().map(|(waits, _)| waits.leased.job)).await?;
        let mut started_devices = HashSet::new();
        for (WaitingJob { leased, since, target }, slot) in started {
            match self.early_outcome(leased.job, &push_candidates, &mut started_devices).await? {
                Some(outcome) => finished_leases.push((leased, outcome)),
                // Another target needs another slot.
                None if push_candidates[&leased.job.device].target != target => {
                    finished_leases.push((leased, JobOutcome::RetryAfter(Duration::ZERO)));
                }
                None => self.start(leased, since, push_candidates[&leased.job.device].clone(), slot, tasks),
            }
        }
        if finished_leases.is_empty() { Ok(()) } else { self.end_leases(finished_leases).await }
    }

    /// What happens to a job that is not to be pushed now; `None` when it is. `started_devices` are the devices that are being woken.
    async fn early_outcome(
        &self,
        job: Job,
        push_candidates: &HashMap<DeviceNo, PushCandidate>,
        started_devices: &mut HashSet<DeviceNo>,
    ) -> Result<Option<JobOutcome>, StoreError> {
        let Some(candidate) = push_candidates.get(&job.device) else { return Ok(Some(JobOutcome::Done)) };
        let wait = match job.reason {
            Reason::NewMessages => candidate.waiting_since.map(|since| self.wait(since, self.clock.latest())),
            Reason::Keys => self.has_few_keys(candidate).await?.then_some(Duration::ZERO),
        };
        Ok(match wait {
            None => Some(JobOutcome::Done),
            Some(wait) if !wait.is_zero() => Some(JobOutcome::RetryAfter(wait)),
            Some(_) if !started_devices.insert(job.device) => Some(JobOutcome::RetryAfter(DUPLICATE_DELAY)),
            Some(_) => None,
        })
    }

    fn postpone(&self) -> JobOutcome {
        JobOutcome::RetryAfter(jittered(FULL_RETRY_ROUNDS * self.config.notifications.worker_interval))
    }

    /// How long mail that came at `since` may still be fetched before a push. A wrong time doesn't make that longer.
    pub(super) fn wait(&self, since: Timestamp, now: Timestamp) -> Duration {
        let grace = self.config.notifications.push_delay;
        (since + grace).since_epoch().saturating_sub(now.since_epoch()).min(grace)
    }

    async fn has_few_keys(&self, candidate: &PushCandidate) -> Result<bool, StoreError> {
        if !candidate.may_push_prekeys_low {
            return Ok(false);
        }
        let counts = self.store.prekey_counts(candidate.device).await?;
        Ok(counts.is_some_and(|counts| counts.is_below(self.config.prekeys.refill_threshold)))
    }

    fn start(&self, leased: Leased, since: Instant, candidate: PushCandidate, slot: Slot, tasks: &Tasks) {
        let client = self.clients.of(&candidate.target).clone();
        // Over before the lease is, so that no other node begins with the same push.
        let lease = self.config.notifications.visibility_timeout.mul_f64(0.8);
        let timeout = PUSH_TIMEOUT.min(lease.saturating_sub(since.elapsed()));
        let (finished, stopping, metrics) = (self.finished.0.clone(), tasks.clone(), self.metrics.clone());
        let span = self.traces.begin_client("push.send");
        span.set("obscura.push.provider", client.name.text());
        tasks.spawn_tracked(async move {
            let shutdown = async {
                stopping.stopping().await;
                tokio::time::sleep(SHUTDOWN_GRACE).await;
            };
            let start = Instant::now();
            let pushed = tokio::select! {
                pushed = span.run(client.provider.push(&candidate.target, timeout)) => pushed,
                () = shutdown => return,
            };
            metrics.push_time.time(client.name, start.elapsed());
            slot.took(start.elapsed());
            span.set("obscura.push.outcome", pushed.name());
            drop(span);
            // Fails only when the worker has ended.
            let _ = finished.send(FinishedPush { leased, candidate, pushed }).await;
            drop(slot);
        });
    }
}

/// What happens to a job whose provider is paused for this long.
fn paused(pause: Duration) -> JobOutcome {
    JobOutcome::RetryAfter(pause + jittered(Duration::from_secs(1)))
}
