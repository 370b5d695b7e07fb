//! The newest time that was seen, remembered for the next start; and the clock of the database server, to compare with.

use std::time::Duration;

use sqlx::FromRow;

use crate::clock::Timestamp;
use crate::store::database::{reading, run};
use crate::store::{Result, Store};

/// Times are remembered in steps of this.
const STEP: Duration = Duration::from_mins(1);

/// The time of PostgreSQL's machine, in Unix milliseconds.
const SERVER_TIME: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";

/// What the database knows about the time.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct StoredTime {
    /// The newest time that any node has remembered, in whole minutes.
    #[sqlx(rename = "seen_at")]
    pub at: Timestamp,
    /// Random; another one is another database.
    pub database_id: Vec<u8>,
    /// How often the time was set by [`Store::set_time`], which may set it back.
    pub confirmations: i64,
    /// The time of the database server. SQLite has no clock of its own.
    pub server: Option<Timestamp>,
}

impl Store {
    /// What the database knows about the time; `None` if it has never been told, or if it has none of our tables.
    pub async fn stored_time(&self) -> Result<Option<StoredTime>> {
        let server = if self.is_exclusive() { "NULL" } else { SERVER_TIME };
        let statement = format!("SELECT seen_at, database_id, confirmations, {server} AS server FROM server_time");
        match reading!(self, |db| sqlx::query_as(sqlx::AssertSqlSafe(statement.as_str())).fetch_optional(db)) {
            Err(error) if error.is_without_table() => Ok(None),
            seen => seen,
        }
    }

    /// The time of the database server. SQLite has no clock of its own.
    pub async fn server_time(&self) -> Result<Option<Timestamp>> {
        if self.is_exclusive() {
            return Ok(None);
        }
        let statement = format!("SELECT {SERVER_TIME}");
        reading!(self, |db| sqlx::query_scalar(sqlx::AssertSqlSafe(statement.as_str())).fetch_one(db))
    }

    /// Remembers that it is `now`, unless a later time is remembered. The first call gives the database its id.
    pub async fn store_time(&self, now: Timestamp) -> Result<()> {
        let statement = "INSERT INTO server_time (id, seen_at, database_id, confirmations) VALUES (1, $1, $2, 0) \
                         ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at \
                         WHERE server_time.seen_at < excluded.seen_at";
        self.write_time(statement, now).await
    }

    /// Sets the remembered time, also back. Every node whose clock has the same time then believes its clock.
    pub async fn set_time(&self, now: Timestamp) -> Result<()> {
        let statement = "INSERT INTO server_time (id, seen_at, database_id, confirmations) VALUES (1, $1, $2, 1) \
                         ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, \
                         confirmations = server_time.confirmations + 1";
        self.write_time(statement, now).await
    }

    async fn write_time(&self, statement: &'static str, now: Timestamp) -> Result<()> {
        let minute = STEP.as_millis() as i64;
        let now = Timestamp::from_millis(now.millis().div_euclid(minute) * minute);
        let id: [u8; 16] = rand::random();
        let mut tx = self.begin().await?;
        run!(&mut tx, sqlx::query(statement).bind(now).bind(&id[..]))?;
        tx.commit().await
    }
}
