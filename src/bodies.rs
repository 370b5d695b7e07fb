//! The memory that the bodies of requests may take, all together. It is taken as the bytes come in, so that whoever only
//! announces a body takes none.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long a body that is coming in waits for others to make room.
const PATIENCE: Duration = Duration::from_secs(2);

/// Too many bytes of too many requests are in memory; come again in a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// The memory for bodies. Cloning gives the same memory.
#[derive(Clone, Debug)]
pub struct Bodies(Arc<Semaphore>);

impl Bodies {
    /// Room for this many KiB.
    pub fn new(kib: usize) -> Self {
        Self(Arc::new(Semaphore::new(kib)))
    }
}

/// What one body takes. Dropping it gives it back.
#[derive(Debug, Default)]
pub struct Share(Option<OwnedSemaphorePermit>);

impl Share {
    /// Takes so much more that `bytes` are covered, in whole KiB.
    pub async fn grow_to(&mut self, bytes: usize, bodies: &Bodies) -> Result<(), NoRoom> {
        let held = self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Ok(missing @ 1..) = u32::try_from(bytes.div_ceil(1024).saturating_sub(held)) else { return Ok(()) };
        let more = match bodies.0.clone().try_acquire_many_owned(missing) {
            Ok(more) => more,
            Err(_) => match timeout(PATIENCE, bodies.0.clone().acquire_many_owned(missing)).await {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bodies_share_the_memory_and_give_it_back() {
        let bodies = Bodies::new(4);
        let (mut first, mut second) = (Share::default(), Share::default());
        first.grow_to(1, &bodies).await.unwrap();
        first.grow_to(1024, &bodies).await.unwrap();
        first.grow_to(3 * 1024, &bodies).await.unwrap();
        second.grow_to(1024, &bodies).await.unwrap();
        assert_eq!(second.grow_to(1025, &bodies).await, Err(NoRoom));
        drop(first);
        second.grow_to(4 * 1024, &bodies).await.unwrap();
    }
}
