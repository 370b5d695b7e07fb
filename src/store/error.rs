//! What can go wrong with the database: while it is used, and while it is opened.

use std::io::ErrorKind;

use sqlx::migrate::{MigrateError, Migrator};

use crate::store::sqlite::{self, SQLITE_FULL};

/// The database could not do what it was asked: it is away, busy for too long, full, or broken.
///
/// What may well happen (an unknown user, a taken name) is a value and not this error.
#[derive(Debug, thiserror::Error)]
#[error("the database failed: {0}")]
pub struct StoreError(#[from] pub(super) sqlx::Error);

impl StoreError {
    /// True when the disk or a size limit stopped a write.
    pub fn is_full(&self) -> bool {
        // SQLite's code without the extension bits.
        let is_full_sqlite = sqlite::result_code(self).map(|code| code & 0xff) == Some(SQLITE_FULL);
        let is_full_elsewhere = matches!(&self.0, sqlx::Error::Io(error) if error.kind() == ErrorKind::StorageFull);
        is_full_sqlite || is_full_elsewhere || self.sqlstate() == Some("53100")
    }

    /// A copy for other requests that wait for the same answer: with the same text, and full if this one is.
    pub(super) fn duplicate(&self) -> Self {
        Self(match self.is_full() {
            true => sqlx::Error::Io(std::io::Error::new(ErrorKind::StorageFull, self.0.to_string())),
            false => sqlx::Error::Protocol(self.0.to_string()),
        })
    }

    /// True when another transaction held a row for too long.
    pub(super) fn is_lock_timeout(&self) -> bool {
        self.sqlstate() == Some("55P03")
    }

    /// True when another transaction was in the way, so that the same one may succeed when it is tried again.
    pub(super) fn is_serialization_conflict(&self) -> bool {
        matches!(self.sqlstate(), Some("40001" | "40P01"))
    }

    /// True when the database has no table of this name.
    pub(super) fn is_without_table(&self) -> bool {
        self.sqlstate() == Some("42P01")
    }

    /// True when the state of the connection is not known.
    pub(super) fn is_lost_connection(&self) -> bool {
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
    pub(super) fn sqlstate(&self) -> Option<&str> {
        let error = self.0.as_database_error()?;
        Some(error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>()?.code())
    }
}

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
    Unreachable {
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
        matches!(self, Self::Unreachable { .. })
    }

    /// Distinguishes a server that isn't there from one that refuses us and from one that we can't use.
    pub(super) fn connecting(address: String, cause: sqlx::Error) -> Self {
        let Some(error) = cause.as_database_error() else {
            return match cause {
                sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
                    Self::Unfit { address, cause }
                }
                cause => Self::Unreachable { address, cause },
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
            Self::Unreachable { address, cause }
        } else {
            Self::Unfit { address, cause }
        }
    }
}

pub(super) fn migration_error(database: String, migrations: &Migrator, cause: MigrateError) -> OpenError {
    match cause {
        MigrateError::VersionMissing(found) => {
            let known = migrations.iter().map(|migration| migration.version).max().unwrap_or_default();
            OpenError::Newer { database, found, known }
        }
        cause => OpenError::Migration { database, cause },
    }
}
