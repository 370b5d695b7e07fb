//! Attachments in a folder of this machine.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::{GetOptions, GetResultPayload, ObjectStore, ObjectStoreExt, PutPayloadMut, path::Path as Key};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;
use tracing::info;

use crate::blobs::draft::Draft;
use crate::blobs::{Blob, BlobError, Deleted, Keys, OpenError, UploadError};
use crate::model::ids::AttachmentId;

/// An upload is written in parts of exactly this size, except the last one, so that every
/// write but the last begins and ends with a page of memory. Hardly more of it is in memory at a time: a piece that is
/// kept as it arrived may hold the buffer that it came in.
pub(super) const PART_BYTES: usize = 256 << 10;
/// What arrives in pieces of this size or more is written from where it is.
const KEPT_BYTES: usize = 32 << 10;
/// A download is read in pieces of this size.
const READ_BYTES: usize = 64 << 10;
/// Objects that are deleted at the same time.
const DELETES_AT_ONCE: usize = 8;

/// The folder. Cloning gives the same folder.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    /// Reads, deletes, and knows where an object lies. What is written goes through [`Draft`].
    store: Arc<LocalFileSystem>,
    keys: Keys,
    /// The inode of the folder with the objects, as it was at the start. The device is left out: a network file system may
    /// have another one after it was away.
    inode: u64,
}

impl Folder {
    /// Opens the storage and removes what uploads cut off by a crash have left in it.
    pub fn open(folder: &Path, keys: Keys) -> Result<Self, OpenError> {
        let unusable = |cause| OpenError::Unusable { path: folder.display().to_string(), cause };
        make_folder(folder).map_err(unusable)?;
        let store = LocalFileSystem::new_with_prefix(folder).map_err(|error| unusable(io::Error::other(error)))?;
        let mut blobs = Self { store: Arc::new(store), keys, inode: 0 };
        let objects =
            blobs.path(&blobs.keys.of(AttachmentId::random())).map_err(|error| unusable(io::Error::other(error)))?;
        let objects = objects.parent().unwrap_or(folder);
        make_folder(objects).map_err(unusable)?;
        remove_leftovers(objects).map_err(unusable)?;
        check_writable(objects).map_err(unusable)?;
        blobs.inode = fs::metadata(objects).map_err(unusable)?.ino();
        Ok(blobs)
    }

