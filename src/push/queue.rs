//! The push queue: which devices are due for a look, and when. It holds nothing that could not be found again in the
//! inboxes, so it may be lost at any time.

mod memory;
mod valkey;

use std::time::Duration;

use crate::config;
use crate::model::ids::DeviceNo;

pub use memory::MemoryQueue;
pub use valkey::ValkeyQueue;

/// Why a device may have to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// There may be mail that was not fetched.
    NewMessages,
    /// Its one-time prekeys run low.
    Keys,
}

/// A device to look at when its time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Job {
    /// Which device.
    pub device: DeviceNo,
    /// What for.
    pub reason: Reason,
}

/// A job that is ours until another node may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leased {
    /// The job.
    pub job: Job,
    /// Names the lease: the moment it ends, on the clock of the queue.
    pub until: i64,
}

/// What becomes of a leased job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// It is done, and leaves the queue.
    Done,
    /// It is looked at again after this time.
    RetryAfter(Duration),
}

/// The queue can't be used at the moment.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// It was tried a moment ago.
    #[error("there is no connection to the push queue at the moment")]
    Disconnected,
    /// Valkey said no, or is not there.
    #[error(transparent)]
    Valkey(#[from] redis::RedisError),
    /// Its answer took too long.
    #[error("the push queue does not answer")]
    Silent,
}

/// The push queue, in memory or shared by all nodes.
pub enum Queue {
    /// Of this process.
    Memory(MemoryQueue),
    /// In Valkey.
    Valkey(ValkeyQueue),
}

impl Queue {
    /// The queue that goes with the bus that the options ask for.
    pub fn open(pubsub: &config::Pubsub, notifications: &config::Notifications) -> Result<Self, crate::bus::BusError> {
        if pubsub.url.expose() == "local:" {
            return Ok(Self::Memory(MemoryQueue::default()));
        }
        Ok(Self::Valkey(ValkeyQueue::open(pubsub, notifications)?))
    }

    /// Makes these jobs due after these times. One that is in the queue already stays as it is.
    pub async fn schedule(&mut self, jobs: &[(Job, Duration)]) -> Result<(), QueueError> {
        match self {
            Self::Memory(memory) => memory.schedule(jobs),
            Self::Valkey(valkey) => valkey.schedule(jobs).await?,
        }
        Ok(())
    }

    /// Takes up to `limit` jobs that are due. No other node gets them for as long as `visibility`, and then they are due
    /// again.
    pub async fn lease(&mut self, limit: usize, visibility: Duration) -> Result<Vec<Leased>, QueueError> {
        match self {
            Self::Memory(memory) => Ok(memory.lease(limit, visibility)),
            Self::Valkey(valkey) => valkey.lease(limit, visibility).await,
        }
    }

    /// How many jobs it has, leased ones included.
    pub async fn length(&mut self) -> Result<u64, QueueError> {
        match self {
            Self::Memory(memory) => Ok(memory.length()),
            Self::Valkey(valkey) => valkey.length().await,
        }
    }

    /// Ends leases. One that has run out already, and may be another node's by now, is left alone.
    pub async fn finish(&mut self, finished: &[(Leased, JobOutcome)]) -> Result<(), QueueError> {
        match self {
            Self::Memory(memory) => memory.finish(finished),
            Self::Valkey(valkey) => valkey.finish(finished).await?,
        }
        Ok(())
    }
}

impl Job {
    /// How the job is written in a shared queue.
    fn name(self) -> String {
        match self.reason {
            Reason::NewMessages => self.device.0.to_string(),
            Reason::Keys => format!("{}:keys", self.device.0),
        }
    }

    /// Reads what [`Job::name`] has written.
    fn named(name: &str) -> Option<Self> {
        let (device, reason) = match name.split_once(':') {
            None => (name, Reason::NewMessages),
            Some((device, "keys")) => (device, Reason::Keys),
            Some(_) => return None,
        };
        Some(Self { device: DeviceNo(device.parse().ok()?), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_as_it_was_written_and_nothing_else_is() {
        for reason in [Reason::NewMessages, Reason::Keys] {
            let job = Job { device: DeviceNo(42), reason };
            assert_eq!(Job::named(&job.name()), Some(job));
        }
        for other in ["", "x", "42:more", ":keys", "67e55044-10b1-426f-9247-bb680e5fe0c8"] {
            assert_eq!(Job::named(other), None);
        }
    }
}
