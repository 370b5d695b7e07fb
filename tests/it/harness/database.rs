//! A second connection to a server's database, to see what is really there and to stand in its way.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Sqlite};

use super::Device;

/// The database of a server.
pub struct Database {
    pool: SqlitePool,
}

impl Database {
    /// Opens the file, which has to exist.
    pub async fn open(file: &Path) -> Self {
        let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(20));
        let pool = SqlitePoolOptions::new().max_connections(3).connect_with(options).await.expect("the database opens");
        Self { pool }
    }

    /// The one number that this query answers.
    pub async fn number(&self, query: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&self.pool).await.expect("a number")
    }

    /// The one text that this query answers.
    pub async fn text(&self, query: &str) -> String {
        sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&self.pool).await.expect("a text")
    }

    /// The ids of all queued messages.
    pub async fn message_ids(&self) -> BTreeSet<Bytes> {
        let ids: Vec<Vec<u8>> =
            sqlx::query_scalar("SELECT id FROM messages").fetch_all(&self.pool).await.expect("the ids");
        ids.into_iter().map(Bytes::from).collect()
    }

    /// Everything in all tables as one text, to see that nothing has changed.
    pub async fn everything(&self) -> String {
        let tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name";
        let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&self.pool).await.expect("the tables");
        let mut everything = String::new();
        for table in tables {
            let columns = format!(
                "SELECT group_concat('quote(' || name || ')', ' || '','' || ') FROM pragma_table_info('{table}')"
            );
            let columns = self.text(&columns).await;
            let rows = format!("SELECT coalesce(group_concat({columns}, char(10)), '') FROM {table}");
            everything += &format!("{table}\n{}\n", self.text(&rows).await);
        }
        everything
    }

    /// Runs a statement.
    pub async fn execute(&self, statement: &str) {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&self.pool).await.expect("the statement runs");
    }

    /// How many messages wait for a device.
    pub async fn queued(&self, device: &Device) -> i64 {
        let query = "SELECT count(*) FROM messages JOIN devices ON no = device_no WHERE devices.id = $1";
        sqlx::query_scalar(query).bind(device.id).fetch_one(&self.pool).await.expect("a count")
    }

    /// Begins a transaction that keeps every other writer waiting until it is released.
    pub async fn hold_write(&self) -> HeldWrite {
        let mut connection = self.pool.acquire().await.expect("a connection");
        sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *connection).await.expect("the lock");
        HeldWrite { connection }
    }

    /// Closes the connections.
    pub async fn close(self) {
        self.pool.close().await;
    }
}

/// An open transaction.
pub struct HeldWrite {
    connection: PoolConnection<Sqlite>,
}

impl HeldWrite {
    /// Commits.
    pub async fn release(mut self) {
        sqlx::raw_sql("COMMIT").execute(&mut *self.connection).await.expect("the commit");
    }
}
