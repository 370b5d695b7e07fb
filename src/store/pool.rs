//! Connections to a database. They are borrowed and given back without ceremony: a general pool asks a connection whether
//! it still lives, from a task of its own, each time it comes back, and that costs more than most of our reads.
//!
//! So it is the borrower who tells whether the connection is still good. One of which that is not known is closed, and then
//! the idle ones are asked before they are borrowed again: their server may have gone, or may have been demoted.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::{ConnectOptions, Connection, Database, Sqlite, SqliteConnection};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::store::Result;
use crate::tasks::jittered;
use crate::telemetry::metrics::{Metrics, PoolName};

/// A connection that was idle for longer is checked before it is borrowed.
const CHECK_AFTER_IDLE: Duration = Duration::from_secs(1);
/// The pause before a server that can't be reached is tried again, while a caller waits.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Connections that are made at a time. Each takes a thread, and at times another one to look up a name.
const MADE_AT_ONCE: usize = 32;

/// How many connections there may be, and how long each is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct PoolLimits {
    /// At most so many, borrowed and idle ones together.
    pub(super) max: u32,
    /// So many are kept though none is needed.
    pub(super) min: u32,
    /// Longest wait for one.
    pub(super) acquire_timeout: Duration,
    /// One that was idle for longer is closed; `None` keeps all.
    pub(super) idle_timeout: Option<Duration>,
    /// One that is older is closed; `None` keeps it for ever.
    pub(super) max_lifetime: Option<Duration>,
    /// Whether a connection can go on after its borrower vanished in the middle of something.
    pub(super) reusable_after_cancel: bool,
}

/// A database whose connections can be borrowed.
pub(super) trait Poolable: Database {
    /// The settings of a connection that are not in its options.
    type Settings: Clone + Send + Sync + 'static;

    /// Makes a new connection ready to be borrowed. An error means that it can't be.
    fn prepare(
        connection: &mut Self::Connection,
        settings: &Self::Settings,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Whether a connection that was idle can be borrowed again.
    fn is_usable(connection: &mut Self::Connection) -> impl Future<Output = bool> + Send;
}

impl Poolable for Sqlite {
    type Settings = ();

    async fn prepare(_: &mut SqliteConnection, (): &()) -> sqlx::Result<()> {
        Ok(())
    }

    async fn is_usable(connection: &mut SqliteConnection) -> bool {
        connection.ping().await.is_ok()
    }
}

type Options<DB> = <<DB as Database>::Connection as Connection>::Options;

/// Some connections. Cloning gives the same ones.
pub(super) struct Pool<DB: Poolable> {
    inner: Arc<Inner<DB>>,
}

struct Inner<DB: Poolable> {
    options: Options<DB>,
    settings: DB::Settings,
    limits: PoolLimits,
    /// The one that came back last is at the end, and is borrowed first.
    idle: Mutex<Vec<Idle<DB>>>,
    /// Connections that were idle at this moment are asked before they are borrowed.
    suspect_before: Mutex<Instant>,
    permits: Arc<Semaphore>,
    making: Arc<Semaphore>,
    name: PoolName,
    metrics: Metrics,
}

struct Idle<DB: Poolable> {
    connection: DB::Connection,
    created_at: Instant,
    idle_since: Instant,
}

impl<DB: Poolable> Clone for Pool<DB> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<DB: Poolable> Pool<DB> {
    /// No connection yet.
    pub(super) fn new(
        options: Options<DB>,
        settings: DB::Settings,
        limits: PoolLimits,
        name: PoolName,
        metrics: &Metrics,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(limits.max as usize));
        let suspect_before = Mutex::new(Instant::now());
        let metrics = metrics.clone();
        Self {
            inner: Arc::new(Inner {
                options,
                settings,
                limits,
                idle: Mutex::default(),
                suspect_before,
                permits,
                making: Arc::new(Semaphore::new(MADE_AT_ONCE)),
                name,
                metrics,
            }),
        }
    }

