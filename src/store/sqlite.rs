//! SQLite: one file, one connection that writes and several that read.

use std::fs::OpenOptions;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::{FutureExt, TryStreamExt};
use sqlx::migrate::Migrator;
use sqlx::query::Query;
use sqlx::sqlite::{
    SqliteArguments, SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection, Either, Executor, Sqlite, SqliteConnection};

use crate::config;
use crate::store::error::migration_error;
use crate::store::pool::{Pool, PoolLimits, PooledConnection};
use crate::store::{OpenError, Result, StoreError};
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
    pub(super) write: Pool<Sqlite>,
    pub(super) read: Pool<Sqlite>,
    pub(super) file: PathBuf,
    /// Set once the file is no longer at its path: what is written then would be lost.
    is_lost: Arc<AtomicBool>,
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
            // Room for what transactions that are given up leave for their thread to do: see `Transaction`'s `drop`.
            .command_buffer_size(4096)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
            .pragma("journal_size_limit", (64 << 20).to_string())
            .pragma("cache_size", "-16384");
        // Without the writer's settings, some of which take the write lock when they are made.
        let readers = options.pragma("query_only", "on").pragma("cache_size", "-8192");
        // A connection to a file doesn't wear out, and its caches are worth keeping.
        let limits = |count| PoolLimits {
            max: count,
            min: count,
            acquire_timeout: config.acquire_timeout,
            idle_timeout: None,
            max_lifetime: None,
            reusable_after_cancel: true,
        };
        // How a file is laid out is set before its first table is made. To set it again would be one more write each time.
        let first = writer.clone().auto_vacuum(SqliteAutoVacuum::Incremental);
        let mut first = first.connect().await.map_err(unusable)?;
        let migrated = MIGRATIONS.run(&mut first).await;
        migrated.map_err(|cause| migration_error(format!("database {shown}"), &MIGRATIONS, cause))?;
        first.close().await.map_err(unusable)?;
        let write = Pool::new(writer, (), limits(1), PoolName::Writer, metrics);
        write.maintain().await.map_err(|StoreError(cause)| unusable(cause))?;
        let read = Pool::new(readers, (), limits(READERS), PoolName::Reader, metrics);
        read.maintain().await.map_err(|StoreError(cause)| unusable(cause))?;
        Ok(Self { write, read, file: path.to_owned(), is_lost: Arc::default() })
    }

    /// Starts a transaction that may write. It waits its turn, so it never meets another writer of this process.
    pub(super) async fn begin(&self) -> Result<Transaction> {
        let mut transaction = self.without_begin().await?;
        let [_begun] = transaction.run(sqlx::query("BEGIN IMMEDIATE")).await?;
        Ok(transaction)
    }

    /// A transaction whose first text has to begin it.
    pub(super) async fn without_begin(&self) -> Result<Transaction> {
        if self.is_lost.load(Ordering::Relaxed) {
            return Err(sqlx::Error::Io(std::io::Error::other("its file was removed, replaced or overwritten")).into());
        }
        Ok(Transaction { connection: self.write.get().await?, is_open: true })
    }

    /// Answers when the database can be read and written.
    pub(super) async fn check(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&mut *self.read.get().await?).await?;
        self.begin().await?.roll_back().await?;
        Ok(())
    }

    /// Writes nothing more, not even at the end.
    pub(super) fn stop_writes(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
        // SQLite writes its log into the file when the last connection closes, and the file may be a restored backup by now.
        // So the connections stay open until the process ends.
        std::mem::forget((self.read.clone(), self.write.clone()));
    }

    /// The number that `PRAGMA application_id` keeps in the database.
    pub(super) async fn file_generation(&self) -> Result<i32> {
        Ok(sqlx::query_scalar("PRAGMA application_id").fetch_one(&mut *self.read.get().await?).await?)
    }

    /// Gives the database this number.
    pub(super) async fn set_file_generation(&self, generation: i32) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.run::<1>(sqlx::query(sqlx::AssertSqlSafe(format!("PRAGMA application_id = {generation}")))).await?;
        tx.commit().await
    }

    /// Waits for the running transactions and closes the files.
    pub(super) async fn close(&self) {
        if self.is_lost.load(Ordering::Relaxed) {
            return;
        }
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
        tx.commit().await?;
        Ok(free > pages)
    }
}

/// A transaction of the one writer. Dropping it rolls it back.
///
/// The driver has transactions of its own. It counts them, and is wrong when SQLite ends one by itself, as it does on a full
/// disk; and each of their steps is a trip to the thread of the connection, where a text may hold several.
pub(super) struct Transaction {
    connection: PooledConnection<Sqlite>,
    is_open: bool,
}

impl Transaction {
    /// Commits, and returns once the changes are on disk.
    pub(super) async fn commit(self) -> Result<()> {
        let [_committed] = self.finish(sqlx::query("COMMIT")).await?;
        Ok(())
    }

