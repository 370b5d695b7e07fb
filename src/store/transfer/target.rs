//! The PostgreSQL database that is being filled, and how far that has come.
//!
//! `transfer_progress` is made before the first row and dropped in the last transaction. While it is there no server
//! starts on the database. Each batch is written in one transaction with its place in that table, so a batch is there
//! once, whatever interrupts us.

use std::time::Duration;

use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::config;
use crate::store::StoreError;
use crate::store::postgres;
use crate::store::transfer::source::{Batch, Numbers};
use crate::store::transfer::table::{HEADER, TABLES, TRAILER, Table};
use crate::store::transfer::{BYTES_OF_ATTACHMENTS, TransferError};

/// Held by a transfer for as long as it is connected. Any number that no other program uses.
const LOCK: i64 = 0x6f62_7363_7572_6100;
/// How often the lock is asked for, with [`PAUSE`] between: PostgreSQL may need a moment to notice that a transfer was
/// killed.
const LOCK_ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(500);
/// The longest time that a batch, or the next row of an answer, may take.
const BATCH_LIMIT: Duration = Duration::from_secs(60);
/// The same for what looks at whole tables.
const WHOLE_LIMIT: Duration = Duration::from_secs(3600);

/// A connection to the database, and its address for sentences.
pub(super) struct Target {
    connection: PgConnection,
    address: String,
}

/// How far something has come.
pub(super) struct Progress {
    /// The key of the last row that has arrived.
    pub(super) last: Option<Vec<u8>>,
    pub(super) copied: u64,
    pub(super) is_done: bool,
}

impl Target {
    /// Connects, sees that no other process uses the database and that it has nothing but what an earlier run from the same
    /// source has left. Then it has the tables, and a transfer is under way.
    pub(super) async fn open(config: &config::Database, source: [u8; 32]) -> Result<(Self, bool), TransferError> {
        let options = postgres::connect_options(config).map_err(TransferError::Target)?;
        let seconds = |duration: Duration| format!("{}s", duration.as_secs());
        let options = options.application_name("obscura-server transfer");
        let settings = postgres::Settings::new([
            ("synchronous_commit", "on".to_owned()),
            ("lock_timeout", format!("{}ms", config.lock_timeout.as_millis())),
            ("statement_timeout", seconds(WHOLE_LIMIT)),
            ("idle_in_transaction_session_timeout", seconds(BATCH_LIMIT)),
            // PostgreSQL soon lets go of a transfer whose machine has vanished.
            ("tcp_keepalives_idle", "15".to_owned()),
            ("tcp_keepalives_interval", "5".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
        ]);
        let connected = postgres::connect(&options, &settings, config.acquire_timeout).await;
        let (connection, address) = connected.map_err(TransferError::Target)?;
        let mut target = Self { connection, address };
        target.lock().await?;
        target.refuse_servers().await?;
        let is_resumed = target.is_under_way().await?;
        if !is_resumed {
            target.refuse_data().await?;
        }
        let migrating = postgres::migrate(&mut target.connection, &target.address);
        let migrated = tokio::time::timeout(WHOLE_LIMIT, migrating).await;
        migrated.map_err(|_| TransferError::Lost { cause: timed_out() })?.map_err(TransferError::Target)?;
        if !is_resumed {
            target.begin(source).await?;
        }
        target.refuse_another_source(source).await?;
        // Once more, because one may have started before the table that forbids it was there.
        target.refuse_servers().await?;
        Ok((target, is_resumed))
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    async fn lock(&mut self) -> Result<(), TransferError> {
        for attempt in 1..=LOCK_ATTEMPTS {
            if self.is(&format!("SELECT pg_try_advisory_lock({LOCK})")).await? {
                return Ok(());
            }
            if attempt < LOCK_ATTEMPTS {
                tokio::time::sleep(PAUSE).await;
            }
        }
        Err(TransferError::Second { address: self.address.clone() })
    }

    /// A server that is connected already would write between our rows.
    async fn refuse_servers(&mut self) -> Result<(), TransferError> {
        let connected = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'obscura-server')";
        if self.is(connected).await? {
            return Err(TransferError::ServerRuns { address: self.address.clone() });
        }
        Ok(())
    }

    async fn is_under_way(&mut self) -> Result<bool, TransferError> {
        self.is("SELECT to_regclass('transfer_progress') IS NOT NULL").await
    }

    async fn refuse_data(&mut self) -> Result<(), TransferError> {
        for table in TABLES.iter().map(|table| table.name).chain(["account_locks"]) {
            let is_there = self.is(&format!("SELECT to_regclass('{table}') IS NOT NULL")).await?;
            if is_there && self.is(&format!("SELECT EXISTS (SELECT 1 FROM {table})")).await? {
                return Err(TransferError::HasData { address: self.address.clone(), table });
            }
        }
        Ok(())
    }

    async fn begin(&mut self, source: [u8; 32]) -> Result<(), TransferError> {
        self.run("BEGIN").await?;
        self.run(
            "CREATE TABLE transfer_progress (
                 name      text PRIMARY KEY,
                 source    bytea NOT NULL,
                 last_key  bytea,
                 copied    bigint NOT NULL DEFAULT 0,
                 is_done   boolean NOT NULL DEFAULT false)",
        )
        .await?;
        self.refuse_data().await?;
        let names: Vec<&str> = TABLES.iter().map(|table| table.name).chain([BYTES_OF_ATTACHMENTS]).collect();
        let insert =
            sqlx::query("INSERT INTO transfer_progress (name, source) SELECT name, $2 FROM unnest($1) AS name");
        let insert = insert.bind(names).bind(&source[..]);
        timely(BATCH_LIMIT, insert.execute(&mut self.connection)).await?;
        self.run("COMMIT").await
    }

