//! SQLite: one file, one connection that writes and several that read.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection, Sqlite, SqliteConnection, Transaction};

use crate::config;
use crate::store::pool::{Pool, Terms};
use crate::store::{OpenError, Result, StoreError, migration_error};
use crate::telemetry::metrics::{Metrics, PoolName};

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// How many connections read beside the one that writes.
const READERS: u32 = 4;
/// The write-ahead log is folded back into the database after this many pages (16 MiB).
const CHECKPOINT_PAGES: u32 = 4000;

/// <https://www.sqlite.org/rescode.html>
pub(super) const SQLITE_FULL: i32 = 13;
const SQLITE_IOERR_FSYNC: i32 = 1034;
const SQLITE_IOERR_DIR_FSYNC: i32 = 1290;

/// SQLite lets one connection write at a time, so writers queue for the one connection of `write`; `read` has several
/// that never wait for a writer (write-ahead log).
#[derive(Clone)]
pub(super) struct SqliteStore {
    pub(super) write: SqlitePool,
    pub(super) read: Pool<Sqlite>,
    pub(super) file: PathBuf,
    metrics: Metrics,
}

impl SqliteStore {
    /// Opens the database in the file `path`, makes it if it isn't there, and brings its tables up to date.
    pub(super) async fn open(
        path: &Path,
        config: &config::Database,
        metrics: &Metrics,
    ) -> std::result::Result<Self, OpenError> {
        let shown = path.display().to_string();
        let unusable = |cause| OpenError::Unusable { path: shown.clone(), cause };
        create_private(path).map_err(|error| unusable(sqlx::Error::Io(error)))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(config.acquire_timeout)
            .pragma("temp_store", "memory");
        let writer = options
            .clone()
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
            .pragma("journal_size_limit", (64 << 20).to_string())
            .pragma("cache_size", "-16384");
        // Without the writer's settings, some of which take the write lock when they are made.
        let readers = options.pragma("query_only", "on").pragma("cache_size", "-8192");
        // A connection to a file doesn't wear out, and its caches are worth keeping.
        let write = SqlitePoolOptions::new()
            .min_connections(1)
            .max_connections(1)
            .acquire_timeout(config.acquire_timeout)
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .after_release(|connection, _| Box::pin(is_sound(connection)));
        let write = write.connect_with(writer).await.map_err(unusable)?;
        let migrated = MIGRATIONS.run(&write).await;
        migrated.map_err(|cause| migration_error(format!("database {shown}"), &MIGRATIONS, cause))?;
        let terms = Terms {
            max: READERS,
            min: READERS,
            patience: config.acquire_timeout,
            idle_timeout: None,
            max_lifetime: None,
            outlives_its_borrower: true,
        };
        let read = Pool::new(readers, terms, PoolName::Reader, metrics);
        read.tend().await.map_err(|StoreError(cause)| unusable(cause))?;
        Ok(Self { write, read, file: path.to_owned(), metrics: metrics.clone() })
    }

    /// Starts a transaction that may write. It waits its turn, so it never meets another writer of this process.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, Sqlite>> {
        if self.write.num_idle() == 0 {
            self.metrics.pool_waits.one(PoolName::Writer);
        }
        let start = Instant::now();
        let begun = self.write.begin_with("BEGIN IMMEDIATE").await;
        match &begun {
            Ok(_) => self.metrics.pool_time.time(PoolName::Writer, start.elapsed()),
            Err(_) => self.metrics.pool_failures.one(PoolName::Writer),
        }
        Ok(begun?)
    }

    /// Answers when the database can be read and written.
    pub(super) async fn check(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&mut *self.read.get().await?).await?;
        self.begin().await?.rollback().await?;
        Ok(())
    }

    /// Waits for the running transactions and closes the files.
    pub(super) async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// Gives up to `pages` unused pages of the file back to the file system. Answers whether there may be more.
    pub(super) async fn reclaim(&self, pages: u32) -> Result<bool> {
        let mut tx = self.begin().await?;
        let free: u32 = sqlx::query_scalar("PRAGMA freelist_count").fetch_one(&mut *tx).await?;
        if free == 0 {
            return Ok(false);
        }
        let statement = format!("PRAGMA incremental_vacuum({pages})");
        sqlx::query(sqlx::AssertSqlSafe(statement)).fetch_all(&mut *tx).await?;
        commit(tx).await?;
        Ok(free > pages)
    }
}

/// Whether the connection can go on. On some errors (a full disk is one) SQLite ends a transaction by itself; the
/// driver then still believes in it and could never begin another one, so the connection has to be replaced.
async fn is_sound(connection: &mut SqliteConnection) -> std::result::Result<bool, sqlx::Error> {
    if connection.is_in_transaction() {
        // The rollback of a transaction that was given up is still under way. This waits for it.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

/// Commits, and returns once the changes are on disk.
///
/// A failed fsync ends the process: the kernel may already have dropped the pages it could not write, so nothing that
/// is read from now on can be trusted. Whoever supervises the process starts it again on what is really there.
pub(super) async fn commit(transaction: Transaction<'static, Sqlite>) -> Result<()> {
    let Err(error) = transaction.commit().await else { return Ok(()) };
    let error = StoreError(error);
    if matches!(result_code(&error), Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC)) {
        tracing::error!(%error, "the disk did not confirm a write; stopping so that nothing unsure is served");
        std::process::exit(74); // EX_IOERR
    }
    Err(error)
}

/// SQLite's extended result code.
pub(super) fn result_code(error: &StoreError) -> Option<i32> {
    let error = error.0.as_database_error()?;
    error.try_downcast_ref::<sqlx::sqlite::SqliteError>()?;
    error.code()?.parse().ok()
}

/// Makes the file, readable for its owner alone, if there is none. SQLite gives its other files the same mode.
fn create_private(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[tokio::test]
    async fn a_write_that_met_a_full_disk_does_not_stop_the_ones_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::embedded(folder.path()).unwrap();
        let store = SqliteStore::open(&folder.path().join("db"), &config.database, &Metrics::unread()).await.unwrap();
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&store.write).await.unwrap();
        let limit = format!("PRAGMA max_page_count = {}", pages + 2);
        sqlx::query(sqlx::AssertSqlSafe(limit)).execute(&store.write).await.unwrap();

        let mut tx = store.begin().await.unwrap();
        let large = sqlx::query("INSERT INTO refresh_uses VALUES (zeroblob(100000), 1, NULL, 0)");
        let error = StoreError::from(large.execute(&mut *tx).await.unwrap_err());
        assert!(error.is_full(), "{error}");
        drop(tx);

        store.check().await.unwrap();
        commit(store.begin().await.unwrap()).await.unwrap();
    }
}
