//! Files that reserve a little of the disk beside the database, so that a server can start on a full disk.
//!
//! SQLite makes its log and its index anew at each start. Without a free byte or inode it can't, and the server would not
//! start. So some inodes and bytes are reserved while there is room, and given up right before the database is opened.
//! Reads, acks and deletions then work.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

/// Inodes that are reserved: for the log, its index, the lock, and one more.
const FILES: usize = 4;
/// Bytes that the first of the files takes: the log of SQLite up to its next checkpoint, and its index.
const BYTES: u64 = 20 << 20;
/// The reserve is never more than this part of what the operator wants to stay free.
const PART: u64 = 8;

/// Gives the reserve beside this database up. What can't be removed stays.
pub fn release(database: &Path) {
    for file in files(database) {
        let _ = fs::remove_file(file);
    }
}

/// Makes the reserve beside this database if it isn't there, as a part of the `keep_free` bytes that the operator wants to
/// stay free. Call it while there is room.
pub fn create(database: &Path, keep_free: u64) -> io::Result<()> {
    let bytes = BYTES.min(keep_free / PART);
    for (n, path) in files(database).enumerate() {
        if path.exists() {
            continue;
        }
        let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path)?;
        if n == 0 && bytes > 0 {
            take(&file, bytes).inspect_err(|_| {
                let _ = fs::remove_file(&path);
            })?;
        }
    }
    Ok(())
}

/// Takes the space. On a file system that can't allocate in advance, does nothing.
fn take(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        taken => Ok(taken?),
    }
}

fn files(database: &Path) -> impl Iterator<Item = PathBuf> {
    (1..=FILES).map(|n| {
        let mut path = database.as_os_str().to_owned();
        path.push(format!(".reserve-{n}"));
        PathBuf::from(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_made_once_and_given_up_whole() {
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("db");
        create(&database, 1 << 20).unwrap();
        let sizes = || -> Vec<u64> { files(&database).map(|file| fs::metadata(file).unwrap().len()).collect() };
        assert_eq!(sizes(), [128 << 10, 0, 0, 0]);
        create(&database, u64::MAX).unwrap();
        assert_eq!(sizes(), [128 << 10, 0, 0, 0], "it stays as it is");
        release(&database);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        release(&database);
    }
}