    /// Borrows a connection; makes one if none is idle. A server that can't be reached is tried again for as long as
    /// patience lasts.
    pub(super) async fn get(&self) -> Result<PooledConnection<DB>> {
        let (start, metrics) = (Instant::now(), &self.inner.metrics);
        let acquired = self.acquire(start + self.inner.limits.acquire_timeout).await;
        match &acquired {
            Ok(_) => metrics.pool_time.time(self.inner.name, start.elapsed()),
            Err(_) => metrics.pool_failures.increment(self.inner.name),
        }
        acquired
    }

    async fn acquire(&self, deadline: Instant) -> Result<PooledConnection<DB>> {
        let permit = match self.inner.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.inner.metrics.pool_waits.increment(self.inner.name);
                tokio::time::timeout_at(deadline, self.inner.permits.clone().acquire_owned())
                    .await
                    .map_err(|_| sqlx::Error::PoolTimedOut)?
                    .map_err(|_| sqlx::Error::PoolClosed)?
            }
        };
        let found = tokio::time::timeout_at(deadline, self.inner.take_idle());
        let mut acquired = match found.await.map_err(|_| sqlx::Error::PoolTimedOut)? {
            Some(idle) => PooledConnection::new(&self.inner, idle.connection, idle.created_at, permit),
            None => Inner::connect(&self.inner, permit, deadline).await?,
        };
        acquired.is_reusable = self.inner.limits.reusable_after_cancel;
        Ok(acquired)
    }

    /// Closes what has been idle for too long or is too old, and makes connections until the least number is there.
    pub(super) async fn maintain(&self) -> Result<()> {
        drop(self.inner.take_outdated());
        while self.inner.count() < self.inner.limits.min as usize {
            let permit = self.inner.permits.clone().try_acquire_owned().map_err(|_| sqlx::Error::PoolTimedOut)?;
            drop(Inner::connect(&self.inner, permit, Instant::now() + self.inner.limits.acquire_timeout).await?);
        }
        Ok(())
    }

    /// How many are borrowed, and how many are idle.
    pub(super) fn used_and_idle(&self) -> (usize, usize) {
        (self.inner.in_use(), lock(&self.inner.idle).len())
    }

    /// Waits for those that are borrowed, and closes all.
    pub(super) async fn close(&self) {
        let _all =
            timeout(self.inner.limits.acquire_timeout, self.inner.permits.acquire_many(self.inner.limits.max)).await;
        self.inner.permits.close();
        let idle = std::mem::take(&mut *lock(&self.inner.idle));
        for idle in idle {
            // Nothing is lost by a connection that doesn't close properly.
            let _ = timeout(self.inner.limits.acquire_timeout, idle.connection.close()).await;
        }
    }
}

impl<DB: Poolable> Inner<DB> {
    fn is_outdated(&self, idle: &Idle<DB>, now: Instant) -> bool {
        self.limits.max_lifetime.is_some_and(|limit| now.duration_since(idle.created_at) > limit)
    }

    async fn take_idle(&self) -> Option<Idle<DB>> {
        loop {
            let mut idle = lock(&self.idle).pop()?;
            let now = Instant::now();
            if self.is_outdated(&idle, now) {
                continue;
            }
            let is_trusted =
                now.duration_since(idle.idle_since) < CHECK_AFTER_IDLE && idle.idle_since > *lock(&self.suspect_before);
            if is_trusted || self.limits.reusable_after_cancel || DB::is_usable(&mut idle.connection).await {
                return Some(idle);
            }
        }
    }

