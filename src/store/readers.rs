//! The connections that only read. They are lent and given back without ceremony: a general pool asks a connection
//! whether it still lives, from a task of its own, each time it comes back, and that costs more than most of our reads.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::store::Result;

/// Some connections for reading. Cloning gives the same ones.
#[derive(Clone)]
pub(super) struct Readers {
    idle: Idle,
    count: u32,
    /// One permit for each idle connection.
    permits: Arc<Semaphore>,
    patience: Duration,
}

type Idle = Arc<Mutex<Vec<SqliteConnection>>>;

impl Readers {
    /// Opens `count` connections. Whoever wants one waits for it no longer than `patience`.
    pub(super) async fn open(
        options: &SqliteConnectOptions,
        count: u32,
        patience: Duration,
    ) -> std::result::Result<Self, sqlx::Error> {
        let mut idle = Vec::new();
        for _ in 0..count {
            idle.push(options.connect().await?);
        }
        let permits = Arc::new(Semaphore::new(idle.len()));
        Ok(Self { idle: Arc::new(Mutex::new(idle)), count, permits, patience })
    }

    /// Borrows a connection.
    pub(super) async fn get(&self) -> Result<Reader> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => timeout(self.patience, self.permits.clone().acquire_owned())
                .await
                .map_err(|_| sqlx::Error::PoolTimedOut)?
                .map_err(|_| sqlx::Error::PoolClosed)?,
        };
        let connection = Some(lock(&self.idle).pop().ok_or(sqlx::Error::PoolClosed)?);
        Ok(Reader { connection, idle: self.idle.clone(), _permit: permit })
    }

    /// Waits for those that are lent, and closes all.
    pub(super) async fn close(&self) {
        let _all = timeout(self.patience, self.permits.acquire_many(self.count)).await;
        self.permits.close();
        let idle = std::mem::take(&mut *lock(&self.idle));
        for connection in idle {
            // Nothing is lost by a reader that doesn't close properly.
            let _ = connection.close().await;
        }
    }
}

/// A borrowed connection. Dropping it gives it back, also in the middle of a read: the connection ends that first.
pub(super) struct Reader {
    connection: Option<SqliteConnection>,
    idle: Idle,
    /// Dropped after the connection is back.
    _permit: OwnedSemaphorePermit,
}

impl Deref for Reader {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        self.connection.as_ref().expect("it is there until this is dropped")
    }
}

impl DerefMut for Reader {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        self.connection.as_mut().expect("it is there until this is dropped")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.idle).extend(self.connection.take());
    }
}

/// No code panics while it holds the list.
fn lock(idle: &Idle) -> MutexGuard<'_, Vec<SqliteConnection>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    async fn readers(count: u32) -> Readers {
        let options = SqliteConnectOptions::new().in_memory(true);
        Readers::open(&options, count, Duration::from_millis(50)).await.unwrap()
    }

    #[tokio::test]
    async fn no_more_are_lent_than_there_are_and_each_comes_back() {
        let readers = readers(2).await;
        let (first, second) = (readers.get().await.unwrap(), readers.get().await.unwrap());
        assert!(readers.get().await.is_err());
        drop((first, second));
        assert!(readers.get().await.is_ok());
        readers.close().await;
        assert!(readers.get().await.is_err());
    }

    #[tokio::test]
    async fn a_read_that_was_given_up_does_not_spoil_the_next_one() {
        let readers = readers(1).await;
        for _ in 0..100 {
            let mut reader = readers.get().await.unwrap();
            let long = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 5000) SELECT x FROM n";
            assert!(sqlx::query(long).fetch_all(&mut *reader).now_or_never().is_none(), "it takes longer than that");
            drop(reader);
            let mut reader = readers.get().await.unwrap();
            let one: i64 = sqlx::query_scalar("SELECT 1").fetch_one(&mut *reader).await.unwrap();
            assert_eq!(one, 1);
        }
    }
}
