//! The two databases, and how one text runs on either.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::{Query, QueryAs};
use sqlx::{FromRow, Postgres, SqliteConnection};

use crate::model::ids::DeviceNo;
use crate::store::device_auth_cache::AuthChanges;
use crate::store::pool::PooledConnection;
use crate::store::postgres::PostgresStore;
use crate::store::shares::Share;
use crate::store::sqlite::{SqliteStore, Transaction};
use crate::store::{Result, StoreError};
use crate::telemetry::metrics::PoolName;

/// Whichever database is open. Cloning gives the same one.
#[derive(Clone)]
pub(super) enum Database {
    Sqlite(SqliteStore),
    Postgres(PostgresStore),
}

/// A transaction that may write. Dropping it rolls it back.
pub(super) enum Tx {
    Sqlite(SqliteTx),
    Postgres(PostgresTx),
}

/// A transaction on SQLite.
pub(super) struct SqliteTx {
    transaction: Transaction,
    /// What it changes that is remembered outside of the database.
    changes: AuthChanges,
}

/// A transaction on PostgreSQL. Its connection goes back to the pool after the commit; without one it is closed, by
/// which the server rolls the transaction back.
pub(super) struct PostgresTx {
    pub(super) connection: PooledConnection<Postgres>,
    /// The longest time that one statement may take.
    pub(super) limit: Duration,
    /// Given back after the connection.
    pub(super) _share: Option<Share>,
}

impl Tx {
    /// The text for the database that this transaction is on.
    pub(super) fn sql(&self, sqlite: &'static str, postgres: &'static str) -> &'static str {
        match self {
            Self::Sqlite(_) => sqlite,
            Self::Postgres(_) => postgres,
        }
    }

    /// Says that the transaction changes where these devices stand. Before the statement that does so, and before the
    /// commit.
    pub(super) fn register_auth_change(&mut self, devices: &[DeviceNo]) {
        match self {
            Self::Sqlite(transaction) => transaction.changes.register(devices),
            // Nothing is remembered of a database that other nodes write to as well.
            Self::Postgres(_) => {}
        }
    }

    /// Commits, and returns once the changes are on disk.
    pub(super) async fn commit(self) -> Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.commit().await,
            Self::Postgres(transaction) => transaction.end("COMMIT").await,
        }
    }
}

impl SqliteTx {
    pub(super) fn new(transaction: Transaction, changes: AuthChanges) -> Self {
        Self { transaction, changes }
    }

    async fn commit(mut self) -> Result<()> {
        self.changes.committing();
        let committed = self.transaction.commit().await;
        self.changes.ended();
        committed
    }
}

impl Deref for SqliteTx {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.transaction
    }
}

impl DerefMut for SqliteTx {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.transaction
    }
}

impl PostgresTx {
    /// Runs a statement that PostgreSQL alone understands, and answers how many rows it touched.
    pub(super) async fn run(&mut self, statement: Query<'_, Postgres, PgArguments>) -> Result<u64> {
        Ok(timely(self.limit, statement.execute(&mut *self.connection)).await?.rows_affected())
    }

    /// All rows of a question that PostgreSQL alone understands.
    pub(super) async fn all<T>(&mut self, question: QueryAs<'_, Postgres, T, PgArguments>) -> Result<Vec<T>>
    where
        T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        timely(self.limit, question.fetch_all(&mut *self.connection)).await
    }

    /// Ends the transaction in good order, by `COMMIT` or `ROLLBACK`.
    pub(super) async fn end(mut self, statement: &'static str) -> Result<()> {
        timely(self.limit, sqlx::query(statement).execute(&mut *self.connection)).await?;
        self.connection.set_reusable(true);
        Ok(())
    }
}

/// What the connections and the files of a database are at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatabaseStats {
    /// Each pool with how many of its connections are borrowed, and how many are idle.
    pub connections: Vec<(PoolName, usize, usize)>,
    /// SQLite's file and its write-ahead log, in bytes.
    pub files: Option<(u64, u64)>,
}

impl Database {
    /// It asks the file system alone.
    pub(super) fn stats(&self) -> DatabaseStats {
        match self {
            Self::Sqlite(sqlite) => {
                let (used, idle) = sqlite.read.used_and_idle();
                let (writing, waiting) = sqlite.write.used_and_idle();
                let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
                let mut wal = sqlite.file.clone().into_os_string();
                wal.push("-wal");
                let files = Some((size(&sqlite.file), size(Path::new(&wal))));
                DatabaseStats {
                    connections: vec![(PoolName::Reader, used, idle), (PoolName::Writer, writing, waiting)],
                    files,
                }
            }
            Self::Postgres(postgres) => {
                let (used, idle) = postgres.pool.used_and_idle();
                DatabaseStats { connections: vec![(PoolName::Shared, used, idle)], files: None }
            }
        }
    }
}

/// The answer of the database, or an error when it takes longer than `limit`. No caller waits for a server that is frozen
/// or behind a broken network.
pub(super) async fn timely<T>(limit: Duration, answer: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(StoreError(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))),
    }
}

/// Runs a statement in a transaction, on whichever database that is: `on!(tx, |db| query(…).execute(db))?`.
macro_rules! on {
    ($tx:expr, |$db:ident| $statement:expr) => {
        match &mut *$tx {
            $crate::store::database::Tx::Sqlite(tx) => {
                let $db = &mut **tx;
                $statement.await.map_err($crate::store::StoreError::from)
            }
            $crate::store::database::Tx::Postgres(tx) => {
                let limit = tx.limit;
                let $db = &mut *tx.connection;
                $crate::store::database::timely(limit, $statement).await
            }
        }
    };
}

/// Runs a statement that changes something, and answers how many rows it touched: `run!(tx, query(…))?`.
macro_rules! run {
    ($tx:expr, $statement:expr) => {
        match &mut *$tx {
            $crate::store::database::Tx::Sqlite(tx) => {
                let done = $statement.execute(&mut **tx).await;
                done.map(|done| done.rows_affected()).map_err($crate::store::StoreError::from)
            }
            $crate::store::database::Tx::Postgres(tx) => {
                let done = $statement.execute(&mut *tx.connection);
                $crate::store::database::timely(tx.limit, done).await.map(|done| done.rows_affected())
            }
        }
    };
}

/// Runs a statement that only reads, on whichever database is open: `reading!(self, |db| query(…).fetch_all(db))?`.
macro_rules! reading {
    ($store:expr, |$db:ident| $statement:expr) => {
        match &$store.database {
            $crate::store::database::Database::Sqlite(sqlite) => {
                let mut reader = sqlite.read.get().await?;
                let $db = &mut *reader;
                $statement.await.map_err($crate::store::StoreError::from)
            }
            $crate::store::database::Database::Postgres(postgres) => {
                let mut reader = postgres.pool.get().await?;
                let answer = {
                    let $db = &mut *reader;
                    $crate::store::database::timely(postgres.limit, $statement).await
                };
                $crate::store::postgres::give_back(reader, &answer);
                answer
            }
        }
    };
}

pub(super) use {on, reading, run};
