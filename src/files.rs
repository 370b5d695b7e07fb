//! The files of an embedded server: locked for one server, and compared with their paths while it runs.
//!
//! A program that has a file open goes on reading and writing it after the path was removed or replaced. What a server
//! writes then is lost when it ends. So the server has to notice that, and to stop.

mod generation;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::{self, Config};
use crate::files::generation::Generations;

/// How long a predecessor may take to release its locks, and how often they are tried.
const PREDECESSOR_ENDS_WITHIN: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The locks of one server. Dropping them lets the next one start.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    _folder: Option<File>,
}

/// Where the lock file of this database is. It stays when its server ends.
pub fn lock_path(database: &Path) -> PathBuf {
    beside(database, ".lock")
}

/// Makes sure that no other server uses this database. Waits for a server that is just ending.
///
/// Two locks: the file beside the database, which every version takes; and the data folder itself, if there is one, because
/// a lock file can be removed and made anew while its server runs, and the folder of that server can't. A database without a
/// data folder may share its folder with others, so there the database's own file is locked.
pub async fn lock(database: &Path, data_dir: Option<&Path>) -> Result<Lock> {
    let path = lock_path(database);
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("can't write {}; check its folder", path.display()))?;
    acquire(&file, &path, database).await?;
    let second = data_dir.unwrap_or(database);
    let folder = match File::open(second) {
        Ok(folder) => acquire(&folder, second, database).await?.then_some(folder),
        // A database that is not there yet can't be in use.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("can't open {}", second.display())),
    };
    Ok(Lock { _file: file, _folder: folder })
}

/// Returns false if the file system has no such locks.
async fn acquire(file: &File, path: &Path, database: &Path) -> Result<bool> {
    let until = Instant::now() + PREDECESSOR_ENDS_WITHIN;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if Instant::now() < until => tokio::time::sleep(RETRY_PAUSE).await,
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "another server is already running on {}; stop it, or name another --data-dir",
                    database.display()
                )
            }
            // Some file systems can't lock what is open for reading only; the lock file is then the only lock.
            Err(TryLockError::Error(cause)) if path.is_dir() => {
                warn!(%cause, "the data folder can't be locked; don't remove the lock file while the server runs");
                return Ok(false);
            }
            Err(TryLockError::Error(cause)) => {
                return Err(cause).with_context(|| format!("can't lock {}", path.display()));
            }
        }
    }
}

/// Refuses a data folder that a server has used and whose database is missing: a new database there would be taken for the
/// old one, and everything in it for lost. A missing lock file does no harm.
pub fn reject_orphaned_files(config: &Config) -> Result<()> {
    let (Some(folder), Some(database)) = (&config.data_dir, config.database.file()) else { return Ok(()) };
    if database.exists() {
        return Ok(());
    }
    let attachments = config.attachments.folder().filter(|attachments| attachments.starts_with(folder));
    let remains = [
        ("a signing secret", folder.join(config::KEPT_SECRET).exists()),
        ("attachments", attachments.is_some_and(has_entries)),
        ("the log of a database", beside(database, "-wal").exists()),
    ];
    let Some((what, _)) = remains.into_iter().find(|(_, is_there)| *is_there) else { return Ok(()) };
    bail!(
        "the data folder {} has {what} and no database, so {} was removed or not restored; restore it from a backup, or, to \
         really start over with no accounts and no messages, move everything out of the folder first",
        folder.display(),
        database.display()
    )
}

fn has_entries(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// The path of the database with `suffix` appended.
fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// What the running server has open, compared with what is at its paths. Cloning gives the same files.
#[derive(Clone, Debug)]
pub struct Files {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    database: PathBuf,
    watched: Mutex<Vec<Watched>>,
    generations: Option<Generations>,
    lost: CancellationToken,
}

/// A path, and the file that was there when the server opened it.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    what: &'static str,
    known: Option<Identity>,
    /// Whether the server can't go on without it. Otherwise a difference is logged once.
    is_vital: bool,
}

/// A device and a file on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

/// A file that was removed, replaced or overwritten. Its text is a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {path} was {how} while the server ran; nothing more is accepted, and the server stops: restore a backup if \
     something is missing (the database together with its -wal file, or without any), then start it again"
)]
pub struct FilesLost {
    what: &'static str,
    path: String,
    how: &'static str,
}

