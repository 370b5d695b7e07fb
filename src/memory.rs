//! Budgets of memory: what the bodies of all requests may take together, the large frames of all sockets, and the parts
//! of uploads to a bucket. A body takes
//! its share as its bytes come in, so whoever only announces one takes none.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long somebody who needs more waits for others to make room.
const PATIENCE: Duration = Duration::from_secs(2);

/// Others hold all of it; come again in a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// Memory that many share. Cloning gives the same memory.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

impl Budget {
    /// Room for this many KiB.
    pub fn new(kib: usize) -> Self {
        Self(Arc::new(Semaphore::new(kib)))
    }

    /// A share of this many bytes, in whole KiB, if it can be had at once.
    pub fn try_take(&self, bytes: usize) -> Option<Share> {
        let kib = u32::try_from(bytes.div_ceil(1024)).ok()?;
        self.0.clone().try_acquire_many_owned(kib).ok().map(|permit| Share(Some(permit)))
    }
}

/// What one of them has taken. Dropping it gives it back.
#[derive(Debug, Default)]
pub struct Share(Option<OwnedSemaphorePermit>);

impl Share {
    /// Takes so much more that `bytes` are covered, in whole KiB.
    pub async fn grow_to(&mut self, bytes: usize, budget: &Budget) -> Result<(), NoRoom> {
        self.grow_within(PATIENCE, bytes, budget).await
    }

    /// The same, waiting for others no longer than this.
    pub async fn grow_within(&mut self, patience: Duration, bytes: usize, budget: &Budget) -> Result<(), NoRoom> {
        let held = self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Ok(missing @ 1..) = u32::try_from(bytes.div_ceil(1024).saturating_sub(held)) else { return Ok(()) };
        let more = match budget.0.clone().try_acquire_many_owned(missing) {
            Ok(more) => more,
            Err(_) => match timeout(patience, budget.0.clone().acquire_many_owned(missing)).await {
                Ok(Ok(more)) => more,
                _ => return Err(NoRoom),
            },
        };
        match &mut self.0 {
            Some(permit) => permit.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }

    /// Gives back what goes beyond `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let Some(permit) = &mut self.0 else { return };
        let excess = permit.num_permits().saturating_sub(bytes.div_ceil(1024));
        drop(permit.split(excess));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_budget_is_shared_and_given_back() {
        let budget = Budget::new(4);
        let (mut first, mut second) = (Share::default(), Share::default());
        first.grow_to(1, &budget).await.unwrap();
        first.grow_to(1024, &budget).await.unwrap();
        first.grow_to(3 * 1024, &budget).await.unwrap();
        second.grow_to(1024, &budget).await.unwrap();
        assert_eq!(second.grow_to(1025, &budget).await, Err(NoRoom));
        drop(first);
        second.grow_to(4 * 1024, &budget).await.unwrap();
        assert!(budget.try_take(1).is_none());
        second.shrink_to(1024);
        assert!(budget.try_take(3 * 1024 + 1).is_none());
        assert!(budget.try_take(3 * 1024).is_some());
    }
}