    /// A new connection. If its caller is gone when it is made, the others find it.
    ///
    /// It is made on a thread of its own. The proof that one knows the password takes milliseconds, and `sqlx` cuts it into
    /// 820 pieces, between which all other tasks come first: on a busy node it would take as many rounds of them.
    async fn connect(
        pool: &Arc<Self>,
        permit: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<PooledConnection<DB>> {
        let (pool, runtime) = (pool.clone(), Handle::current());
        let turn = tokio::time::timeout_at(deadline, pool.making.clone().acquire_owned());
        let turn = turn.await.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let connecting = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let connection = runtime.block_on(tokio::time::timeout_at(deadline, pool.make(deadline)));
            let connection = connection.map_err(|_| sqlx::Error::PoolTimedOut)??;
            Ok(PooledConnection::new(&pool, connection, Instant::now(), permit))
        });
        // A limit here too: all such threads may be busy. The task is cancelled only when the runtime ends.
        let made = tokio::time::timeout_at(deadline, connecting).await.map_err(|_| sqlx::Error::PoolTimedOut)?;
        made.map_err(|_| sqlx::Error::WorkerCrashed)?
    }

    /// Tries until `deadline`.
    async fn make(&self, deadline: Instant) -> sqlx::Result<DB::Connection> {
        loop {
            let connecting = async {
                let mut connection = self.options.connect().await?;
                DB::prepare(&mut connection, &self.settings).await?;
                sqlx::Result::Ok(connection)
            };
            match connecting.await {
                // Nothing listens there, it is only just starting, or it takes no writes.
                Err(sqlx::Error::Io(_)) if Instant::now() + RETRY_PAUSE < deadline => {}
                Err(sqlx::Error::Database(error))
                    if error.code().is_some_and(|code| code.starts_with("57P"))
                        && Instant::now() + RETRY_PAUSE < deadline => {}
                connected => return connected,
            }
            tokio::time::sleep(jittered(RETRY_PAUSE)).await;
        }
    }

    /// The idle connections that are not to be kept.
    fn take_outdated(&self) -> Vec<Idle<DB>> {
        let now = Instant::now();
        let mut all = lock(&self.idle);
        let spare = all.len().saturating_sub(self.limits.min as usize);
        let (mut kept, mut outdated) = (Vec::with_capacity(all.len()), Vec::new());
        // Those that have been idle for longest come first.
        for (place, idle) in all.drain(..).enumerate() {
            let idle_for = now.duration_since(idle.idle_since);
            let is_spare = place < spare && self.limits.idle_timeout.is_some_and(|limit| idle_for > limit);
            if is_spare || self.is_outdated(&idle, now) { outdated.push(idle) } else { kept.push(idle) }
        }
        *all = kept;
        outdated
    }

    /// Borrowed and idle connections.
    fn count(&self) -> usize {
        self.in_use() + lock(&self.idle).len()
    }

    fn in_use(&self) -> usize {
        (self.limits.max as usize).saturating_sub(self.permits.available_permits())
    }
}

/// A borrowed connection. Dropping it gives it back if it is known to be good, and closes it otherwise.
pub(super) struct PooledConnection<DB: Poolable> {
    connection: Option<DB::Connection>,
    created_at: Instant,
    is_reusable: bool,
    pool: Arc<Inner<DB>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl<DB: Poolable> PooledConnection<DB> {
    /// A good connection.
    fn new(
        pool: &Arc<Inner<DB>>,
        connection: DB::Connection,
        created_at: Instant,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self { connection: Some(connection), created_at, is_reusable: true, pool: pool.clone(), permit: Some(permit) }
    }

    /// Tells whether the connection can serve another borrower.
    pub(super) fn set_reusable(&mut self, is_reusable: bool) {
        self.is_reusable = is_reusable;
    }
}

impl<DB: Poolable> Deref for PooledConnection<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        self.connection.as_ref().expect("it is there until this is dropped")
    }
}

impl<DB: Poolable> DerefMut for PooledConnection<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.connection.as_mut().expect("it is there until this is dropped")
    }
}

impl<DB: Poolable> Drop for PooledConnection<DB> {
    fn drop(&mut self) {
        if !self.is_reusable {
            *lock(&self.pool.suspect_before) = Instant::now();
        } else if let Some(connection) = self.connection.take().filter(|_| !self.pool.permits.is_closed()) {
            lock(&self.pool.idle).push(Idle { connection, created_at: self.created_at, idle_since: Instant::now() });
        }
        // The next holder of the permit finds the connection.
        drop(self.permit.take());
    }
}

/// No code panics while it holds one of these.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
