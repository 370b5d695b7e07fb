//! What must survive a restart, in a SQL database. A method is one operation of the domain and one transaction.
//!
//! There are two databases, SQLite and PostgreSQL. A statement that both understand is written once and runs on
//! whichever is open (`on!`, `reading!`); where they differ the two stand side by side. Every commit is on disk before
//! it returns.

mod accounts;
mod attachments;
mod batcher;
mod database;
mod device_auth_cache;
mod devices;
mod error;
mod inbox_limiter;
mod inventory;
mod jobs;
mod known_prekeys;
mod leftovers;
mod links;
mod message_sequence;
mod messages;
mod notices;
mod outcome;
mod pool;
mod postgres;
mod prekeys;
mod push_tokens;
mod pushes;
mod refill;
mod restore;
mod send;
mod sessions;
mod shares;
mod spent_prekeys;
mod sqlite;
mod time;
pub(crate) mod transfer;
mod uploads;
mod usage;

use std::fmt::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::config;
use crate::store::batcher::QueryBatcher;
use crate::store::database::{Database, SqliteTx, Tx, reading};
use crate::store::device_auth_cache::DeviceAuthCache;
use crate::store::inbox_limiter::InboxLimiter;
use crate::store::message_sequence::MessageSequence;
use crate::store::messages::InboxQuery;
use crate::store::postgres::PostgresStore;
use crate::store::sessions::Tickets;
use crate::store::shares::Rows;
use crate::store::sqlite::SqliteStore;
use crate::store::uploads::Uploads;
use crate::store::usage::Usage;
use crate::telemetry::metrics::Metrics;

pub use accounts::{Credentials, NewAccount, Registered, Reset};
pub use attachments::{AttachmentAge, StoredAttachment};
pub use database::DatabaseStats;
pub use devices::{DeviceAuth, DeviceRow, NewDevice, Removed};
pub use error::{OpenError, StoreError};
pub use inventory::Inventory;
pub use leftovers::Leftovers;
pub use links::{Approval, Approved, LinkBody, Linked, NewLink};
pub use messages::{Expired, Page};
pub use notices::Notice;
pub use prekeys::{Bundle, HandedOut, PrekeyCounts};
pub use pushes::{OverduePage, PushCandidate};
pub use refill::Refilled;
pub use send::GroupResult;
pub use sessions::{NewTicket, REPEAT_WINDOW, Refresh, Refreshed, SessionGrant, SessionHolder};
pub use time::StoredTime;
pub use uploads::{Allowance, Reservation, Reserved};
pub use usage::IdleCutoffs;

/// The result of every method of the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Questions in one statement.
const QUERIES_PER_BATCH: usize = 128;
/// Statements at the same time that look into inboxes.
const CONCURRENT_INBOX_READS: usize = 2;

/// The database.
#[derive(Clone)]
pub struct Store {
    database: Database,
    message_sequence: MessageSequence,
    /// What is known of inboxes and of what accounts have queued.
    inbox_limiter: InboxLimiter,
    limits: Limits,
    metrics: Metrics,
    /// When a group last had to pass over accounts that another transaction holds.
    last_contention: Arc<Mutex<Option<Instant>>>,
    /// Questions that every request asks.
    device_auth_cache: DeviceAuthCache,
    /// Questions that every message asks.
    inbox_reads: Arc<QueryBatcher<InboxQuery, Page>>,
    /// What a connecting session needs.
    tickets: Arc<Tickets>,
    uploads: Arc<Uploads>,
    /// When accounts were last used.
    usage: Arc<Usage>,
}

/// The limits that the store holds in its transactions.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The age at which messages and attachments are gone.
    pub retention: Duration,
    /// Messages that may wait for one device.
    pub max_inbox_size: u32,
    /// Bytes of sealed messages that may wait for one device; 0 is no limit.
    pub inbox_max_bytes: u64,
    /// Per cent of an inbox that one sending account may fill, once the inbox is more than half full.
    pub sender_share_percent: u64,
    /// Bytes of sealed messages that an account may queue in a day; 0 is no limit.
    pub sender_bytes_per_day: u64,
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
            inbox_max_bytes: config.messaging.inbox_max_bytes,
            sender_share_percent: config.messaging.sender_share_percent,
            sender_bytes_per_day: config.messaging.sender_bytes_per_day,
            idempotency_lifetime: config.messaging.idempotency_lifetime,
            max_prekeys: config.prekeys.max,
            max_devices: config.auth.max_devices_per_user,
        }
    }
}

