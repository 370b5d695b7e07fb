//! What must survive a restart, in a SQL database. A method is one operation of the domain and one transaction.
//!
//! SQLite lets one connection write at a time, so writers queue for the one connection of `write`; `read` has several
//! that never wait for a writer (write-ahead log). Every commit is on disk before it returns (`synchronous=FULL`).

mod accounts;
mod attachments;
mod devices;
mod inboxes;
mod links;
mod messages;
mod outcome;
mod prekeys;
mod push_tokens;
mod readers;
mod send;
mod sessions;

use std::fmt::Write;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, SqliteConnection, SqlitePool, Transaction};

use crate::config;
use crate::store::readers::Readers;

pub use accounts::{Credentials, NewAccount, Registered, Reset};
pub use attachments::{AttachmentAge, Reserved, StoredAttachment};
pub use devices::{DeviceRow, NewDevice, Removed, Standing};
pub use links::{Approved, LinkBody, Linked, NewLink};
pub use messages::{Expired, Page};
pub use prekeys::{Bundle, HandedOut, PrekeyCounts, Refilled};
pub use sessions::{REPEAT_WINDOW, Refresh, Refreshed, SessionGrant, SessionHolder};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// How many connections read beside the one that writes.
const READERS: u32 = 4;
/// The write-ahead log is folded back into the database after this many pages (16 MiB).
const CHECKPOINT_PAGES: u32 = 4000;

/// The database could not do what it was asked: it is away, busy for too long, full, or broken.
///
/// What may well happen (an unknown user, a taken name) is a value and not this error.
#[derive(Debug, thiserror::Error)]
#[error("the database failed: {0}")]
pub struct StoreError(#[from] sqlx::Error);

impl StoreError {
    /// True when the disk or a size limit stopped a write.
    pub fn is_full(&self) -> bool {
        self.primary_code() == Some(SQLITE_FULL)
    }

    fn code(&self) -> Option<i32> {
        self.0.as_database_error()?.code()?.parse().ok()
    }

    /// SQLite's result code without the extension bits.
    fn primary_code(&self) -> Option<i32> {
        self.code().map(|code| code & 0xff)
    }
}

/// <https://www.sqlite.org/rescode.html>
const SQLITE_FULL: i32 = 13;
const SQLITE_IOERR_FSYNC: i32 = 1034;
const SQLITE_IOERR_DIR_FSYNC: i32 = 1290;

/// The result of every method of the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Why the store could not be opened. Each says in one sentence what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file can't be opened, made or written.
    #[error(
        "the database {path} can't be opened: {cause}; check that the folder exists, is writable and has free space"
    )]
    Unusable {
        /// The file.
        path: String,
        /// What SQLite said.
        cause: sqlx::Error,
    },
    /// A later version of the server has changed the tables.
    #[error(
        "the database {path} was written by a newer version of this server (schema {found}, this one knows {known}); run that version, or restore a backup made before the upgrade"
    )]
    Newer {
        /// The file.
        path: String,
        /// The newest migration in the database.
        found: i64,
        /// The newest migration in this binary.
        known: i64,
    },
    /// A migration failed or was changed after it had been applied.
    #[error("the tables of the database {path} could not be brought up to date: {cause}")]
    Migration {
        /// The file.
        path: String,
        /// What went wrong.
        cause: MigrateError,
    },
}

/// The database.
#[derive(Clone)]
pub struct Store {
    write: SqlitePool,
    read: Readers,
    inboxes: Arc<inboxes::Inboxes>,
    limits: Limits,
}

/// The limits that the store holds in its transactions.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The age at which messages and attachments are gone.
    pub retention: Duration,
    /// Messages that may wait for one device.
    pub max_inbox_size: u32,
    /// How long the outcome of a send is kept for repeats.
    pub idempotency_lifetime: Duration,
    /// One-time prekeys of one kind that a device may have.
    pub max_prekeys: u32,
    /// Devices that an account may have.
    pub max_devices: u32,
}

impl Limits {
    /// Takes the limits out of the configuration.
    pub fn of(config: &config::Config) -> Self {
        Self {
            retention: config.retention,
            max_inbox_size: config.messaging.max_inbox_size,
            idempotency_lifetime: config.messaging.idempotency_lifetime,
            max_prekeys: config.prekeys.max,
            max_devices: config.auth.max_devices_per_user,
        }
    }
}

impl Store {
    /// Opens the SQLite database in the file `path`, makes it if it isn't there, and brings its tables up to date.
    pub async fn open(path: &Path, config: &config::Database, limits: Limits) -> std::result::Result<Self, OpenError> {
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
            .pragma("cache_size", "-65536");
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
        migrate(&write, &shown).await?;
        let read = Readers::open(&readers, READERS, config.acquire_timeout).await.map_err(unusable)?;
        let inboxes = Arc::new(inboxes::Inboxes::load(&write).await.map_err(unusable)?);
        Ok(Self { write, read, inboxes, limits })
    }

    /// Answers when the database can be read and written.
    pub async fn check(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&mut *self.read.get().await?).await?;
        self.begin().await?.rollback().await?;
        Ok(())
    }

    /// Waits for the running transactions and closes the files.
    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// Gives up to `pages` unused pages of the file back to the file system. Answers whether there may be more.
    pub async fn reclaim(&self, pages: u32) -> Result<bool> {
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

    /// Starts a transaction that may write. It waits its turn, so it never meets another writer of this process.
    async fn begin(&self) -> Result<Transaction<'static, sqlx::Sqlite>> {
        Ok(self.write.begin_with("BEGIN IMMEDIATE").await?)
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
async fn commit(transaction: Transaction<'static, sqlx::Sqlite>) -> Result<()> {
    let Err(error) = transaction.commit().await else { return Ok(()) };
    let error = StoreError(error);
    if matches!(error.code(), Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC)) {
        tracing::error!(%error, "the disk did not confirm a write; stopping so that nothing unsure is served");
        std::process::exit(74); // EX_IOERR
    }
    Err(error)
}

/// Makes the file, readable for its owner alone, if there is none. SQLite gives its other files the same mode.
fn create_private(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

async fn migrate(pool: &SqlitePool, path: &str) -> std::result::Result<(), OpenError> {
    MIGRATIONS.run(pool).await.map_err(|cause| match cause {
        MigrateError::VersionMissing(found) => {
            let known = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
            OpenError::Newer { path: path.to_owned(), found, known }
        }
        cause => OpenError::Migration { path: path.to_owned(), cause },
    })
}

/// `[1,2,3]`
fn json_list<T: std::fmt::Display>(values: impl Iterator<Item = T>) -> String {
    let mut list = String::from("[");
    for value in values {
        let _ = write!(list, "{value},");
    }
    if list.len() > 1 {
        list.pop();
    }
    list.push(']');
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_write_that_met_a_full_disk_does_not_stop_the_ones_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = config::Config::embedded(folder.path()).unwrap();
        let store = Store::open(&folder.path().join("db"), &config.database, Limits::of(&config)).await.unwrap();
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
