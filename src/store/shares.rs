//! How many connections of the pool the transactions of one account may have at a time.
//!
//! Such transactions wait for each other's locks, and for those of other sessions. The rest of them wait here, without a
//! connection; otherwise requests about one account whose rows are held could take the whole pool.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::ids::{DeviceNo, UserId};
use crate::store::Result;

/// Connections for the rows of one account: while one transaction waits for a lock, the next one is ready to.
const OF_ACCOUNT: usize = 2;
/// Connections for the rows of one device. An account has several devices.
const OF_DEVICE: usize = 1;

/// Whose share of the pool a transaction counts against. It may lock other rows of the same account as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Rows {
    /// For requests about a whole account: hand-outs, linking, removal, reset, log-in, uploads of attachments.
    OfAccount(UserId),
    /// For requests of one device: its keys, session, ticket, push token, notice.
    OfDevice(DeviceNo),
}

/// What is taken of the pool for each account and device. Cloning gives the same.
#[derive(Clone)]
pub(super) struct Shares {
    taken: Arc<Mutex<HashMap<Rows, Taken>>>,
    /// Longest wait for a share.
    patience: Duration,
}

struct Taken {
    permits: Arc<Semaphore>,
    /// Transactions that have a permit or wait for one. The last one removes the entry, so there are never more entries
    /// than transactions.
    members: usize,
}

/// Leave to use a connection, until it is dropped.
pub(super) struct Share {
    permit: Option<OwnedSemaphorePermit>,
    rows: Rows,
    shares: Shares,
}

impl Shares {
    pub(super) fn new(patience: Duration) -> Self {
        Self { taken: Arc::default(), patience }
    }

    /// Waits until a transaction on these rows may use a connection; an error when that takes too long.
    pub(super) async fn take(&self, rows: Rows) -> Result<Share> {
        let mut share = Share { permit: None, rows, shares: self.clone() };
        let permit = tokio::time::timeout(self.patience, self.join(rows).acquire_owned()).await;
        share.permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?.ok();
        Ok(share)
    }

    fn join(&self, rows: Rows) -> Arc<Semaphore> {
        let most = match rows {
            Rows::OfAccount(_) => OF_ACCOUNT,
            Rows::OfDevice(_) => OF_DEVICE,
        };
        let mut all = self.lock();
        let taken = all.entry(rows).or_insert_with(|| Taken { permits: Arc::new(Semaphore::new(most)), members: 0 });
        taken.members += 1;
        taken.permits.clone()
    }

    /// No code panics while it holds this.
    fn lock(&self) -> MutexGuard<'_, HashMap<Rows, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut all = self.shares.lock();
        let Some(taken) = all.get_mut(&self.rows) else { return };
        taken.members -= 1;
        if taken.members == 0 {
            all.remove(&self.rows);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const BOB: Rows = Rows::OfDevice(DeviceNo(1));
    const CAROL: Rows = Rows::OfDevice(DeviceNo(2));

    #[tokio::test(start_paused = true)]
    async fn a_share_that_is_taken_is_waited_for_and_the_others_are_free() {
        let shares = Shares::new(Duration::from_secs(3));
        let first = shares.take(BOB).await.unwrap();
        shares.take(CAROL).await.unwrap();
        assert!(shares.take(BOB).await.is_err(), "it is refused in the end");
        let waiting = shares.take(BOB);
        tokio::pin!(waiting);
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn an_account_has_two_and_nothing_is_remembered_afterwards() {
        let shares = Shares::new(Duration::from_secs(3));
        let rows = Rows::OfAccount(UserId::random());
        let both = [shares.take(rows).await.unwrap(), shares.take(rows).await.unwrap()];
        assert!(shares.take(rows).now_or_never().is_none(), "this one hangs up while it waits");
        assert_eq!(shares.lock()[&rows].members, 2);
        drop(both);
        assert!(shares.lock().is_empty());
    }
}
