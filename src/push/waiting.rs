//! Leased jobs for which no slot of their provider is free yet. Jobs take free slots in the order in which they came. A job
//! that waits too long goes back to the queue, before its lease ends.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::push::PushTarget;
use crate::push::lane::{Blocked, Lanes, Slot};
use crate::push::queue::Leased;

/// Jobs that wait, for each slot that a provider has.
const FOR_EACH_SLOT: usize = 64;

/// A leased job without a slot.
pub(super) struct Waits {
    pub(super) leased: Leased,
    /// A moment at or before the beginning of its lease.
    pub(super) since: Instant,
    /// What it wants a slot for.
    pub(super) target: PushTarget,
}

/// The jobs that wait no longer, by what happens to them.
#[derive(Default)]
pub(super) struct Admitted {
    pub(super) started: Vec<(Waits, Slot)>,
    /// Those that have waited for too long.
    pub(super) late: Vec<Leased>,
    /// Those whose provider is paused now, and for how long.
    pub(super) paused: Vec<(Leased, Duration)>,
}

/// The jobs that wait, the oldest first.
pub(super) struct Waiting {
    jobs: VecDeque<Waits>,
    most: usize,
    longest: Duration,
}

impl Waiting {
    /// For providers with this many slots each. A job waits for at most a quarter of its lease.
    pub(super) fn new(slots: usize, lease: Duration) -> Self {
        Self { jobs: VecDeque::new(), most: slots.saturating_mul(FOR_EACH_SLOT), longest: lease / 4 }
    }

    /// Takes a job in. Gives it back when too many wait.
    pub(super) fn add(&mut self, job: Waits) -> Result<(), Leased> {
        if self.jobs.len() >= self.most {
            return Err(job.leased);
        }
        self.jobs.push_back(job);
        Ok(())
    }

    /// Takes out the jobs for which there is a slot, and those that can't wait any longer.
    pub(super) fn admit(&mut self, lanes: &Lanes) -> Admitted {
        let mut admitted = Admitted::default();
        for job in std::mem::take(&mut self.jobs) {
            match lanes.of(&job.target).enter(&job.target) {
                Ok(slot) => admitted.started.push((job, slot)),
                Err(Blocked::Paused(pause)) => admitted.paused.push((job.leased, pause)),
                Err(Blocked::Full) if job.since.elapsed() >= self.longest => admitted.late.push(job.leased),
                Err(Blocked::Full) => self.jobs.push_back(job),
            }
        }
        admitted
    }

    /// Takes all of them out.
    pub(super) fn give_up(&mut self) -> Vec<Leased> {
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

    fn waits(device: i64) -> Waits {
        let leased = Leased { job: Job { device: DeviceNo(device), reason: Reason::Mail }, until: 0 };
        Waits { leased, since: Instant::now(), target: PushTarget::Fcm(String::new()) }
    }

    fn devices(admitted: &Admitted) -> Vec<i64> {
        admitted.started.iter().map(|(job, _)| job.leased.job.device.0).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_goes_to_who_came_first_and_who_waits_for_too_long_goes_back() {
        let lanes = Lanes::new(Provider::Log, Provider::Log, Provider::Log, 2);
        let mut waiting = Waiting::new(2, LEASE);
        (1..=4).for_each(|device| assert!(waiting.add(waits(device)).is_ok()));
        let first = waiting.admit(&lanes);
        assert_eq!(devices(&first), [1, 2]);
        assert!(waiting.admit(&lanes).started.is_empty());
        drop(first);
        let next = waiting.admit(&lanes);
        assert_eq!(devices(&next), [3, 4]);
        assert!(waiting.add(waits(5)).is_ok());
        tokio::time::advance(LEASE / 4).await;
        assert_eq!(waiting.admit(&lanes).late.len(), 1);
    }

    #[tokio::test]
    async fn no_more_wait_than_there_may_be() {
        let mut waiting = Waiting::new(1, LEASE);
        let taken = (0..2 * FOR_EACH_SLOT as i64).filter(|device| waiting.add(waits(*device)).is_ok()).count();
        assert_eq!((taken, waiting.give_up().len()), (FOR_EACH_SLOT, FOR_EACH_SLOT));
    }
}