    /// Takes in the bytes of an attachment, without making them the attachment yet: that is [`Staged::publish`].
    ///
    /// They wait under another name. If this or the answer is dropped, they are removed.
    pub async fn stage<E>(
        &self,
        id: AttachmentId,
        size: u64,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Staged, UploadError> {
        self.check().await?;
        let mut draft = Draft::new(self.staging_path(id)?);
        let mut body = std::pin::pin!(body);
        let (mut received, mut part) = (0, PutPayloadMut::new());
        while let Some(bytes) = body.next().await {
            let mut bytes = bytes.map_err(|_| UploadError::Body)?;
            received += bytes.len() as u64;
            if received > size {
                return Err(UploadError::Body);
            }
            while part.content_length() + bytes.len() > PART_BYTES {
                let behind = bytes.split_off(PART_BYTES - part.content_length());
                add(&mut part, bytes);
                draft = draft.append(std::mem::take(&mut part).freeze()).await.map_err(BlobError::from)?;
                bytes = behind;
            }
            add(&mut part, bytes);
        }
        if received < size {
            return Err(UploadError::Body);
        }
        let draft = draft.append(part.freeze()).await.map_err(BlobError::from)?;
        Ok(Staged { draft, name: self.path(&self.keys.of(id)).map_err(BlobError::from)? })
    }

    /// Reads an attachment, or `range` of it; `None` when there is no such attachment.
    pub async fn read(&self, id: AttachmentId, range: Option<Range<u64>>) -> Result<Option<Blob>, BlobError> {
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        let found = match self.store.get_opts(&self.keys.of(id), options).await {
            Err(object_store::Error::NotFound { .. }) => {
                // What another folder does not have says nothing about the attachment.
                self.check().await?;
                return Ok(None);
            }
            found => found?,
        };
        let (size, range) = (found.meta.size, found.range.clone());
        let bytes = match found.payload {
            GetResultPayload::File(file, _) => read_file(file, range.clone())?,
            GetResultPayload::Stream(stream) => stream.map_err(BlobError::from).boxed(),
        };
        Ok(Some(Blob { size, range, bytes }))
    }

    /// Deletes attachments for good, also those that were not published yet. One that isn't there counts as deleted.
    pub async fn delete(&self, ids: &[AttachmentId]) -> Deleted {
        if let Err(error) = self.check().await {
            return Deleted { gone: Vec::new(), failed: Some((ids.len(), error)) };
        }
        let deletions = stream::iter(ids.to_vec()).map(|id| self.clone().delete_one(id));
        let mut outcome = Deleted::new();
        let mut deletions = deletions.buffered(DELETES_AT_ONCE);
        while let Some((id, deleted)) = deletions.next().await {
            outcome.add(id, deleted);
        }
        match self.sync_deletions(&outcome.gone).await {
            Ok(()) => outcome,
            Err(error) => Deleted { gone: Vec::new(), failed: Some((ids.len(), error)) },
        }
    }

    /// Returns when the storage is there, and is the folder that it was at the start: what lies below a mount that is away
    /// would take attachments in and lose them when the mount is back.
    pub async fn check(&self) -> Result<(), BlobError> {
        let objects = self.path(&self.keys.of(AttachmentId::random()))?;
        let objects = objects.parent().map(Path::to_owned).unwrap_or_default();
        let found = tokio::fs::metadata(objects).await?;
        if !found.is_dir() {
            return Err(io::Error::from(ErrorKind::NotADirectory).into());
        }
        if found.ino() != self.inode {
            return Err(
                io::Error::other("the folder was replaced or unmounted; put it back, or restart the server").into()
            );
        }
        Ok(())
    }

    async fn delete_one(self, id: AttachmentId) -> (AttachmentId, Result<(), BlobError>) {
        let deleted = async {
            let key = self.keys.of(id);
            match tokio::fs::remove_file(self.staging_path(id)?).await {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            match self.store.delete(&key).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        (id, deleted.await)
    }

    /// Makes deletions survive a loss of power, so that a row that goes afterwards leaves no file behind.
    async fn sync_deletions(&self, deleted: &[AttachmentId]) -> Result<(), BlobError> {
        let Some(&id) = deleted.first() else { return Ok(()) };
        let path = self.path(&self.keys.of(id))?;
        let Some(folder) = path.parent() else { return Ok(()) };
        match tokio::fs::File::open(folder).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            folder => Ok(folder?.sync_all().await?),
        }
    }

    /// Where the bytes of an attachment wait that isn't one yet.
    fn staging_path(&self, id: AttachmentId) -> Result<PathBuf, BlobError> {
        let mut path = self.path(&self.keys.of(id))?.into_os_string();
        path.push("#1");
        Ok(path.into())
    }

    fn path(&self, key: &Key) -> Result<PathBuf, object_store::Error> {
        self.store.path_to_filesystem(key)
    }
}

/// Bytes that have arrived in full and wait to become an attachment. Dropping them removes them.
pub(super) struct Staged {
    draft: Draft,
    name: PathBuf,
}

impl Staged {
    /// Makes them the attachment; they are on disk when this returns. If it fails, nothing is left.
    ///
    /// This must run to its end: dropped in the middle, it may still happen.
    pub async fn publish(self) -> Result<(), BlobError> {
        Ok(self.draft.publish(self.name).await?)
    }
}

fn add(part: &mut PutPayloadMut, bytes: Bytes) {
    match bytes.len() {
        // Copied together, because a client that sends single bytes would make a list of them expensive.
        ..KEPT_BYTES => part.extend_from_slice(&bytes),
        _ => part.push(bytes),
    }
}

fn read_file(mut file: File, range: Range<u64>) -> io::Result<BoxStream<'static, Result<Bytes, BlobError>>> {
    file.seek(SeekFrom::Start(range.start))?;
    let part = tokio::fs::File::from_std(file).take(range.end - range.start);
    Ok(ReaderStream::with_capacity(part, READ_BYTES).map_err(BlobError::from).boxed())
}

/// Makes a folder that only this user may enter, and those above it, and has them survive a loss of power.
fn make_folder(folder: &Path) -> io::Result<()> {
    let missing = folder.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).count();
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    for changed in folder.ancestors().skip(1).take(missing) {
        let changed = if changed.as_os_str().is_empty() { Path::new(".") } else { changed };
        File::open(changed)?.sync_all()?;
    }
    Ok(())
}

/// Removes what a stop in the middle has left: of uploads `<id>#1`, of the probe in [`check_writable`] `<id>#0`. Other
/// numbers count too, since the folder may have been written by a program that used them.
fn remove_leftovers(folder: &Path) -> io::Result<()> {
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_leftover) {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    if removed > 0 {
        info!(removed, "removed what interrupted uploads had left");
    }
    Ok(())
}

fn is_leftover(name: &str) -> bool {
    let Some((object, number)) = name.rsplit_once('#') else { return false };
    let id = object.len().checked_sub(36).and_then(|start| object.get(start..));
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) && id.and_then(AttachmentId::parse).is_some()
}

fn check_writable(folder: &Path) -> io::Result<()> {
    let probe = folder.join(format!("{}#0", AttachmentId::random()));
    File::create_new(&probe)?;
    fs::remove_file(&probe)
}