impl Store {
    /// Opens the database that the URL names and brings its tables up to date. The file of a `sqlite:` URL is made if it
    /// isn't there.
    pub async fn open(
        config: &config::Database,
        limits: Limits,
        metrics: &Metrics,
    ) -> std::result::Result<Self, OpenError> {
        let (database, message_sequence) = match config.file() {
            Some(file) => {
                let sqlite = SqliteStore::open(file, config, metrics).await?;
                let unusable = |cause| OpenError::Unusable { path: file.display().to_string(), cause };
                let mut writer = sqlite.write.get().await.map_err(|StoreError(cause)| unusable(cause))?;
                let message_sequence = MessageSequence::load(&mut writer).await.map_err(unusable)?;
                drop(writer);
                (Database::Sqlite(sqlite), message_sequence)
            }
            None => (Database::Postgres(PostgresStore::open(config, metrics).await?), MessageSequence::new()),
        };
        let device_auth_cache = DeviceAuthCache::new(matches!(database, Database::Sqlite(_)));
        let inbox_reads = Arc::new(QueryBatcher::new(CONCURRENT_INBOX_READS, QUERIES_PER_BATCH));
        let (tickets, uploads) = (Arc::new(Tickets::new()), uploads::new_batcher());
        let metrics = metrics.clone();
        let inbox_limiter = InboxLimiter::new(&limits, matches!(database, Database::Sqlite(_)));
        let (last_contention, usage) = (Arc::default(), Arc::new(Usage::new()));
        Ok(Self {
            database,
            message_sequence,
            inbox_limiter,
            limits,
            metrics,
            last_contention,
            device_auth_cache,
            inbox_reads,
            tickets,
            uploads,
            usage,
        })
    }

    /// Answers when the database can be read and written.
    pub async fn check(&self) -> Result<()> {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.check().await,
            Database::Postgres(postgres) => postgres.check().await,
        }
    }

    /// Waits for the running transactions and closes the connections.
    pub async fn close(&self) {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.close().await,
            Database::Postgres(postgres) => postgres.pool.close().await,
        }
    }

    /// Writes nothing more from now on: the database is lost, or another one.
    pub fn stop_writes(&self) {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.stop_writes(),
            Database::Postgres(postgres) => postgres.stop_writes(),
        }
    }

    /// The mark of SQLite's file: see [`Store::set_file_generation`]. `None` on PostgreSQL.
    pub async fn file_generation(&self) -> Result<Option<i32>> {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.file_generation().await.map(Some),
            Database::Postgres(_) => Ok(None),
        }
    }

    /// Marks SQLite's file with a number, by which it can be told from a copy that was made before.
    pub async fn set_file_generation(&self, generation: i32) -> Result<()> {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.set_file_generation(generation).await,
            Database::Postgres(_) => Ok(()),
        }
    }

    /// How many bytes the database takes. SQLite's unused pages don't count; what PostgreSQL has free inside its files
    /// does.
    pub async fn size(&self) -> Result<u64> {
        let bytes: i64 = match &self.database {
            Database::Sqlite(sqlite) => {
                let statement = "SELECT (page_count - freelist_count) * page_size
                     FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
                sqlx::query_scalar(statement).fetch_one(&mut *sqlite.read.get().await?).await?
            }
            Database::Postgres(_) => {
                let statement = "SELECT pg_database_size(current_database())";
                reading!(self, |db| sqlx::query_scalar(statement).fetch_one(db))?
            }
        };
        Ok(bytes.unsigned_abs())
    }

    /// Gives up to `pages` unused pages of SQLite's file back to the file system. Answers whether there may be more.
    /// PostgreSQL does so by itself.
    pub async fn reclaim(&self, pages: u32) -> Result<bool> {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.reclaim(pages).await,
            Database::Postgres(_) => Ok(false),
        }
    }

    /// Closes connections to PostgreSQL that are not needed, and makes those that are to be kept.
    pub async fn maintain_connections(&self) -> Result<()> {
        match &self.database {
            Database::Sqlite(_) => Ok(()),
            Database::Postgres(postgres) => postgres.pool.maintain().await,
        }
    }

    /// What the connections and files are at the moment. It doesn't ask the database.
    pub fn stats(&self) -> DatabaseStats {
        self.database.stats()
    }

    /// True when no other node can use the database.
    pub fn is_exclusive(&self) -> bool {
        matches!(self.database, Database::Sqlite(_))
    }

    /// Starts a transaction that may write, for a request that has to do with these rows. On PostgreSQL only a few of them
    /// at a time have a connection, since another session may hold the rows: see `shares`.
    async fn begin_on(&self, rows: Rows) -> Result<Tx> {
        match &self.database {
            Database::Sqlite(_) => self.begin().await,
            Database::Postgres(postgres) => Ok(Tx::Postgres(postgres.begin_on(rows).await?)),
        }
    }

    /// Starts a transaction that may write.
    async fn begin(&self) -> Result<Tx> {
        Ok(match &self.database {
            Database::Sqlite(sqlite) => {
                Tx::Sqlite(SqliteTx::new(sqlite.begin().await?, self.device_auth_cache.changes()))
            }
            Database::Postgres(postgres) => Tx::Postgres(postgres.begin().await?),
        })
    }
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
