//! The database of a stopped embedded server, read without changing a byte of it.
//!
//! A server that was stopped in order has folded its write-ahead log into the file and removed it: then the file is
//! opened as one that can't change, and SQLite puts nothing beside it. A server that was killed has left the log and
//! its index (`-wal` and `-shm`). Then SQLite is told that it may not write the index either (`readonly_shm`); it makes
//! one of its own in memory and reads the log through that. To copy or fold the log would cost space or change the
//! source. Only a log without its index can't be read so.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};

use crate::model::ids::AttachmentId;
use crate::store::sqlite::MIGRATIONS;
use crate::store::transfer::TransferError;
use crate::store::transfer::table::{KeyValue, Table, Unfit};

/// A batch ends when it has so many bytes, so it has at most one large message more.
const BATCH_BYTES: usize = 4 << 20;
/// Or so many rows.
const BATCH_ROWS: u64 = 5_000;
/// Rows that wait between SQLite's thread and us, each perhaps a large message.
const ROWS_AHEAD: usize = 4;

/// A database that is only read.
pub(super) struct Source {
    connection: SqliteConnection,
    path: String,
    /// The checksum of the files. No other database has it, nor this one once a server has run on it.
    pub(super) identity: [u8; 32],
}

/// Some rows of a table, in the order of the key.
#[derive(Default)]
pub(super) struct Batch {
    /// In the form of `Table::encode`.
    pub(super) rows: Vec<u8>,
    pub(super) count: u64,
    /// The key of the last one.
    pub(super) last: Option<Vec<u8>>,
}

/// The highest numbers that were ever given.
pub(super) struct Numbers {
    pub(super) device: i64,
    pub(super) prekey: i64,
    pub(super) position: i64,
}

impl Source {
    pub(super) async fn open(file: &Path) -> Result<Self, TransferError> {
        let path = file.display().to_string();
        let unreadable = |cause: io::Error| TransferError::Source { path: path.clone(), cause: cause.into() };
        let log = beside(file, "-wal");
        let has_log = log.metadata().is_ok_and(|log| log.len() > 0);
        if has_log && !beside(file, "-shm").exists() {
            return Err(TransferError::LogAlone { path });
        }
        let files = if has_log { vec![file.to_owned(), log] } else { vec![file.to_owned()] };
        let hashed = tokio::task::spawn_blocking(move || checksum(&files)).await;
        let identity = hashed.map_err(io::Error::other).and_then(|hashed| hashed).map_err(unreadable)?;
        let options = SqliteConnectOptions::new().read_only(true).row_buffer_size(ROWS_AHEAD);
        let options = if has_log {
            let file = std::path::absolute(file).map_err(unreadable)?;
            options.filename(format!("file:{}?mode=ro&readonly_shm=1", in_url(&file)))
        } else {
            options.filename(file).immutable(true)
        };
        let failed = |cause| TransferError::Source { path: path.clone(), cause };
        let mut connection = options.connect().await.map_err(failed)?;
        // One state from here to the end. With a log it also means that the log is looked through once only.
        sqlx::query("BEGIN").execute(&mut connection).await.map_err(failed)?;
        let mut source = Self { connection, path, identity };
        source.check_version().await?;
        Ok(source)
    }

    /// Refuses a database whose tables are not those that this version knows.
    async fn check_version(&mut self) -> Result<(), TransferError> {
        let ours = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('_sqlx_migrations', 'users', 'messages')";
        let ours: i64 = self.number(ours).await?;
        if ours != 3 {
            return Err(TransferError::NotOurs { path: self.path.clone() });
        }
        let found = self.number("SELECT COALESCE(MAX(version), 0) FROM _sqlx_migrations WHERE success").await?;
        let known = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
        let path = self.path.clone();
        match found.cmp(&known) {
            std::cmp::Ordering::Less => Err(TransferError::Older { path, found, known }),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(TransferError::Newer { path, found, known }),
        }
    }

    /// How many rows a table has.
    pub(super) async fn count(&mut self, table: &Table) -> Result<u64, TransferError> {
        let count = format!("SELECT COUNT(*) FROM {}", table.name);
        Ok(self.number(&count).await?.unsigned_abs())
    }

