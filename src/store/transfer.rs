//! Carries everything from the database of a stopped embedded server into an empty PostgreSQL database.
//!
//! Each step is small and can be repeated: a run after an interruption goes on behind the last batch that
//! arrived. At the end both sides are read from the first row to the last and compared.

mod source;
mod table;
mod target;

use std::path::Path;

use sha2::Digest;

use crate::config;
use crate::model::ids::AttachmentId;
use crate::store::OpenError;
use crate::store::transfer::source::Source;
use crate::store::transfer::table::TABLES;
use crate::store::transfer::target::{Progress, Target};

/// What the bytes of attachments are called among the tables.
pub(crate) const BYTES_OF_ATTACHMENTS: &str = "bytes of attachments";
/// Attachments that are asked for at a time.
const ATTACHMENTS: u32 = 100;

/// Why a transfer ended before its end. Each says in one sentence what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("the database {path} can't be read: {cause}")]
    Source { path: String, cause: sqlx::Error },
    #[error("{path} is not the database of an embedded server; --from takes sqlite:PATH or the folder of --data-dir")]
    NotOurs { path: String },
    #[error(
        "{path} was left by a server that was killed, and its -shm file is missing, without which it can't be read unchanged; start the embedded server on it once, stop it and run this again"
    )]
    LogAlone { path: String },
    #[error(
        "the database {path} was written by an older version of this server (schema {found}, this one has {known}); start this version on it once, stop it and run this again"
    )]
    Older { path: String, found: i64, known: i64 },
    #[error(
        "the database {path} was written by a newer version of this server (schema {found}, this one knows {known}); use that version"
    )]
    Newer { path: String, found: i64, known: i64 },
    #[error("the table {table} has a row that no server has written: its {column} can't be carried over")]
    Unfit { table: &'static str, column: &'static str },
    #[error("{}", opening(.0))]
    Target(OpenError),
    #[error("another transfer into the database at {address} is running; wait for its end")]
    Second { address: String },
    #[error("a server runs on the database at {address}; stop all of them and run this again")]
    ServerRuns { address: String },
    #[error(
        "the database at {address} is not empty (there are rows in {table}) and no transfer into it is under way; if one has just ended, all is done; else give an empty database"
    )]
    HasData { address: String, table: &'static str },
    #[error(
        "a transfer from another database into the one at {address} is under way, or a server has run on this one since; finish it from there, or give an empty database"
    )]
    OtherSource { address: String },
    #[error(
        "the connection to the target was lost ({cause}); run the same command again, and it goes on where it stopped"
    )]
    Lost { cause: sqlx::Error },
    #[error(
        "the target refused{}: {cause}; once that is settled, run the same command again, and it goes on where it stopped",
        .table.map(|table| format!(" rows of {table}")).unwrap_or_default()
    )]
    Refused { table: Option<&'static str>, cause: sqlx::Error },
    #[error(
        "the table {table} differs: {there} rows have arrived where {here} were expected; somebody else has written to the target; give an empty database and start over"
    )]
    CountDiffers { table: &'static str, here: u64, there: u64 },
    #[error(
        "the table {table} differs in its content, though it has as many rows as there should be; somebody else has written to the target; give an empty database and start over"
    )]
    ContentDiffers { table: &'static str },
}

/// The sentences of a server that can't open its database, about the option that was used here.
fn opening(error: &OpenError) -> String {
    match error {
        OpenError::Unreachable { address, cause } => {
            format!(
                "no database answers at {address} (--to or --db-url): {cause}; start it and run the same command again"
            )
        }
        error => error.to_string().replace("--db-url", "--to or --db-url"),
    }
}

