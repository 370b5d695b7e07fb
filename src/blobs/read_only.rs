//! A folder of attachments that is only read, such as the one that a transfer takes them from.
//!
//! `Blobs::open` tidies up and tries to write. Here nothing in the folder is touched.

use std::io;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStoreExt, path::Path as Key};

use crate::blobs::{Blob, BlobError, OpenError};
use crate::model::ids::AttachmentId;

/// The folder.
pub struct ReadOnlyFolder {
    store: LocalFileSystem,
    prefix: String,
    folder: PathBuf,
}

impl ReadOnlyFolder {
    /// A folder that has to be there, with objects whose names begin with `prefix`.
    pub fn open(folder: &Path, prefix: &str) -> Result<Self, OpenError> {
        let unusable = |cause| OpenError::Unusable { path: folder.display().to_string(), cause };
        let folder = folder.canonicalize().map_err(unusable)?;
        let store = LocalFileSystem::new_with_prefix(&folder).map_err(|error| unusable(io::Error::other(error)))?;
        let found = Self { store, prefix: prefix.to_owned(), folder };
        let key = found.key(AttachmentId::random());
        key.map_err(|cause| OpenError::Prefix { prefix: prefix.to_owned(), cause })?;
        Ok(found)
    }

    /// Where it is, without symbolic links on the way.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Reads an attachment; `None` when there is no such attachment.
    pub async fn read(&self, id: AttachmentId) -> Result<Option<Blob>, BlobError> {
        let key = self.key(id).map_err(object_store::Error::from)?;
        match self.store.get(&key).await {
            Ok(found) => {
                let size = found.meta.size;
                Ok(Some(Blob { size, bytes: found.into_stream().map(|bytes| bytes.map_err(BlobError::from)).boxed() }))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn key(&self, id: AttachmentId) -> Result<Key, object_store::path::Error> {
        Key::parse(format!("{}{id}", self.prefix))
    }
}
