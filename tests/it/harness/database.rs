//! A second connection to a server's database, to see what is really there and to stand in its way.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use obscura_server::config;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions};
use sqlx::types::Uuid;
use sqlx::{AssertSqlSafe, ConnectOptions, Postgres, Sqlite};

use super::{Device, deployment};

/// The database of a server.
pub enum Database {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// Runs the same on either.
macro_rules! on {
    ($database:expr, |$pool:ident| $body:expr) => {
        match $database {
            Database::Sqlite($pool) => $body,
            Database::Postgres($pool) => $body,
        }
    };
}

impl Database {
    /// The database of the server on this folder.
    pub async fn of(folder: &Path) -> Self {
        Self::open(&deployment::database_config(folder).await).await
    }

    /// The database of the embedded server on this folder, whatever this run is about.
    pub async fn of_embedded(folder: &Path) -> Self {
        Self::open(&config::Config::embedded(folder).expect("the defaults are allowed").database).await
    }

    /// The database that a server with this configuration uses. It has to exist.
    pub async fn open(config: &config::Database) -> Self {
        match config.file() {
            Some(file) => {
                let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(20));
                // Statements of tests have ids in them, those of servers never.
                let options = options.disable_statement_logging();
                let pool = SqlitePoolOptions::new().max_connections(3).connect_with(options).await;
                Self::Sqlite(pool.expect("the database opens"))
            }
            None => {
                let options =
                    PgConnectOptions::from_str(config.url.expose()).expect("a URL").disable_statement_logging();
                let pool = PgPoolOptions::new().max_connections(3).connect_with(options).await;
                Self::Postgres(pool.expect("the database opens"))
            }
        }
    }

    /// The one number that this query answers.
    pub async fn number(&self, query: &str) -> i64 {
        let query = AssertSqlSafe(match self {
            Self::Sqlite(_) => query.to_owned(),
            Self::Postgres(_) => format!("SELECT ({query})::bigint"),
        });
        on!(self, |pool| sqlx::query_scalar(query).fetch_one(pool).await).expect("a number")
    }

    /// How a statement names this id.
    pub fn literal(&self, id: Uuid) -> String {
        match self {
            Self::Sqlite(_) => format!("x'{}'", id.simple()),
            Self::Postgres(_) => format!("'{id}'::uuid"),
        }
    }

    /// The one text that this query answers.
    pub async fn text(&self, query: &str) -> String {
        let query = AssertSqlSafe(query.to_owned());
        on!(self, |pool| sqlx::query_scalar(query).fetch_one(pool).await).expect("a text")
    }

    /// The ids of all queued messages.
    pub async fn message_ids(&self) -> BTreeSet<Bytes> {
        let query = "SELECT id FROM messages";
        let ids: Vec<Uuid> = on!(self, |pool| sqlx::query_scalar(query).fetch_all(pool).await).expect("the ids");
        ids.into_iter().map(|id| Bytes::copy_from_slice(id.as_bytes())).collect()
    }

    /// Everything in all tables as one text, to see that nothing has changed.
    pub async fn everything(&self) -> String {
        let mut everything = String::new();
        for table in self.tables().await {
            let rows = match self {
                Self::Sqlite(_) => {
                    let columns = format!(
                        "SELECT group_concat('quote(' || name || ')', ' || '','' || ') FROM pragma_table_info('{table}')"
                    );
                    let columns = self.text(&columns).await;
                    format!("SELECT coalesce(group_concat({columns}, char(10)), '') FROM {table}")
                }
                Self::Postgres(_) => {
                    format!("SELECT coalesce(string_agg(t::text, chr(10) ORDER BY t::text), '') FROM {table} t")
                }
            };
            everything += &format!("{table}\n{}\n", self.text(&rows).await);
        }
        everything
    }

    /// The names of all tables but those of the repeated jobs and of the time, which go on by themselves.
    async fn tables(&self) -> Vec<String> {
        let query = match self {
            Self::Sqlite(_) => {
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name <> 'server_time' ORDER BY name"
            }
            Self::Postgres(_) => {
                "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' AND tablename NOT IN ('jobs', 'server_time') ORDER BY 1"
            }
        };
        on!(self, |pool| sqlx::query_scalar(query).fetch_all(pool).await).expect("the tables")
    }

    /// Runs a statement.
    pub async fn execute(&self, statement: &str) {
        let statement = AssertSqlSafe(statement.to_owned());
        match self {
            Self::Sqlite(pool) => drop(sqlx::raw_sql(statement).execute(pool).await.expect("the statement runs")),
            Self::Postgres(pool) => drop(sqlx::raw_sql(statement).execute(pool).await.expect("the statement runs")),
        }
    }

    /// How many messages wait for a device.
    pub async fn queued(&self, device: &Device) -> i64 {
        let query = "SELECT count(*) FROM messages JOIN devices ON no = device_no WHERE devices.id = $1";
        on!(self, |pool| sqlx::query_scalar(query).bind(device.id).fetch_one(pool).await).expect("a count")
    }

    /// Begins a transaction that keeps every other writer waiting until it is released.
    pub async fn hold_write(&self) -> HeldWrite {
        match self {
            Self::Sqlite(pool) => {
                let mut connection = pool.acquire().await.expect("a connection");
                sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *connection).await.expect("the lock");
                HeldWrite::Sqlite(connection)
            }
            Self::Postgres(pool) => {
                let lock = format!("BEGIN; LOCK TABLE {} IN EXCLUSIVE MODE", self.tables().await.join(", "));
                let mut connection = pool.acquire().await.expect("a connection");
                sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *connection).await.expect("the lock");
                HeldWrite::Postgres(connection)
            }
        }
    }

    /// Locks an account in PostgreSQL, as a group of another node does that writes to it.
    pub async fn hold_account(&self, user: Uuid) -> HeldWrite {
        self.hold(&format!("SELECT 1 FROM account_locks WHERE user_id = '{user}' FOR UPDATE")).await
    }

    /// Runs a statement in PostgreSQL whose transaction stays open until it is released.
    pub async fn hold(&self, statement: &str) -> HeldWrite {
        let Self::Postgres(pool) = self else { panic!("only PostgreSQL has locks of rows") };
        let mut connection = pool.acquire().await.expect("a connection");
        let statement = AssertSqlSafe(format!("BEGIN; {statement}"));
        sqlx::raw_sql(statement).execute(&mut *connection).await.expect("the statement runs");
        HeldWrite::Postgres(connection)
    }

    /// Closes the connections.
    pub async fn close(self) {
        on!(self, |pool| pool.close().await);
    }
}

/// An open transaction.
pub enum HeldWrite {
    Sqlite(PoolConnection<Sqlite>),
    Postgres(PoolConnection<Postgres>),
}

impl HeldWrite {
    /// Commits.
    pub async fn release(self) {
        let done = match self {
            Self::Sqlite(mut connection) => sqlx::raw_sql("COMMIT").execute(&mut *connection).await.map(|_| ()),
            Self::Postgres(mut connection) => sqlx::raw_sql("COMMIT").execute(&mut *connection).await.map(|_| ()),
        };
        done.expect("the commit");
    }
}
