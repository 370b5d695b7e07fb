//! The bytes of attachments, in a folder or a bucket. They are streamed both ways and never whole in memory.
//!
//! An object is named after its attachment's id behind the configured prefix, in a folder as in a bucket, so that the
//! one can be copied to the other as it stands.

mod bucket;
mod draft;
mod error;
mod folder;
mod read_only;
mod s3;
mod start;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::BoxStream;
use object_store::path::Path as Key;

use crate::blobs::bucket::Bucket;
pub use crate::blobs::error::{BlobError, OpenError, UploadError};
use crate::blobs::folder::Folder;
pub use crate::blobs::read_only::ReadOnlyFolder;
use crate::config;
use crate::limits::LimitSubject;
use crate::model::ids::AttachmentId;
use crate::telemetry::traces::Span;

/// The storage of attachments. Cloning gives the same storage.
#[derive(Clone, Debug)]
pub struct Blobs(Backend);

#[derive(Clone, Debug)]
enum Backend {
    Folder(Folder),
    Bucket(Bucket),
}

/// The bytes of an attachment, or a part of them.
pub struct Blob {
    /// The size of the whole.
    pub size: u64,
    /// Which of its bytes these are: those that were asked for, or all of them, where a service does not know ranges.
    pub range: Range<u64>,
    /// The bytes.
    pub bytes: BoxStream<'static, Result<Bytes, BlobError>>,
}

/// What came of a deletion.
#[derive(Debug)]
pub struct Deleted {
    /// They are gone for good, and stay so after a crash.
    pub gone: Vec<AttachmentId>,
    /// How many could not be deleted, and why the first of them could not.
    pub failed: Option<(usize, BlobError)>,
}

impl Blobs {
    /// Opens the storage. A folder is made if need be, and what uploads cut off by a crash have left in it is removed.
    /// A bucket's service is waited for.
    pub async fn open(config: &config::Attachments) -> Result<Self, OpenError> {
        let blobs = Self::prepare(config)?;
        blobs.until_usable(config).await?;
        Ok(blobs)
    }

    /// The same without waiting for a bucket's service, which may still turn out to be away or not to be usable.
    pub fn prepare(config: &config::Attachments) -> Result<Self, OpenError> {
        let keys = Keys::new(&config.prefix)?;
        Ok(Self(match config.folder() {
            Some(folder) => Backend::Folder(Folder::open(folder, keys)?),
            None => Backend::Bucket(Bucket::prepare(config, keys)?),
        }))
    }

    /// Ends when the storage can be used. Only what an operator has to put right is an error. `config` is what it was
    /// prepared with.
    pub async fn until_usable(&self, config: &config::Attachments) -> Result<(), OpenError> {
        match &self.0 {
            Backend::Folder(_) => Ok(()),
            Backend::Bucket(bucket) => bucket.until_usable(config).await,
        }
    }