    /// The rows behind a key that an earlier batch ended with, or the first ones. None when there are no more.
    pub(super) async fn batch(&mut self, table: &Table, behind: Option<&[u8]>) -> Result<Batch, TransferError> {
        let failed = |cause| TransferError::Source { path: self.path.clone(), cause };
        let unfit = |Unfit(column)| TransferError::Unfit { table: table.name, column };
        let statement = table.select(behind.is_some());
        let mut query = sqlx::query(AssertSqlSafe(statement));
        if let Some(behind) = behind {
            let key = table.key_values(behind).ok_or(TransferError::Unfit { table: table.name, column: "last key" })?;
            for value in key {
                query = match value {
                    KeyValue::Number(number) => query.bind(number),
                    KeyValue::Bytes(bytes) => query.bind(bytes),
                };
            }
        }
        let mut batch = Batch::default();
        let mut rows = query.fetch(&mut self.connection);
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            table.encode(&row, &mut batch.rows).map_err(unfit)?;
            batch.count += 1;
            batch.last = Some(table.key_of(&row).map_err(unfit)?);
            if batch.rows.len() >= BATCH_BYTES || batch.count >= BATCH_ROWS {
                break;
            }
        }
        Ok(batch)
    }

    pub(super) async fn numbers(&mut self) -> Result<Numbers, TransferError> {
        let mut given = async |table: &str, column: &str| {
            self.number(&format!(
                "SELECT MAX(COALESCE((SELECT seq FROM sqlite_sequence WHERE name = '{table}'), 0), \
                 COALESCE((SELECT MAX({column}) FROM {table}), 0))"
            ))
            .await
        };
        let (device, prekey) = (given("devices", "no").await?, given("one_time_prekeys", "no").await?);
        let position = given("messages", "position").await?;
        let answered = self.number("SELECT COALESCE(MAX(last_position), 0) FROM sends").await?;
        Ok(Numbers { device, prekey, position: position.max(answered) })
    }

    /// How many attachments have bytes.
    pub(super) async fn attachment_count(&mut self) -> Result<u64, TransferError> {
        Ok(self.number("SELECT COUNT(*) FROM attachments WHERE stored = 1").await?.unsigned_abs())
    }

    /// Some attachments that have bytes, each with its size, in the order of their ids.
    pub(super) async fn attachments(
        &mut self,
        behind: Option<AttachmentId>,
        limit: u32,
    ) -> Result<Vec<(AttachmentId, u64)>, TransferError> {
        let statement = "SELECT id, size FROM attachments WHERE stored = 1 AND id > $1 ORDER BY id LIMIT $2";
        let behind = behind.map(|id| id.as_bytes().to_vec()).unwrap_or_default();
        let find = sqlx::query_as(statement).bind(behind).bind(limit);
        let found: sqlx::Result<Vec<(AttachmentId, i64)>> = find.fetch_all(&mut self.connection).await;
        let found = found.map_err(|cause| TransferError::Source { path: self.path.clone(), cause })?;
        Ok(found.into_iter().map(|(id, size)| (id, size.unsigned_abs())).collect())
    }

    async fn number(&mut self, query: &str) -> Result<i64, TransferError> {
        let number = sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&mut self.connection).await;
        number.map_err(|cause| TransferError::Source { path: self.path.clone(), cause })
    }

    pub(super) async fn close(self) {
        // Nothing was written, so nothing can be lost.
        let _ = self.connection.close().await;
    }
}

/// The file with this at the end of its name.
fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

fn checksum(files: &[PathBuf]) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    for file in files {
        let mut file = File::open(file)?;
        hash.update(file.metadata()?.len().to_be_bytes());
        loop {
            match file.read(&mut piece)? {
                0 => break,
                length => hash.update(&piece[..length]),
            }
        }
    }
    Ok(hash.finalize().into())
}

/// A path inside a URL.
fn in_url(path: &Path) -> String {
    let escape = |byte: &u8| match byte {
        b'/' | b'-' | b'_' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(*byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    path.as_os_str().as_encoded_bytes().iter().map(escape).collect()
}
