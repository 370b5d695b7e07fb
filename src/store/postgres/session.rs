//! The settings of a connection to PostgreSQL, and the check that it has them.
//!
//! A pooler between the server and PostgreSQL may drop what a client asks for as it connects, and may give each transaction
//! another connection of the database. So settings are made by a statement, and read back in a second one, which has to
//! meet the same backend process.

use std::fmt::Write;
use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};

use crate::store::pool::Poolable;
use crate::store::postgres::takes_no_writes;

/// True for a replica, and for a server that was set to read-only.
pub(super) const TAKES_NO_WRITES: &str = "pg_is_in_recovery() OR current_setting('transaction_read_only')::bool";
/// True for a connection that can be borrowed: it takes writes, and has kept the setting on which the promise to store depends.
const IS_USABLE: &str = "SELECT NOT (pg_is_in_recovery() OR current_setting('transaction_read_only')::bool)
     AND current_setting('synchronous_commit') = 'on'";
/// How often the processes of two connections are compared. A pooler that has other clients may hand another process to
/// the second connection by chance.
const ROUNDS: u32 = 4;

/// Settings that a connection has to have, by name.
#[derive(Clone, Debug)]
pub(in crate::store) struct Settings(Arc<[(&'static str, String)]>);

impl Settings {
    /// These and no notices below a warning.
    pub(in crate::store) fn new(settings: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        Self(settings.into_iter().chain([("client_min_messages", "warning".to_owned())]).collect())
    }

    /// Makes the settings, and fails unless they hold. Two round trips.
    pub(in crate::store) async fn make(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let one = |name: &str, value: &str| format!("set_config('{name}', '{}', false)", value.replace('\'', "''"));
        // Statements that another client of a pooler has prepared would be in the way of ours.
        let made = format!("DEALLOCATE ALL; {}", self.question(one));
        let read = self.question(|name, _| format!("current_setting('{name}')"));
        let made = Self::ask(connection, made).await?;
        if Self::ask(connection, read).await? != made {
            return Err(sqlx::Error::Protocol("a pooler does not keep the settings of a connection".into()));
        }
        Ok(())
    }

    /// Asks for the process behind the connection, and for each setting by the expression `of`.
    fn question(&self, of: impl Fn(&str, &str) -> String) -> String {
        let mut question = String::from("SELECT pg_backend_pid()::text");
        for (name, value) in &*self.0 {
            let _ = write!(question, ", {}", of(name, value));
        }
        question
    }

    async fn ask(connection: &mut PgConnection, question: String) -> sqlx::Result<Vec<String>> {
        let row: PgRow = sqlx::raw_sql(AssertSqlSafe(question)).fetch_one(connection).await?;
        (0..row.len()).map(|column| row.try_get(column)).collect()
    }
}

/// Whether two open connections keep a process of the database each, as they do without a pooler and with one that pools
/// sessions. They don't if both have met the same one, or one of them has met two.
pub(super) async fn are_sessions(first: &mut PgConnection, second: &mut PgConnection) -> sqlx::Result<bool> {
    let processes = Settings(Arc::default()).question(|_, _| String::new());
    let of_first = Settings::ask(first, processes.clone()).await?;
    let of_second = Settings::ask(second, processes.clone()).await?;
    let mut are_sessions = of_first != of_second;
    for _ in 1..ROUNDS {
        are_sessions &= Settings::ask(first, processes.clone()).await? == of_first;
        are_sessions &= Settings::ask(second, processes.clone()).await? == of_second;
    }
    Ok(are_sessions)
}

/// Whether a transaction can be begun at all: a pooler of single statements refuses that.
pub(super) async fn can_begin(connection: &mut PgConnection) -> bool {
    let begun = sqlx::raw_sql("BEGIN").execute(&mut *connection).await;
    begun.is_ok() && sqlx::raw_sql("COMMIT").execute(connection).await.is_ok()
}

impl Poolable for Postgres {
    type Settings = Settings;

    async fn prepare(connection: &mut PgConnection, settings: &Settings) -> sqlx::Result<()> {
        settings.make(connection).await?;
        let question = AssertSqlSafe(format!("SELECT {TAKES_NO_WRITES}"));
        if sqlx::query_scalar(question).fetch_one(connection).await? {
            return Err(takes_no_writes());
        }
        Ok(())
    }

    async fn is_usable(connection: &mut PgConnection) -> bool {
        matches!(sqlx::query_scalar(IS_USABLE).fetch_one(connection).await, Ok(true))
    }
}