    /// Takes in the bytes of an attachment, without making them the attachment yet: that is [`Staged::publish`].
    ///
    /// If this or the answer is dropped, or fails, [`Blobs::discard`] removes what has arrived in a bucket; in a folder
    /// that happens by itself.
    pub async fn stage<E>(
        &self,
        id: AttachmentId,
        size: u64,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Staged, UploadError> {
        self.stage_for(LimitSubject::Exempt, id, size, body).await
    }

    /// The same for a client, which has its share of the memory that uploads to a bucket need.
    pub async fn stage_for<E>(
        &self,
        subject: LimitSubject,
        id: AttachmentId,
        size: u64,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Staged, UploadError> {
        let stage = async {
            Ok(Staged(match &self.0 {
                Backend::Folder(folder) => StagedBytes::InFolder(folder.stage(id, size, body).await?),
                Backend::Bucket(bucket) => StagedBytes::InBucket(bucket.stage(id, size, subject, body).await?),
            }))
        };
        Span::calling("blobs.stage").attempt(stage).await
    }

    /// True when bytes may be staged before the attachment has a row, because what is left of them after a crash is known
    /// without one.
    pub fn can_stage_before_row(&self) -> bool {
        matches!(self.0, Backend::Folder(_))
    }

    /// Reads an attachment, or `range` of it; `None` when there is no such attachment.
    pub async fn read(&self, id: AttachmentId, range: Option<Range<u64>>) -> Result<Option<Blob>, BlobError> {
        let read = async {
            match &self.0 {
                Backend::Folder(folder) => folder.read(id, range).await,
                Backend::Bucket(bucket) => bucket.read(id, range).await,
            }
        };
        Span::calling("blobs.read").attempt(read).await
    }

    /// Deletes attachments that were published, for good. One that isn't there counts as deleted.
    pub async fn delete(&self, ids: &[AttachmentId]) -> Deleted {
        let delete = async {
            match &self.0 {
                Backend::Folder(folder) => folder.delete(ids).await,
                Backend::Bucket(bucket) => bucket.delete(ids).await,
            }
        };
        Span::calling("blobs.delete").run(delete).await
    }

    /// Removes whatever an upload has left that came to nothing, however far it got, also when the process that began it
    /// is gone. For a bucket that takes some requests for each.
    pub async fn discard(&self, ids: &[AttachmentId]) -> Deleted {
        let discard = async {
            match &self.0 {
                Backend::Folder(folder) => folder.delete(ids).await,
                Backend::Bucket(bucket) => bucket.discard(ids).await,
            }
        };
        Span::calling("blobs.discard").run(discard).await
    }

    /// Answers when the storage is there.
    pub async fn check(&self) -> Result<(), BlobError> {
        match &self.0 {
            Backend::Folder(folder) => folder.check().await,
            Backend::Bucket(bucket) => bucket.check().await,
        }
    }
}

/// Bytes that have arrived in full and wait to become an attachment.
pub struct Staged(StagedBytes);

enum StagedBytes {
    InFolder(folder::Staged),
    InBucket(bucket::Staged),
}

impl Staged {
    /// Makes them the attachment; they are stored for good when this returns.
    ///
    /// This must run to its end: dropped in the middle, it may still happen. If it fails, [`Blobs::discard`] tidies up.
    pub async fn publish(self) -> Result<(), BlobError> {
        let publish = async {
            match self.0 {
                StagedBytes::InFolder(staged) => staged.publish().await,
                StagedBytes::InBucket(staged) => staged.publish().await,
            }
        };
        Span::calling("blobs.publish").attempt(publish).await
    }
}

/// How objects are named.
#[derive(Clone, Debug)]
struct Keys {
    prefix: Arc<str>,
}

impl Keys {
    /// With this before each id.
    fn new(prefix: &str) -> Result<Self, OpenError> {
        let sample = Key::parse(format!("{prefix}{}", AttachmentId::random()));
        match sample {
            Ok(_) => Ok(Self { prefix: prefix.into() }),
            Err(cause) => Err(OpenError::Prefix { prefix: prefix.to_owned(), cause }),
        }
    }

    /// The name of an attachment's object.
    fn of(&self, id: AttachmentId) -> Key {
        Key::parse(format!("{}{id}", self.prefix)).expect("the prefix was checked when the storage was opened")
    }
}

impl Deleted {
    /// Of nothing yet.
    fn new() -> Self {
        Self { gone: Vec::new(), failed: None }
    }

    /// Adds the outcome for one.
    fn add(&mut self, id: AttachmentId, deleted: Result<(), BlobError>) {
        match deleted {
            Ok(()) => self.gone.push(id),
            Err(error) => self.add_failures(1, error),
        }
    }

    /// Adds what came of other deletions.
    pub fn add_all(&mut self, other: Self) {
        self.gone.extend(other.gone);
        if let Some((count, error)) = other.failed {
            self.add_failures(count, error);
        }
    }

    fn add_failures(&mut self, more: usize, error: BlobError) {
        match &mut self.failed {
            Some((count, _)) => *count += more,
            none => *none = Some((more, error)),
        }
    }
}

#[cfg(test)]
mod tests;
