//! What must survive a restart, in a SQL database. A method is one operation of the domain and one transaction.
//!
//! There are two databases, SQLite and PostgreSQL. A statement that both understand is written once and runs on
//! whichever is open (`on!`, `reading!`); where they differ the two stand side by side. Every commit is on disk before
//! it returns.

mod accounts;
mod attachments;
mod database;
mod devices;
mod gather;
mod inventory;
mod jobs;
mod links;
mod messages;
mod numbering;
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
mod sqlite;
mod standings;
pub(crate) mod transfer;
mod uploads;
mod usage;
mod used_prekeys;

use std::fmt::Write;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use tokio::time::Instant;

use crate::config;
use crate::store::database::{Database, SqliteTx, Tx, reading};
use crate::store::gather::Gather;
use crate::store::messages::Look;
use crate::store::numbering::Numbering;
use crate::store::postgres::PostgresStore;
use crate::store::sessions::Tickets;
use crate::store::sqlite::{SQLITE_FULL, SqliteStore};
use crate::store::standings::Standings;
use crate::store::uploads::Uploads;
use crate::store::usage::Usage;
use crate::telemetry::metrics::Metrics;

pub use accounts::{Credentials, NewAccount, Registered, Reset};
pub use attachments::{AttachmentAge, StoredAttachment};
pub use database::Figures;
pub use devices::{DeviceRow, NewDevice, Removed, Standing};
pub use inventory::Inventory;
pub use links::{Approval, Approved, LinkBody, Linked, NewLink};
pub use messages::{Expired, Page};
pub use prekeys::{Bundle, HandedOut, PrekeyCounts};
pub use pushes::{Overslept, Sleeper};
pub use refill::Refilled;
pub use sessions::{NewTicket, REPEAT_WINDOW, Refresh, Refreshed, SessionGrant, SessionHolder};
pub use uploads::{Allowance, Reservation, Reserved};
pub use usage::Disuse;

/// The database could not do what it was asked: it is away, busy for too long, full, or broken.
///
/// What may well happen (an unknown user, a taken name) is a value and not this error.
#[derive(Debug, thiserror::Error)]
#[error("the database failed: {0}")]
pub struct StoreError(#[from] sqlx::Error);

impl StoreError {
    /// True when the disk or a size limit stopped a write.
    pub fn is_full(&self) -> bool {
        // SQLite's code without the extension bits.
        let is_full_sqlite = sqlite::result_code(self).map(|code| code & 0xff) == Some(SQLITE_FULL);
        let is_full_elsewhere = matches!(&self.0, sqlx::Error::Io(error) if error.kind() == ErrorKind::StorageFull);
        is_full_sqlite || is_full_elsewhere || self.sqlstate() == Some("53100")
    }

    /// The same once more, for others who wait for the same answer: in its words, and full if it is.
    fn repeated(&self) -> Self {
        Self(match self.is_full() {
            true => sqlx::Error::Io(std::io::Error::new(ErrorKind::StorageFull, self.0.to_string())),
            false => sqlx::Error::Protocol(self.0.to_string()),
        })
    }

    /// True when somebody else held a row for too long.
    fn is_held_up(&self) -> bool {
        self.sqlstate() == Some("55P03")
    }

    /// True when another transaction was in the way, so that the same one may succeed when it is tried again.
    fn is_collision(&self) -> bool {
        matches!(self.sqlstate(), Some("40001" | "40P01"))
    }

    /// True when nobody can tell what became of the connection.
    fn is_lost_connection(&self) -> bool {
        match &self.0 {
            sqlx::Error::Database(_) => self.sqlstate().is_some_and(|code| {
                // The server or a pooler ends the connection, or the server was demoted and takes no writes.
                code.starts_with("57P") || code.starts_with("08") || matches!(code, "25006" | "25P03" | "25P04")
            }),
            sqlx::Error::RowNotFound | sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => false,
            _ => true,
        }
    }

    /// PostgreSQL's code: <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    fn sqlstate(&self) -> Option<&str> {
        let error = self.0.as_database_error()?;
        Some(error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>()?.code())
    }
}

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
    /// The URL can't be read.
    #[error(
        "--db-url: this is not a URL of a database; it takes sqlite:PATH or postgres://USER:PASSWORD@HOST:PORT/NAME"
    )]
    Url,
    /// The server is not there, or not yet. Waiting may help.
    #[error(
        "no database answers at {address} (--db-url): {cause}; start it or name another, or, to try Obscura Server on this machine alone, start it with --data-dir DIR"
    )]
    Away {
        /// Host and port.
        address: String,
        /// What happened.
        cause: sqlx::Error,
    },
    /// The server is there and doesn't let us in.
    #[error(
        "the database at {address} refuses (--db-url): {cause}; check the user, the password and the name in the URL"
    )]
    Refused {
        /// Host and port.
        address: String,
        /// What the server said.
        cause: sqlx::Error,
    },
    /// The server or a pooler in front of it doesn't take our connections as they are.
    #[error(
        "the database at {address} can't be used (--db-url): {cause}; if a pooler such as PgBouncer is in front of it, let it pool sessions and ignore parameters that it doesn't know, and check sslmode and what follows a ? in the URL"
    )]
    Unfit {
        /// Host and port.
        address: String,
        /// What the server or the pooler said.
        cause: sqlx::Error,
    },
    /// A pooler gives each transaction another connection of the database.
    #[error(
        "the pooler at {address} (--db-url) doesn't keep one connection of the database for each of ours, so settings, prepared statements and locks would get lost; let it pool sessions (PgBouncer: pool_mode = session), or name PostgreSQL itself"
    )]
    PooledTransactions {
        /// Host and port.
        address: String,
    },
    /// The database can't hold every text.
    #[error(
        "the database at {address} has the encoding {found} and can't hold every name; this server needs UTF8: make a new one with CREATE DATABASE obscura ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0, move what there is with pg_dump and psql, and name it in --db-url"
    )]
    Encoding {
        /// Host and port.
        address: String,
        /// What PostgreSQL calls it.
        found: String,
    },
    /// The server is too old.
    #[error("the database at {address} is PostgreSQL {found}; this server needs 15 or newer")]
    TooOld {
        /// Host and port.
        address: String,
        /// The major version.
        found: i32,
    },
    /// A transfer into the database has not finished.
    #[error(
        "a transfer into the database at {address} has not finished; run `obscura-server transfer` again to its end"
    )]
    Unfinished {
        /// Host and port.
        address: String,
    },
    /// A later version of the server has changed the tables.
    #[error(
        "the {database} was written by a newer version of this server (schema {found}, this one knows {known}); run that version, or restore a backup made before the upgrade"
    )]
    Newer {
        /// Which one.
        database: String,
        /// The newest migration in the database.
        found: i64,
        /// The newest migration in this binary.
        known: i64,
    },
    /// A migration failed or was changed after it had been applied.
    #[error("the tables of the {database} could not be brought up to date: {cause}")]
    Migration {
        /// Which one.
        database: String,
        /// What went wrong.
        cause: MigrateError,
    },
}