/// Hears how far a step has come: its name, how many of how many.
pub(crate) type OnProgress<'a> = &'a mut dyn FnMut(&'static str, u64, u64);

/// A transfer under way.
pub(crate) struct Transfer {
    source: Source,
    target: Target,
    is_resumed: bool,
}

/// How the copying of the attachments' bytes has come on.
pub(crate) struct BytesProgress {
    /// The last attachment whose bytes have arrived, as have those of all before it.
    pub(crate) last: Option<AttachmentId>,
    pub(crate) copied: u64,
}

impl Transfer {
    /// Opens both databases. The one in `file` must not be in use.
    pub(crate) async fn open(file: &Path, to: &config::Database) -> Result<Self, TransferError> {
        let source = Source::open(file).await?;
        let (target, is_resumed) = Target::open(to, source.identity).await?;
        Ok(Self { source, target, is_resumed })
    }

    /// Whether an earlier run was interrupted.
    pub(crate) fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    /// The host and port of the target.
    pub(crate) fn address(&self) -> &str {
        self.target.address()
    }

    /// Copies the rows that have not arrived yet.
    pub(crate) async fn copy(&mut self, on_progress: OnProgress<'_>) -> Result<(), TransferError> {
        for table in TABLES {
            let all = self.source.count(table).await?;
            let mut progress = self.target.progress(table.name).await?;
            while !progress.is_done {
                let batch = self.source.batch(table, progress.last.as_deref()).await?;
                progress.copied += batch.count;
                progress.is_done = batch.last.is_none();
                progress.last = batch.last.clone().or(progress.last);
                if progress.is_done {
                    self.target.note(table.name, &progress).await?;
                } else {
                    self.target.insert(table, &batch, &progress).await?;
                }
                // The end is told of once: when nothing has come behind the last row.
                if progress.is_done || progress.copied < all {
                    on_progress(table.name, progress.copied, all);
                }
            }
        }
        Ok(())
    }

    /// Reads all rows on both sides and compares them. Answers how many there are of each table.
    pub(crate) async fn verify(
        &mut self,
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<(&'static str, u64)>, TransferError> {
        self.target.analyze().await?;
        let Self { source, target, .. } = self;
        let mut counts = Vec::with_capacity(TABLES.len());
        for table in TABLES {
            let all = source.count(table).await?;
            let ours = async {
                let (mut hash, mut count, mut last) = (target::begin_checksum(), 0, None);
                loop {
                    let batch = source.batch(table, last.as_deref()).await?;
                    let Some(behind) = batch.last else { break };
                    hash.update(&batch.rows);
                    count += batch.count;
                    last = Some(behind);
                    on_progress(table.name, count, all);
                }
                Ok((count, target::end_checksum(hash)))
            };
            let (ours, theirs) = tokio::try_join!(ours, target.checksum(table))?;
            if ours.0 != theirs.0 {
                return Err(TransferError::CountDiffers { table: table.name, here: ours.0, there: theirs.0 });
            }
            if ours.1 != theirs.1 {
                return Err(TransferError::ContentDiffers { table: table.name });
            }
            counts.push((table.name, ours.0));
        }
        Ok(counts)
    }

    /// How many attachments have bytes that belong to them.
    pub(crate) async fn attachment_count(&mut self) -> Result<u64, TransferError> {
        self.source.attachment_count().await
    }

    /// The next of these attachments in the order of their ids, each with its size. None behind the last one.
    pub(crate) async fn attachments(
        &mut self,
        behind: Option<AttachmentId>,
    ) -> Result<Vec<(AttachmentId, u64)>, TransferError> {
        self.source.attachments(behind, ATTACHMENTS).await
    }

    /// How far the copying of their bytes has come.
    pub(crate) async fn bytes_progress(&mut self) -> Result<BytesProgress, TransferError> {
        let progress = self.target.progress(BYTES_OF_ATTACHMENTS).await?;
        let last = progress.last.as_deref().and_then(AttachmentId::from_bytes);
        Ok(BytesProgress { last, copied: progress.copied })
    }

    /// Writes down how far it has come.
    pub(crate) async fn note_bytes(&mut self, bytes: &BytesProgress) -> Result<(), TransferError> {
        let last = bytes.last.map(|id| id.as_bytes().to_vec());
        self.target.note(BYTES_OF_ATTACHMENTS, &Progress { last, copied: bytes.copied, is_done: false }).await
    }

    /// Ends the transfer. From now on servers may start on the target.
    pub(crate) async fn finish(mut self) -> Result<(), TransferError> {
        let numbers = self.source.numbers().await?;
        self.target.finish(&numbers).await?;
        self.target.close().await;
        self.source.close().await;
        Ok(())
    }
}
