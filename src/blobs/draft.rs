//! A file that is written piece by piece and made durable before it gets its name.

use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSlice, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tracing::warn;

/// A file that isn't whole yet. Dropping it removes it.
///
/// Each step takes it to a thread that may wait for the disk, and brings it back. So whenever it is dropped, nothing is
/// still being done with it.
pub(super) struct Draft {
    path: PathBuf,
    /// Absent before anything was written, and after all was published: then there is nothing to remove.
    file: Option<File>,
}

impl Draft {
    /// Nothing is there yet. `path` must be a name that is not in use.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Appends these pieces.
    pub async fn append(self, pieces: impl IntoIterator<Item = Bytes> + Send + 'static) -> io::Result<Self> {
        self.step(|draft| draft.write(pieces)).await
    }

    /// Has the file on disk and gives it its name, for good when this returns. If it fails, nothing is left.
    ///
    /// This must run to its end: dropped in the middle, it may still happen.
    pub async fn publish(self, name: PathBuf) -> io::Result<()> {
        self.step(|draft| {
            draft.file()?.sync_all()?;
            fs::rename(&draft.path, &name)?;
            draft.path = name;
            sync_folder_of(&draft.path)?;
            draft.file = None;
            Ok(())
        })
        .await?;
        Ok(())
    }

    async fn step(mut self, work: impl FnOnce(&mut Self) -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let done = spawn_blocking(move || match work(&mut self) {
            Ok(()) => Ok(self),
            Err(error) => {
                drop(self.leftover());
                Err(error)
            }
        });
        done.await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(io::Error::other("the server is stopping")),
        })
    }

    fn file(&mut self) -> io::Result<&mut File> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => Ok(none.insert(File::create_new(&self.path)?)),
        }
    }

    /// In one call, if the system is willing: it finds the pages of the file once, not once for each piece.
    fn write(&mut self, pieces: impl IntoIterator<Item = Bytes>) -> io::Result<()> {
        let file = self.file()?;
        let pieces: Vec<Bytes> = pieces.into_iter().collect();
        let mut left: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut left = &mut left[..];
        while left.iter().any(|slice| !slice.is_empty()) {
            match file.write_vectored(left) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What there is to remove, if anything.
    fn leftover(&mut self) -> Option<Leftover> {
        self.file.take().map(|_| Leftover(std::mem::take(&mut self.path)))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let Some(leftover) = self.leftover() else { return };
        // A drop may not wait for the disk. A runtime that is ending drops what it does not run any more.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(leftover))),
            Err(_) => drop(leftover),
        }
    }
}

/// A file that has to go. It is removed when this is dropped.
struct Leftover(PathBuf);

impl Drop for Leftover {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            // The system's error doesn't have the file's name, which is an attachment's id.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                warn!(%error, "what is left of a failed upload could not be removed; a sweep or the next start tries again");
            }
            _ => {}
        }
    }
}

fn sync_folder_of(file: &Path) -> io::Result<()> {
    let folder = file.parent().ok_or(ErrorKind::NotFound)?;
    File::open(folder)?.sync_all()
}