impl Files {
    /// The files of this configuration, which have just been opened. Empty unless the database is a file.
    pub fn watch(config: &Config) -> io::Result<Self> {
        let (mut watched, mut generations) = (Vec::new(), None);
        if let Some(database) = config.database.file() {
            let mut watch = |path: PathBuf, what, is_vital| {
                watched.push(Watched { known: identify(&path).ok().flatten(), path, what, is_vital });
            };
            watch(database.to_owned(), "the database", true);
            // A commit is in the log before it is in the database; connections of other programs meet ours over the index.
            watch(beside(database, "-wal"), "the log of the database", true);
            watch(beside(database, "-shm"), "the index of the log of the database", true);
            watch(lock_path(database), "the lock file of the database", true);
            if let Some(folder) = &config.data_dir {
                watch(folder.clone(), "the data folder", true);
                watch(folder.join(config::KEPT_SECRET), "the file with the signing secret", false);
            }
            generations = Some(Generations::of(File::open(database)?)?);
        }
        let database = config.database.file().unwrap_or(Path::new("")).to_owned();
        let (watched, lost) = (Mutex::new(watched), CancellationToken::new());
        Ok(Self { inner: Arc::new(Inner { database, watched, generations, lost }) })
    }

    /// Whether there is anything to watch.
    pub fn are_watched(&self) -> bool {
        self.inner.generations.is_some()
    }

    /// Compares the files with their paths. It waits for the disk. Once something is lost, it stays so.
    pub fn check(&self) -> std::result::Result<(), FilesLost> {
        let mut watched = self.inner.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let found = watched.iter_mut().try_for_each(Watched::check).and_then(|()| {
            match self.inner.generations.as_ref().map_or(Ok(true), Generations::are_ours) {
                Ok(false) => Err(self.overwritten()),
                // A read error is one of the disk. The database will report it as well.
                Ok(true) | Err(_) => Ok(()),
            }
        });
        found.inspect_err(|_| self.inner.lost.cancel())
    }

    /// The next mark that the database is to carry: see `Generations`. `None` without a file.
    pub fn next_generation(&self) -> Option<i32> {
        self.inner.generations.as_ref().map(Generations::next)
    }

    /// The database has got the last mark for sure: the transaction was committed.
    pub fn confirm_generation(&self) {
        self.inner.generations.iter().for_each(Generations::confirm);
    }

    /// Compares the mark that was read through SQLite. Another one means that some other program has written a backup into
    /// the database by SQLite's own means.
    pub fn check_generation(&self, generation: i32) -> std::result::Result<(), FilesLost> {
        if self.inner.generations.as_ref().is_none_or(|generations| generations.may_be(generation)) {
            return Ok(());
        }
        self.inner.lost.cancel();
        Err(self.overwritten())
    }

    fn overwritten(&self) -> FilesLost {
        FilesLost { what: "the database", path: self.inner.database.display().to_string(), how: "overwritten" }
    }

    /// Declares the database lost for another reason: another database answers.
    pub fn set_lost(&self) {
        self.inner.lost.cancel();
    }

    /// Whether something vital is gone.
    pub fn are_lost(&self) -> bool {
        self.inner.lost.is_cancelled()
    }

    /// Ends when something vital is gone.
    pub async fn lost(&self) {
        self.inner.lost.cancelled().await;
    }
}

impl Watched {
    fn check(&mut self) -> std::result::Result<(), FilesLost> {
        let found = match identify(&self.path) {
            Ok(found) => found,
            // A disk that doesn't answer is not a file that is gone. The database will say so itself.
            Err(error) => {
                warn!(what = self.what, %error, "a file of the server can't be looked at");
                return Ok(());
            }
        };
        let how = match (self.known, found) {
            (None, found) => {
                // The log of the database comes with the first write.
                self.known = found;
                return Ok(());
            }
            (Some(_), None) => "removed",
            (Some(known), Some(found)) if known != found => "replaced",
            (Some(_), Some(_)) => return Ok(()),
        };
        if self.is_vital {
            return Err(FilesLost { what: self.what, path: self.path.display().to_string(), how });
        }
        warn!("{} was {how} while the server ran; if you did not mean to change it, put the old one back", self.what);
        self.known = found;
        Ok(())
    }
}

/// `None` when there is nothing.
fn identify(path: &Path) -> io::Result<Option<Identity>> {
    match fs::metadata(path) {
        Ok(data) => Ok(Some(Identity { device: data.dev(), inode: data.ino() })),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}