    /// Runs the last text of the transaction, which ends with its commit.
    pub(super) async fn finish<const N: usize>(
        mut self,
        text: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<[Answer; N]> {
        let answers = self.run(text).await?;
        self.is_open = false;
        Ok(answers)
    }

    async fn roll_back(mut self) -> Result<()> {
        let [_rolled_back] = self.run(sqlx::query("ROLLBACK")).await?;
        self.is_open = false;
        Ok(())
    }

    /// Runs a text of so many statements, which share its arguments, in one trip to the connection's thread. Answers what
    /// came of each. After an error the transaction is to be given up.
    ///
    /// A failed fsync ends the process: the kernel may already have dropped the pages it could not write, so nothing that
    /// is read from now on can be trusted. A supervisor starts the process again on what is really there.
    pub(super) async fn run<const N: usize>(
        &mut self,
        text: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<[Answer; N]> {
        let (mut answers, mut rows) = (Vec::with_capacity(N), Vec::new());
        let mut steps = (**self).fetch_many(text);
        let failure = loop {
            match steps.try_next().await {
                Ok(Some(Either::Right(row))) => rows.push(row),
                Ok(Some(Either::Left(done))) => {
                    answers.push(Answer { rows: std::mem::take(&mut rows), changed: done.rows_affected() });
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        drop(steps);
        // Answers end early, and without an error, when the thread dies.
        let answers = match failure {
            Some(error) => Err(error),
            None => answers.try_into().map_err(|_| sqlx::Error::WorkerCrashed),
        };
        let error = match answers {
            Ok(answers) => return Ok(answers),
            Err(error) => StoreError(error),
        };
        if matches!(result_code(&error), Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC)) {
            tracing::error!(%error, "the disk did not confirm a write; stopping so that nothing unsure is served");
            std::process::exit(74); // EX_IOERR
        }
        // Without its thread a connection is of no use.
        self.connection.set_reusable(!matches!(error.0, sqlx::Error::WorkerCrashed));
        Err(error)
    }
}

/// What came of one statement.
pub(super) struct Answer {
    pub(super) rows: Vec<SqliteRow>,
    /// How many rows it changed; nothing sensible when it only reads.
    pub(super) changed: u64,
}

impl Deref for Transaction {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if self.is_open {
            // The connection's thread takes this before anything of the next borrower, though no caller waits for it. Often
            // there is nothing to roll back any more, which is as good.
            let _ = sqlx::query("ROLLBACK").execute(&mut *self.connection).now_or_never();
        }
    }
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
        let store = store_in(folder.path()).await;
        let mut writer = store.write.get().await.unwrap();
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *writer).await.unwrap();
        let limit = format!("PRAGMA max_page_count = {}", pages + 2);
        sqlx::query(sqlx::AssertSqlSafe(limit)).execute(&mut *writer).await.unwrap();
        drop(writer);

        let mut tx = store.begin().await.unwrap();
        let large = sqlx::query("INSERT INTO refresh_uses VALUES (zeroblob(100000), 1, NULL, 0)");
        let error = StoreError::from(large.execute(&mut *tx).await.unwrap_err());
        assert!(error.is_full(), "{error}");
        drop(tx);

        store.check().await.unwrap();
        store.begin().await.unwrap().commit().await.unwrap();
    }

    async fn store_in(folder: &Path) -> SqliteStore {
        let config = Config::embedded(folder).unwrap();
        SqliteStore::open(&folder.join("db"), &config.database, &Metrics::unexported()).await.unwrap()
    }

    async fn uses(store: &SqliteStore) -> i64 {
        let mut reader = store.read.get().await.unwrap();
        sqlx::query_scalar("SELECT count(*) FROM refresh_uses").fetch_one(&mut *reader).await.unwrap()
    }

    const INSERT: &str = "INSERT INTO refresh_uses VALUES (randomblob(32), 1, NULL, 0);";

    #[tokio::test]
    async fn a_text_that_fails_in_the_middle_leaves_nothing_and_the_next_one_is_committed() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_in(folder.path()).await;
        let broken = format!("BEGIN IMMEDIATE; {INSERT} INSERT INTO refresh_uses VALUES (NULL, 1, NULL, 0); COMMIT");
        let failed = store.without_begin().await.unwrap().finish::<4>(sqlx::query(sqlx::AssertSqlSafe(broken))).await;
        assert!(failed.is_err());
        assert_eq!(uses(&store).await, 0);
        let whole = format!("BEGIN IMMEDIATE; {INSERT} COMMIT");
        store.without_begin().await.unwrap().finish::<3>(sqlx::query(sqlx::AssertSqlSafe(whole))).await.unwrap();
        assert_eq!(uses(&store).await, 1);
    }

    #[tokio::test]
    async fn abandoned_transactions_are_rolled_back_and_block_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_in(folder.path()).await;
        for polls in 0..200 {
            let work = async {
                let mut tx = store.begin().await.unwrap();
                sqlx::query(INSERT).execute(&mut *tx).await.unwrap();
                std::future::pending::<()>().await;
            };
            let mut work = std::pin::pin!(work);
            for _ in 0..polls % 8 {
                assert!(work.as_mut().now_or_never().is_none());
                tokio::task::yield_now().await;
            }
        }
        store.begin().await.unwrap().commit().await.unwrap();
        assert_eq!(uses(&store).await, 0);
    }

    #[tokio::test]
    async fn a_transaction_that_was_left_open_is_rolled_back_by_the_one_that_meets_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_in(folder.path()).await;
        let mut connection = store.write.get().await.unwrap();
        sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await.unwrap();
        drop(connection);
        assert!(store.begin().await.is_err());
        store.begin().await.unwrap().commit().await.unwrap();
    }
}
