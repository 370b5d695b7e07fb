//! The database under a server of our own: made empty, and filled where that would take hours over HTTP.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

const FILL_SQLITE: &str = include_str!("../fill-sqlite.sql");
const FILL_POSTGRES: &str = include_str!("../fill-postgres.sql");

/// Where the rows are.
#[derive(Clone, Debug)]
pub enum Database {
    Sqlite(PathBuf),
    Postgres(String),
}

/// Rows to add, as a server would have made them.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub users: usize,
    /// In the inbox of each of these users.
    pub messages_each: usize,
    /// Bytes of a message.
    pub size: usize,
}

impl Database {
    /// In the folder of an embedded server.
    pub fn in_folder(folder: &Path) -> Self {
        Self::Sqlite(folder.join("obscura.db"))
    }

    /// A new one beside the one that `url` names.
    pub async fn create(url: &str, name: &str) -> Result<Self> {
        let mut connection = PgConnection::connect(url).await.context("no connection to PostgreSQL")?;
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut connection).await?;
        connection.close().await?;
        let (before, parameters) =
            url.split_once('?').map_or((url, String::new()), |(url, more)| (url, format!("?{more}")));
        let server = before.rsplit_once('/').context("the URL of PostgreSQL names no database")?.0;
        Ok(Self::Postgres(format!("{server}/{name}{parameters}")))
    }

    /// Removes what [`Self::create`] has made.
    pub async fn remove(url: &str, name: &str) -> Result<()> {
        let mut connection = PgConnection::connect(url).await?;
        sqlx::query(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// Adds rows while no server uses the database, and answers how long that took.
    pub async fn fill(&self, rows: Rows) -> Result<Duration> {
        let began = Instant::now();
        match self {
            Self::Sqlite(path) => {
                // What is filled for a measurement may be lost in a power cut.
                let options = SqliteConnectOptions::new().filename(path).synchronous(SqliteSynchronous::Off);
                let mut connection = options.connect().await?;
                sqlx::raw_sql(AssertSqlSafe(rows.in_script(FILL_SQLITE))).execute(&mut connection).await?;
                connection.close().await?;
            }
            Self::Postgres(url) => {
                let mut connection = url.parse::<PgConnectOptions>()?.connect().await?;
                sqlx::raw_sql(AssertSqlSafe(rows.in_script(FILL_POSTGRES))).execute(&mut connection).await?;
                connection.close().await?;
            }
        }
        Ok(began.elapsed())
    }
}

impl Rows {
    /// The script with these numbers in place of its variables.
    fn in_script(&self, script: &str) -> String {
        script
            .replace(":users", &self.users.to_string())
            .replace(":messages_each", &self.messages_each.to_string())
            .replace(":size", &self.size.to_string())
            .replace(":now", &now_millis().to_string())
    }
}

/// Unix milliseconds.
#[expect(
    clippy::disallowed_methods,
    reason = "the server's clock is the server's; this tool needs the time for what it fills in and when a run ended"
)]
pub fn now_millis() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis()
}
