//! A small file system of a test's own, in a mount namespace that goes with it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::Binary;

/// A tmpfs. It ends with the process that holds its namespace, when this is dropped.
pub struct SmallDisk {
    holder: Child,
    folder: PathBuf,
}

impl SmallDisk {
    /// With so many bytes and files.
    pub fn make(below: &Path, mebibytes: u32, inodes: u32) -> Self {
        let folder = below.join("small");
        fs::create_dir_all(&folder).expect("a folder to mount at");
        let script = format!(
            "mount -t tmpfs -o size={mebibytes}m,nr_inodes={inodes},mode=700 none \"$1\" && echo mounted && exec sleep 600"
        );
        let mut holder = Command::new("unshare")
            .args([flags("-m"), vec!["sh", "-c", &script, "sh"]].concat())
            .arg(&folder)
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare, of util-linux");
        let mut said = String::new();
        BufReader::new(holder.stdout.take().expect("a pipe")).read_line(&mut said).expect("a line");
        assert_eq!(said, "mounted\n", "a mount namespace needs root, or user namespaces without restrictions");
        Self { holder, folder }
    }

    /// The program in embedded mode on this disk.
    pub async fn start(&self, options: &[&str]) -> Binary {
        let pid = self.holder.id().to_string();
        let mut enter = vec!["nsenter", "-t", &pid];
        enter.extend(if is_root() { vec!["-m"] } else { vec!["-U", "-m", "--preserve-credentials"] });
        Binary::start_within(&enter, &self.folder, options).await
    }

    /// Takes every inode and every byte that is left.
    pub fn fill(&self) {
        let root = self.seen_from_here();
        let mut last = None;
        for n in 0.. {
            match File::create(root.join(format!("filler-{n}"))) {
                Ok(file) => last = Some(file),
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
        let mut file = last.unwrap_or_else(|| File::create(root.join("filler-0")).expect("a file that is there"));
        for size in [1 << 20, 4096, 1] {
            let chunk = vec![7; size];
            while file.write_all(&chunk).is_ok() {}
        }
    }

    /// The folder's path for processes outside of the namespace.
    pub fn seen_from_here(&self) -> PathBuf {
        let inside = self.folder.strip_prefix("/").expect("an absolute path");
        Path::new("/proc").join(self.holder.id().to_string()).join("root").join(inside)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn flags(mount: &'static str) -> Vec<&'static str> {
    if is_root() { vec![mount] } else { vec!["-r", mount] }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
