//! The push queue of a server that is alone: an ordered map.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::push::queue::{Job, JobOutcome, Leased};

/// Jobs in the queue. Past it new ones are left to the sweep.
const BOUND: usize = 1 << 20;

/// Its times are milliseconds since it was made, on a monotonic clock.
pub struct MemoryQueue {
    since: Instant,
    due: HashMap<Job, i64>,
    order: BTreeSet<(i64, Job)>,
}

impl Default for MemoryQueue {
    fn default() -> Self {
        Self { since: Instant::now(), due: HashMap::new(), order: BTreeSet::new() }
    }
}

impl MemoryQueue {
    pub(super) fn schedule(&mut self, jobs: &[(Job, Duration)]) {
        for (job, after) in jobs {
            if !self.due.contains_key(job) && self.due.len() < BOUND {
                self.put(*job, self.in_a(*after));
            }
        }
    }

    pub(super) fn lease(&mut self, limit: usize, visibility: Duration) -> Vec<Leased> {
        let (now, until) = (self.in_a(Duration::ZERO), self.in_a(visibility));
        let due: Vec<Job> = self.order.range(..=(now, LAST)).take(limit).map(|(_, job)| *job).collect();
        let mut leased = Vec::with_capacity(due.len());
        for job in due {
            self.put(job, until);
            leased.push(Leased { job, until });
        }
        leased
    }

    pub(super) fn length(&self) -> u64 {
        self.due.len() as u64
    }

    pub(super) fn finish(&mut self, finished: &[(Leased, JobOutcome)]) {
        for (leased, outcome) in finished {
            if self.due.get(&leased.job) != Some(&leased.until) {
                continue;
            }
            match outcome {
                JobOutcome::Done => self.remove(leased.job),
                JobOutcome::RetryAfter(after) => self.put(leased.job, self.in_a(*after)),
            }
        }
    }

    fn put(&mut self, job: Job, due: i64) {
        self.remove(job);
        self.due.insert(job, due);
        self.order.insert((due, job));
    }

    fn remove(&mut self, job: Job) {
        if let Some(due) = self.due.remove(&job) {
            self.order.remove(&(due, job));
        }
    }

    fn in_a(&self, time: Duration) -> i64 {
        i64::try_from((self.since.elapsed() + time).as_millis()).unwrap_or(i64::MAX)
    }
}

/// No job is behind it.
const LAST: Job = Job { device: crate::model::ids::DeviceNo(i64::MAX), reason: crate::push::queue::Reason::Keys };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::DeviceNo;
    use crate::push::queue::Reason;

    const SECOND: Duration = Duration::from_secs(1);
    const LEASE: Duration = Duration::from_secs(30);

    fn job(device: i64) -> Job {
        Job { device: DeviceNo(device), reason: Reason::NewMessages }
    }

    fn jobs(leased: &[Leased]) -> Vec<Job> {
        leased.iter().map(|leased| leased.job).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_is_there_stays_as_it_is_and_is_due_once() {
        let mut queue = MemoryQueue::default();
        queue.schedule(&[(job(1), 2 * SECOND), (job(1), SECOND), (job(2), SECOND)]);
        tokio::time::advance(SECOND).await;
        assert_eq!(jobs(&queue.lease(10, LEASE)), [job(2)]);
        tokio::time::advance(SECOND).await;
        assert_eq!(jobs(&queue.lease(10, LEASE)), [job(1)]);
        assert_eq!(queue.lease(10, LEASE), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_was_not_finished_runs_out() {
        let mut queue = MemoryQueue::default();
        queue.schedule(&[(job(1), Duration::ZERO), (job(2), Duration::ZERO)]);
        let first = queue.lease(10, LEASE);
        queue.finish(&[(first[0], JobOutcome::Done)]);
        tokio::time::advance(LEASE).await;
        let again = queue.lease(10, LEASE);
        assert_eq!(jobs(&again), [job(2)]);
        // The old lease is no longer ours to end.
        queue.finish(&[(first[1], JobOutcome::Done)]);
        tokio::time::advance(LEASE).await;
        assert_eq!(jobs(&queue.lease(10, LEASE)), [job(2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_may_be_put_off_and_jobs_come_in_the_order_of_their_times() {
        let mut queue = MemoryQueue::default();
        queue.schedule(&[(job(1), 3 * SECOND), (job(2), 2 * SECOND), (job(3), SECOND)]);
        tokio::time::advance(3 * SECOND).await;
        let leased = queue.lease(2, LEASE);
        assert_eq!(jobs(&leased), [job(3), job(2)]);
        queue.finish(&[(leased[0], JobOutcome::RetryAfter(SECOND))]);
        tokio::time::advance(SECOND).await;
        assert_eq!(jobs(&queue.lease(10, LEASE)), [job(1), job(3)]);
    }
}
