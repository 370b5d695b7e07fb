//! Leased jobs for which no slot of their provider is free yet. Jobs take free slots in the order in which they came. A job
//! that waits too long goes back to the queue, before its lease ends.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::push::PushTarget;
use crate::push::provider_client::{Blocked, ProviderClients, Slot};
use crate::push::queue::Leased;

/// Jobs that wait, for each slot that a provider has.
const WAITING_PER_SLOT: usize = 64;

/// A leased job without a slot.
pub(super) struct WaitingJob {
    pub(super) leased: Leased,
    /// A moment at or before the beginning of its lease.
    pub(super) since: Instant,
    /// What it wants a slot for.
    pub(super) target: PushTarget,
}

/// The jobs that wait no longer, by what happens to them.
#[derive(Default)]
pub(super) struct ReadyJobs {
    pub(super) started: Vec<(WaitingJob, Slot)>,
    /// Those that have waited for too long.
    pub(super) late: Vec<Leased>,
    /// Those whose provider is paused now, and for how long.
    pub(super) paused: Vec<(Leased, Duration)>,
}

/// The jobs that wait, the oldest first.
pub(super) struct WaitingJobs {
    jobs: VecDeque<WaitingJob>,
    capacity: usize,
    max_wait: Duration,
}

impl WaitingJobs {
    /// For providers with this many slots each. A job waits for at most a quarter of its lease.
    pub(super) fn new(slots: usize, lease: Duration) -> Self {
        Self { jobs: VecDeque::new(), capacity: slots.saturating_mul(WAITING_PER_SLOT), max_wait: lease / 4 }
    }

    /// Takes a job in. Gives it back when too many wait.
    pub(super) fn add(&mut self, job: WaitingJob) -> Result<(), Leased> {
        if self.jobs.len() >= self.capacity {
            return Err(job.leased);
        }
        self.jobs.push_back(job);
        Ok(())
    }

    /// Takes out the jobs for which there is a slot, and those that can't wait any longer.
    pub(super) fn take_ready(&mut self, clients: &ProviderClients) -> ReadyJobs {
        let mut ready = ReadyJobs::default();
        for job in std::mem::take(&mut self.jobs) {
            match clients.of(&job.target).try_acquire(&job.target) {
                Ok(slot) => ready.started.push((job, slot)),
                Err(Blocked::Paused(pause)) => ready.paused.push((job.leased, pause)),
                Err(Blocked::Full) if job.since.elapsed() >= self.max_wait => ready.late.push(job.leased),
                Err(Blocked::Full) => self.jobs.push_back(job),
            }
        }
        ready
    }

    /// Takes all of them out.
    pub(super) fn take_all(&mut self) -> Vec<Leased> {
        self.jobs.drain(..).map(|job| job.leased).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::DeviceNo;
    use crate::push::providers::Provider;
    use crate::push::queue::{Job, Reason};

    const LEASE: Duration = Duration::from_secs(20);

    fn waits(device: i64) -> WaitingJob {
        let leased = Leased { job: Job { device: DeviceNo(device), reason: Reason::NewMessages }, until: 0 };
        WaitingJob { leased, since: Instant::now(), target: PushTarget::Fcm(String::new()) }
    }

    fn devices(ready: &ReadyJobs) -> Vec<i64> {
        ready.started.iter().map(|(job, _)| job.leased.job.device.0).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_goes_to_who_came_first_and_who_waits_for_too_long_goes_back() {
        let clients = ProviderClients::new(Provider::Log, Provider::Log, Provider::Log, 2);
        let mut waiting = WaitingJobs::new(2, LEASE);
        (1..=4).for_each(|device| assert!(waiting.add(waits(device)).is_ok()));
        let first = waiting.take_ready(&clients);
        assert_eq!(devices(&first), [1, 2]);
        assert!(waiting.take_ready(&clients).started.is_empty());
        drop(first);
        let next = waiting.take_ready(&clients);
        assert_eq!(devices(&next), [3, 4]);
        assert!(waiting.add(waits(5)).is_ok());
        tokio::time::advance(LEASE / 4).await;
        assert_eq!(waiting.take_ready(&clients).late.len(), 1);
    }

    #[tokio::test]
    async fn no_more_wait_than_there_may_be() {
        let mut waiting = WaitingJobs::new(1, LEASE);
        let taken = (0..2 * WAITING_PER_SLOT as i64).filter(|device| waiting.add(waits(*device)).is_ok()).count();
        assert_eq!((taken, waiting.take_all().len()), (WAITING_PER_SLOT, WAITING_PER_SLOT));
    }
}