    async fn refuse_another_source(&mut self, source: [u8; 32]) -> Result<(), TransferError> {
        let question = "SELECT NOT EXISTS (SELECT 1 FROM transfer_progress WHERE source <> $1)";
        let is_ours = sqlx::query_scalar(question).bind(&source[..]);
        if timely(BATCH_LIMIT, is_ours.fetch_one(&mut self.connection)).await? {
            return Ok(());
        }
        Err(TransferError::OtherSource { address: self.address.clone() })
    }

    pub(super) async fn progress(&mut self, name: &str) -> Result<Progress, TransferError> {
        let question = "SELECT last_key, copied, is_done FROM transfer_progress WHERE name = $1";
        let find = sqlx::query_as(question).bind(name);
        let (last, copied, is_done): (_, i64, _) = timely(BATCH_LIMIT, find.fetch_one(&mut self.connection)).await?;
        Ok(Progress { last, copied: copied.unsigned_abs(), is_done })
    }

    /// Writes how far something has come. It must not be less than what has arrived for good.
    pub(super) async fn note(&mut self, name: &str, progress: &Progress) -> Result<(), TransferError> {
        let statement = "UPDATE transfer_progress SET last_key = $2, copied = $3, is_done = $4 WHERE name = $1";
        let note = sqlx::query(statement).bind(name).bind(progress.last.as_deref());
        let note = note.bind(i64::try_from(progress.copied).unwrap_or(i64::MAX)).bind(progress.is_done);
        timely(BATCH_LIMIT, note.execute(&mut self.connection)).await.map(drop)
    }

    /// Takes in a batch and writes down that it has arrived.
    pub(super) async fn insert(&mut self, table: &Table, batch: &Batch, then: &Progress) -> Result<(), TransferError> {
        self.run("BEGIN").await?;
        let connection = &mut self.connection;
        let copying = async {
            let mut copy = connection.copy_in_raw(&table.copy_in()).await?;
            copy.send(HEADER).await?;
            copy.send(&batch.rows[..]).await?;
            copy.send(TRAILER).await?;
            copy.finish().await
        };
        timely(BATCH_LIMIT, copying).await.map_err(|error| error.about(table.name))?;
        self.note(table.name, then).await?;
        self.run("COMMIT").await
    }

