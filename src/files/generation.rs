//! A mark in the header of the database, by which a copy that was written over the file is recognised. Such a copy has the
//! same path and the same inode, so only the content can tell.
//!
//! The server gives the database a new mark every minute, in SQLite's own field for a number of the application. The mark
//! reaches the file at a checkpoint, so the file may lag behind, but it never goes back. A mark that is older than one that
//! was seen, or that is not of this run, belongs to a copy.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where `PRAGMA application_id` stands in the file: <https://www.sqlite.org/fileformat2.html#application_id>
const OFFSET: u64 = 68;

/// The marks of one run of the server.
#[derive(Debug)]
pub(super) struct Generations {
    /// Stays open until the process ends: closing any handle of a file releases the process's POSIX locks on it, those of
    /// SQLite included.
    file: File,
    /// The mark before this run.
    before: u32,
    /// The marks of this run are the numbers behind this one.
    base: u32,
    /// How many marks the database may have been given.
    given: AtomicU32,
    /// How many of them it has for sure.
    committed: AtomicU32,
    /// The newest that was seen in the file, counted from `base`.
    seen: AtomicU32,
}

impl Generations {
    pub(super) fn of(file: File) -> io::Result<Self> {
        let before = read(&file)?;
        let [given, committed, seen] = [(); 3].map(|()| AtomicU32::new(0));
        Ok(Self { file, before, base: rand::random(), given, committed, seen })
    }

    /// The next one. The database may have it from now on, so a commit without an answer does no harm.
    pub(super) fn next(&self) -> i32 {
        let count = self.given.fetch_add(1, Ordering::Relaxed) + 1;
        self.base.wrapping_add(count).cast_signed()
    }

    /// The database has got all that were given.
    pub(super) fn confirm(&self) {
        self.committed.store(self.given.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Whether the database, read through SQLite and so with its log, may have this mark.
    pub(super) fn may_be(&self, generation: i32) -> bool {
        let (count, committed) =
            (generation.cast_unsigned().wrapping_sub(self.base), self.committed.load(Ordering::Relaxed));
        committed == 0 || (count >= committed && count <= self.given.load(Ordering::Relaxed))
    }

    /// Whether the file has a mark that it may have.
    pub(super) fn are_ours(&self) -> io::Result<bool> {
        let found = match read(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            found => found?,
        };
        let (seen, count) = (self.seen.load(Ordering::Relaxed), found.wrapping_sub(self.base));
        if found == self.before && seen == 0 {
            return Ok(true);
        }
        let is_ours = count >= seen.max(1) && count <= self.given.load(Ordering::Relaxed);
        if is_ours {
            self.seen.store(count, Ordering::Relaxed);
        }
        Ok(is_ours)
    }
}

fn read(file: &File) -> io::Result<u32> {
    let mut generation = [0; 4];
    file.read_exact_at(&mut generation, OFFSET)?;
    Ok(u32::from_be_bytes(generation))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(file: &File, generation: i32) {
        file.write_all_at(&generation.to_be_bytes(), OFFSET).unwrap();
    }

    #[test]
    fn a_generation_that_lags_behind_is_ours_and_one_that_goes_back_is_of_a_copy() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let generations = Generations::of(file.try_clone().unwrap()).unwrap();
        assert!(generations.are_ours().unwrap(), "the one before this run");
        let given: Vec<i32> = (0..4).map(|_| generations.next()).collect();
        assert!(generations.are_ours().unwrap(), "not folded back yet");
        write(&file, given[1]);
        assert!(generations.are_ours().unwrap());
        write(&file, given[3]);
        assert!(generations.are_ours().unwrap());
        assert!(generations.may_be(given[2]), "whether the last commits happened is not known");
        generations.confirm();
        assert!(generations.may_be(given[3]) && !generations.may_be(given[2]));
        for of_a_copy in [given[1], 0, given[3].wrapping_add(1)] {
            write(&file, of_a_copy);
            assert!(!generations.are_ours().unwrap(), "{of_a_copy}");
        }
        file.set_len(0).unwrap();
        assert!(!generations.are_ours().unwrap(), "cut short");
    }
}
