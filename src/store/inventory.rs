//! What the database holds, for the operator.

use sqlx::FromRow;

use crate::store::database::Database;
use crate::store::{Result, Store};

/// How many there are of what is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromRow)]
pub struct Inventory {
    /// Accounts.
    pub users: i64,
    /// Devices.
    pub devices: i64,
    /// Messages that wait in the inboxes.
    pub messages: i64,
    /// Bytes that a message has on average: of the oldest and the newest that wait.
    pub message_bytes: i64,
    /// When the oldest of them was received, in Unix milliseconds; zero when there is none.
    pub oldest: i64,
    /// Attachments, uploads under way included.
    pub attachments: i64,
    /// Their bytes.
    pub attachment_bytes: i64,
    /// Devices that can be woken.
    pub push_tokens: i64,
}

impl Store {
    /// Counts everything once, on a connection that no request waits for. Numbers come from indexes where that is best; the
    /// bytes of messages, which no index has, are known from a thousand of them.
    pub async fn inventory(&self) -> Result<Inventory> {
        match &self.database {
            Database::Sqlite(sqlite) => Ok(sqlx::query_as(COUNT).fetch_one(&mut *sqlite.read.get().await?).await?),
            Database::Postgres(postgres) => {
                let mut tx = postgres.begin_count().await?;
                let counted = tx.all(sqlx::query_as(COUNT)).await?.pop();
                tx.end("COMMIT").await?;
                counted.ok_or_else(|| sqlx::Error::RowNotFound.into())
            }
        }
    }
}

/// The length of a body is read without the body.
const COUNT: &str = "\
    SELECT (SELECT COUNT(*) FROM users) AS users, \
           (SELECT COUNT(*) FROM devices) AS devices, \
           (SELECT COUNT(*) FROM messages) AS messages, \
           (SELECT CAST(COALESCE(AVG(size), 0) AS BIGINT) FROM ( \
                SELECT * FROM (SELECT LENGTH(body) AS size FROM messages ORDER BY received_at LIMIT 500) oldest \
                UNION ALL \
                SELECT * FROM (SELECT LENGTH(body) AS size FROM messages ORDER BY received_at DESC LIMIT 500) newest \
           ) sample) AS message_bytes, \
           (SELECT COALESCE(MIN(received_at), 0) FROM messages) AS oldest, \
           (SELECT COUNT(*) FROM attachments) AS attachments, \
           (SELECT CAST(COALESCE(SUM(size), 0) AS BIGINT) FROM attachments) AS attachment_bytes, \
           (SELECT COUNT(*) FROM push_tokens) AS push_tokens";