    /// How many rows there are, and the checksum over all of them in the order of the key.
    pub(super) async fn checksum(&mut self, table: &Table) -> Result<(u64, [u8; 32]), TransferError> {
        // The key's index gives the order. To sort large bodies would take a disk of its own.
        self.run("SET enable_sort = off").await?;
        let count = format!("SELECT COUNT(*) FROM {}", table.name);
        let count = sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(&mut self.connection);
        let count: i64 = timely(WHOLE_LIMIT, count).await?;
        let statement = table.copy_out();
        let mut rows = timely(BATCH_LIMIT, self.connection.copy_out_raw(&statement)).await?;
        let mut hash = Sha256::new();
        while let Some(bytes) = timely(BATCH_LIMIT, rows.try_next()).await? {
            hash.update(&bytes);
        }
        Ok((count.unsigned_abs(), hash.finalize().into()))
    }

    /// Tells PostgreSQL how much is where now, before a query needs it.
    pub(super) async fn analyze(&mut self) -> Result<(), TransferError> {
        let names: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
        self.run_whole(&format!("ANALYZE {}", names.join(", "))).await
    }

    /// The last transaction: what PostgreSQL has beside the tables, and the end of the transfer.
    pub(super) async fn finish(&mut self, numbers: &Numbers) -> Result<(), TransferError> {
        self.run("BEGIN").await?;
        self.run_whole(
            "INSERT INTO account_locks (user_id, at_most, bytes_of, bytes_at_most)
             SELECT u.id, COALESCE(MAX(w.waiting), 0), COALESCE(MAX(w.waiting), 0), COALESCE(MAX(w.bytes), 0) FROM users u
             LEFT JOIN devices d ON d.user_id = u.id
             LEFT JOIN (SELECT device_no, COUNT(*) AS waiting, SUM(octet_length(body))::bigint AS bytes
                        FROM messages GROUP BY device_no) w ON w.device_no = d.no
             GROUP BY u.id",
        )
        .await?;
        let sequences = [
            ("pg_get_serial_sequence('devices', 'no')", numbers.device),
            ("pg_get_serial_sequence('one_time_prekeys', 'no')", numbers.prekey),
            ("'message_blocks'", numbers.position),
        ];
        for (sequence, last) in sequences {
            // A sequence that has given nothing yet starts with 1, and counts up from what it has given.
            let statement = format!("SELECT setval({sequence}, {}, {})", last.max(1), last > 0);
            self.run(&statement).await?;
        }
        self.run("DROP TABLE transfer_progress").await?;
        self.run("COMMIT").await
    }

    pub(super) async fn close(self) {
        // Everything is committed, so nothing is lost by a connection that doesn't close properly.
        let _ = tokio::time::timeout(PAUSE, self.connection.close()).await;
    }

    async fn is(&mut self, question: &str) -> Result<bool, TransferError> {
        let question = sqlx::query_scalar(AssertSqlSafe(question.to_owned()));
        timely(BATCH_LIMIT, question.fetch_one(&mut self.connection)).await
    }

    async fn run(&mut self, statement: &str) -> Result<(), TransferError> {
        let statement = sqlx::query(AssertSqlSafe(statement.to_owned()));
        timely(BATCH_LIMIT, statement.execute(&mut self.connection)).await.map(drop)
    }

    /// The same for what may take long in a large database.
    async fn run_whole(&mut self, statement: &str) -> Result<(), TransferError> {
        let statement = sqlx::query(AssertSqlSafe(statement.to_owned()));
        timely(WHOLE_LIMIT, statement.execute(&mut self.connection)).await.map(drop)
    }
}

/// What the sides of the comparison have in common: the checksum of no rows, to be fed with them.
pub(super) fn begin_checksum() -> Sha256 {
    Sha256::new_with_prefix(HEADER)
}

pub(super) fn end_checksum(mut hash: Sha256) -> [u8; 32] {
    hash.update(TRAILER);
    hash.finalize().into()
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

async fn timely<T>(limit: Duration, answer: impl Future<Output = sqlx::Result<T>>) -> Result<T, TransferError> {
    let answer = tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| Err(timed_out()));
    answer.map_err(|cause| {
        let error = StoreError(cause);
        let is_lost = error.is_lost_connection();
        let StoreError(cause) = error;
        if is_lost { TransferError::Lost { cause } } else { TransferError::Refused { table: None, cause } }
    })
}

impl TransferError {
    /// Says which table it was about, where that isn't said yet.
    fn about(self, table: &'static str) -> Self {
        match self {
            Self::Refused { cause, .. } => Self::Refused { table: Some(table), cause },
            other => other,
        }
    }
}
