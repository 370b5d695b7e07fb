//! A folder of attachments that is only read, such as the one that a transfer takes them from.
//!
//! `Blobs::open` tidies up and tries to write. Here nothing in the folder is touched.

use std::io;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use object_store::ObjectStoreExt;
use object_store::local::LocalFileSystem;

use crate::blobs::{Blob, BlobError, Keys, OpenError};
use crate::model::ids::AttachmentId;

/// The folder.
pub struct ReadOnlyFolder {
    store: LocalFileSystem,
    keys: Keys,
    folder: PathBuf,
}

impl ReadOnlyFolder {
    /// A folder that has to be there, with objects whose names begin with `prefix`.
    pub fn open(folder: &Path, prefix: &str) -> Result<Self, OpenError> {
        let keys = Keys::new(prefix)?;
        let unusable = |cause| OpenError::Unusable { path: folder.display().to_string(), cause };
        let folder = folder.canonicalize().map_err(unusable)?;
        let store = LocalFileSystem::new_with_prefix(&folder).map_err(|error| unusable(io::Error::other(error)))?;
        Ok(Self { store, keys, folder })
    }

    /// Where it is, without symbolic links on the way.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Reads an attachment; `None` when there is no such attachment.
    pub async fn read(&self, id: AttachmentId) -> Result<Option<Blob>, BlobError> {
        match self.store.get(&self.keys.of(id)).await {
            Ok(found) => {
                let (size, range) = (found.meta.size, found.range.clone());
                Ok(Some(Blob {
                    size,
                    range,
                    bytes: found.into_stream().map(|bytes| bytes.map_err(BlobError::from)).boxed(),
                }))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
