//! Folders that are no longer needed, until all is over.

use std::fs::{File, read_dir};
use std::io::Result;
use std::path::Path;

use tempfile::TempDir;

/// Folders whose files are empty. They go when this is dropped.
///
/// Not at once: ext4 without a journal looks, whenever it makes a file, through all files that were deleted in the last
/// minutes, so each run would make the next one slower.
#[derive(Default)]
pub struct Leftovers(Vec<TempDir>);

impl Leftovers {
    /// Empties the files of a folder and keeps it.
    pub fn keep(&mut self, folder: TempDir) -> Result<()> {
        empty(folder.path())?;
        self.0.push(folder);
        Ok(())
    }
}

fn empty(folder: &Path) -> Result<()> {
    for entry in read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => empty(&entry.path())?,
            kind if kind.is_file() => File::options().write(true).open(entry.path())?.set_len(0)?,
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_emptied_at_once_and_folders_go_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        std::fs::create_dir(path.join("below")).unwrap();
        let files = [path.join("one"), path.join("below/two")];
        for file in &files {
            std::fs::write(file, "bytes").unwrap();
        }
        let mut leftovers = Leftovers::default();
        leftovers.keep(folder).unwrap();
        for file in &files {
            assert_eq!(std::fs::metadata(file).unwrap().len(), 0);
        }
        drop(leftovers);
        assert!(!path.exists());
    }
}