impl OpenError {
    /// True when the same attempt may succeed a little later.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Away { .. })
    }

    /// Tells a server that isn't there from one that doesn't let us in, and from one that we can't use.
    fn connecting(address: String, cause: sqlx::Error) -> Self {
        let Some(error) = cause.as_database_error() else {
            return match cause {
                sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
                    Self::Unfit { address, cause }
                }
                cause => Self::Away { address, cause },
            };
        };
        let (code, message) = (error.code().unwrap_or_default(), error.message());
        // PgBouncer has one code for nearly everything, and says the rest in words.
        if message.contains("startup parameter") {
            return Self::Unfit { address, cause };
        }
        let is_pooler_that_knows_nothing = message.contains("no such database") || message.contains("no such user");
        if code.starts_with("28") || code == "3D000" || is_pooler_that_knows_nothing {
            Self::Refused { address, cause }
        } else if code.starts_with("57P") || code.starts_with("53") || code.starts_with("08") {
            Self::Away { address, cause }
        } else {
            Self::Unfit { address, cause }
        }
    }
}

/// Questions in one statement.
const GATHERED: usize = 128;
/// Statements at the same time that look into inboxes.
const LOOK_LANES: usize = 2;

/// The database.
#[derive(Clone)]
pub struct Store {
    database: Database,
    numbering: Numbering,
    limits: Limits,
    metrics: Metrics,
    /// When a group last had to pass over accounts that somebody else holds.
    held_up: Arc<Mutex<Option<Instant>>>,
    /// Questions that every request asks.
    standings: Standings,
    /// Questions that every message asks.
    looks: Arc<Gather<Look, Page>>,
    /// What whoever connects needs.
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
    /// Opens the database that the URL names and brings its tables up to date. The file of a `sqlite:` URL is made if it
    /// isn't there.
    pub async fn open(
        config: &config::Database,
        limits: Limits,
        metrics: &Metrics,
    ) -> std::result::Result<Self, OpenError> {
        let (database, numbering) = match config.file() {
            Some(file) => {
                let sqlite = SqliteStore::open(file, config, metrics).await?;
                let unusable = |cause| OpenError::Unusable { path: file.display().to_string(), cause };
                let mut writer = sqlite.write.get().await.map_err(|StoreError(cause)| unusable(cause))?;
                let numbering = Numbering::load(&mut writer).await.map_err(unusable)?;
                drop(writer);
                (Database::Sqlite(sqlite), numbering)
            }
            None => (Database::Postgres(PostgresStore::open(config, metrics).await?), Numbering::new()),
        };
        let standings = Standings::new(matches!(database, Database::Sqlite(_)));
        let looks = Arc::new(Gather::new(LOOK_LANES, GATHERED));
        let (tickets, uploads) = (Arc::new(Tickets::new()), uploads::none());
        let metrics = metrics.clone();
        let held_up = Arc::default();
        let usage = Arc::new(Usage::new());
        Ok(Self { database, numbering, limits, metrics, held_up, standings, looks, tickets, uploads, usage })
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

    /// Closes connections to PostgreSQL that nobody needs, and makes those that are to be kept.
    pub async fn tend_connections(&self) -> Result<()> {
        match &self.database {
            Database::Sqlite(_) => Ok(()),
            Database::Postgres(postgres) => postgres.pool.tend().await,
        }
    }

    /// What the connections and files are at the moment. It doesn't ask the database.
    pub fn figures(&self) -> Figures {
        self.database.figures()
    }

    /// True when no other node can use the database.
    pub fn is_our_own(&self) -> bool {
        matches!(self.database, Database::Sqlite(_))
    }

    /// Starts a transaction that may write.
    async fn begin(&self) -> Result<Tx> {
        Ok(match &self.database {
            Database::Sqlite(sqlite) => Tx::Sqlite(SqliteTx::new(sqlite.begin().await?, self.standings.changes())),
            Database::Postgres(postgres) => Tx::Postgres(postgres.begin().await?),
        })
    }
}

fn migration_error(database: String, migrations: &Migrator, cause: MigrateError) -> OpenError {
    match cause {
        MigrateError::VersionMissing(found) => {
            let known = migrations.iter().map(|migration| migration.version).max().unwrap_or_default();
            OpenError::Newer { database, found, known }
        }
        cause => OpenError::Migration { database, cause },
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
