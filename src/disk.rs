//! Whether there is room to grow, so that a full disk is met early and on purpose, and not by accident.

pub mod reserve;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use tracing::{info, warn};

/// How long an answer of the file system is good for, in milliseconds.
const FRESH_MILLIS: u64 = 1000;
/// Inodes that stay free for the files of the database; on a small file system a tenth of all.
const RESERVED_INODES: u64 = 1024;

/// What there is room for. Attachments stop first, so that messages go on for longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskSpace {
    /// Everything.
    Enough,
    /// Everything but attachments.
    Low,
    /// Only what makes room: acks, deletions, and what hardly grows, such as log-ins.
    Full,
}

/// There is no room for anything new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InsufficientSpace;

/// The disk that holds the data, and the database on it or elsewhere. Cloning gives the same disk.
#[derive(Clone, Debug)]
pub struct Disk {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: Option<PathBuf>,
    reserve_bytes: u64,
    /// The largest database that may still grow; zero means any.
    max_database_bytes: u64,
    /// How large the database was when it was last looked at.
    database_bytes: AtomicU64,
    opened: Instant,
    /// When the file system was last asked, in milliseconds since `opened`.
    asked_at: AtomicU64,
    free_bytes: AtomicU64,
    /// `u64::MAX` on a file system that makes inodes as it needs them.
    free_inodes: AtomicU64,
    reserved_inodes: AtomicU64,
    /// Bytes of the uploads under way. Counted in full, though part of them is on the disk already.
    claimed: AtomicU64,
    /// How many uploads are under way.
    claims: AtomicU64,
    warned: AtomicBool,
    /// The room that the operator was last told of.
    logged: AtomicU8,
}

impl Disk {
    /// The disk of `folder`, of which `reserve_bytes` stay free for acks, deletions and the database's own upkeep.
    /// Without a folder, or with a reserve of zero, there always is room on it. A database above `max_database_bytes`
    /// (zero: none is) has no room either.
    pub fn new(folder: Option<PathBuf>, reserve_bytes: u64, max_database_bytes: u64) -> Self {
        let inner = Inner {
            folder: folder.filter(|_| reserve_bytes > 0),
            reserve_bytes,
            max_database_bytes,
            database_bytes: AtomicU64::new(0),
            opened: Instant::now(),
            asked_at: AtomicU64::new(0),
            free_bytes: AtomicU64::new(u64::MAX),
            free_inodes: AtomicU64::new(u64::MAX),
            reserved_inodes: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            claims: AtomicU64::new(0),
            warned: AtomicBool::new(false),
            logged: AtomicU8::new(DiskSpace::Enough as u8),
        };
        inner.ask();
        Self { inner: Arc::new(inner) }
    }

    /// What there is room for.
    pub fn space(&self) -> DiskSpace {
        let (free, reserve) = (self.inner.free_bytes(), self.inner.reserve_bytes);
        if free < reserve || self.inner.database_is_full() {
            DiskSpace::Full
        } else if self.inner.folder.is_some() && (free < reserve.saturating_mul(2) || !self.inner.has_inodes(1)) {
            DiskSpace::Low
        } else {
            DiskSpace::Enough
        }
    }

    /// How many bytes are free on the disk, if that is looked at.
    pub fn free_bytes(&self) -> Option<u64> {
        self.inner.folder.as_ref().map(|_| self.inner.free_bytes()).filter(|free| *free != u64::MAX)
    }

    /// How many more files the disk can have, if that is looked at and the file system has a limit.
    pub fn free_inodes(&self) -> Option<u64> {
        self.inner.refresh();
        Some(self.inner.free_inodes.load(Ordering::Relaxed)).filter(|free| *free != u64::MAX)
    }

    /// Lets messages, accounts, devices and keys in while there is room for them.
    pub fn check_growth(&self) -> Result<(), InsufficientSpace> {
        if self.space() == DiskSpace::Full { Err(InsufficientSpace) } else { Ok(()) }
    }

    /// Room for an attachment of this size, while it is being uploaded.
    pub fn room_for_attachment(&self, bytes: u64) -> Option<Claim> {
        let claimed = self.inner.claimed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let claims = self.inner.claims.fetch_add(1, Ordering::Relaxed) + 1;
        let claim = Claim { disk: self.clone(), bytes };
        let free = self.inner.free_bytes().saturating_sub(claimed);
        let is_room = self.inner.folder.is_none()
            || free >= self.inner.reserve_bytes.saturating_mul(2) && self.inner.has_inodes(claims);
        (is_room && !self.inner.database_is_full()).then_some(claim)
    }

    /// Whether the size of the database has to be known.
    pub fn bounds_database(&self) -> bool {
        self.inner.max_database_bytes > 0
    }

    /// Takes note of the size of the database.
    pub fn database_has(&self, bytes: u64) {
        self.inner.database_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Tells the operator when there has come to be less room, or more again.
    pub fn log_space(&self) {
        let room = self.space();
        if self.inner.logged.swap(room as u8, Ordering::Relaxed) == room as u8 {
            return;
        }
        match room {
            DiskSpace::Enough => info!("there is room again; nothing is refused for lack of it"),
            DiskSpace::Low => warn!("the disk is nearly full, or out of inodes; new attachments are refused"),
            DiskSpace::Full => {
                warn!("there is no room to grow; new attachments, messages, accounts, devices and keys are refused");
            }
        }
    }
}

/// What an upload that is under way will take of the disk. Dropping it gives up the claim.
#[derive(Debug)]
pub struct Claim {
    disk: Disk,
    bytes: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.disk.inner.claimed.fetch_sub(self.bytes, Ordering::Relaxed);
        self.disk.inner.claims.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    fn database_is_full(&self) -> bool {
        self.max_database_bytes > 0 && self.database_bytes.load(Ordering::Relaxed) > self.max_database_bytes
    }

    /// The free space as it was at most about a second ago.
    fn free_bytes(&self) -> u64 {
        self.refresh();
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// True when this many files can be made without touching the reserve.
    fn has_inodes(&self, files: u64) -> bool {
        let [free, reserved] = [&self.free_inodes, &self.reserved_inodes].map(|number| number.load(Ordering::Relaxed));
        free >= reserved.saturating_add(files)
    }

    /// One caller in a second asks the file system.
    fn refresh(&self) {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        let asked_at = self.asked_at.load(Ordering::Relaxed);
        let is_stale = now.saturating_sub(asked_at) >= FRESH_MILLIS;
        let may_ask = || self.asked_at.compare_exchange(asked_at, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_stale && may_ask() {
            self.ask();
        }
    }

    fn ask(&self) {
        let Some(folder) = &self.folder else { return };
        let free = match rustix::fs::statvfs(folder) {
            Ok(found) => {
                // Some file systems, such as btrfs, have no fixed number, and say zero.
                let inodes = if found.f_files == 0 { u64::MAX } else { found.f_favail };
                self.free_inodes.store(inodes, Ordering::Relaxed);
                self.reserved_inodes.store(RESERVED_INODES.min(found.f_files / 10), Ordering::Relaxed);
                found.f_bavail.saturating_mul(found.f_frsize)
            }
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    warn!(%error, "the free disk space can't be found out, so nothing is refused for lack of it");
                }
                u64::MAX
            }
        };
        self.free_bytes.store(free, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_bytes(folder: &std::path::Path) -> u64 {
        let found = rustix::fs::statvfs(folder).unwrap();
        found.f_bavail * found.f_frsize
    }

    #[test]
    fn uploads_under_way_count_as_if_they_were_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::new(Some(folder.path().to_owned()), 1, 0);
        let most = free_bytes(folder.path()) / 4 * 3;
        let first = disk.room_for_attachment(most).unwrap();
        assert!(disk.room_for_attachment(most).is_none());
        drop(first);
        assert!(disk.room_for_attachment(most).is_some());
    }

    #[test]
    fn messages_are_taken_for_longer_than_attachments() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(folder.path());
        let room = |reserve| {
            let disk = Disk::new(Some(folder.path().to_owned()), reserve, 0);
            (disk.space(), disk.check_growth().is_ok(), disk.room_for_attachment(1).is_some())
        };
        assert_eq!(room(free / 4), (DiskSpace::Enough, true, true));
        assert_eq!(room(free / 4 * 3), (DiskSpace::Low, true, false));
        assert_eq!(room(free.saturating_mul(2)), (DiskSpace::Full, false, false));
        assert_eq!(room(u64::MAX), (DiskSpace::Full, false, false));
    }

    #[test]
    fn attachments_are_refused_before_the_last_inodes_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::new(Some(folder.path().to_owned()), 1, 0);
        let inner = &disk.inner;
        inner.asked_at.store(inner.opened.elapsed().as_millis() as u64 + 60_000, Ordering::Relaxed);
        inner.reserved_inodes.store(10, Ordering::Relaxed);
        inner.free_inodes.store(12, Ordering::Relaxed);
        let claims: Vec<_> = (0..3).filter_map(|_| disk.room_for_attachment(1)).collect();
        assert_eq!((claims.len(), disk.space()), (2, DiskSpace::Enough));
        inner.free_inodes.store(10, Ordering::Relaxed);
        assert_eq!((disk.space(), disk.check_growth()), (DiskSpace::Low, Ok(())), "messages need no inode");
        inner.free_inodes.store(u64::MAX, Ordering::Relaxed);
        assert_eq!((disk.space(), disk.free_inodes()), (DiskSpace::Enough, None));
    }

    #[test]
    fn no_reserve_or_no_folder_means_room() {
        let folder = tempfile::tempdir().unwrap();
        for disk in [Disk::new(Some(folder.path().to_owned()), 0, 0), Disk::new(None, u64::MAX / 2, 0)] {
            assert!(disk.check_growth().is_ok() && disk.room_for_attachment(1).is_some());
        }
    }

    #[test]
    fn a_file_system_that_does_not_answer_has_room() {
        let disk = Disk::new(Some("/nowhere/at/all".into()), u64::MAX / 2, 0);
        assert!(disk.check_growth().is_ok() && disk.room_for_attachment(1).is_some());
        assert!(disk.inner.warned.load(Ordering::Relaxed));
    }

    #[test]
    fn an_answer_is_used_for_about_a_second() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::new(Some(folder.path().to_owned()), 1, 0);
        disk.inner.free_bytes.store(0, Ordering::Relaxed);
        let asked_just_now = disk.inner.opened.elapsed().as_millis() as u64;
        disk.inner.asked_at.store(asked_just_now, Ordering::Relaxed);
        assert_eq!(disk.check_growth(), Err(InsufficientSpace));
    }

    #[test]
    fn a_database_above_its_bound_has_no_room_and_one_at_it_has() {
        let disk = Disk::new(None, 0, 1000);
        disk.database_has(1000);
        assert_eq!((disk.space(), disk.room_for_attachment(1).is_some()), (DiskSpace::Enough, true));
        disk.database_has(1001);
        assert_eq!((disk.space(), disk.room_for_attachment(1).is_some()), (DiskSpace::Full, false));
        let unbounded = Disk::new(None, 0, 0);
        unbounded.database_has(u64::MAX);
        assert_eq!((unbounded.space(), unbounded.bounds_database()), (DiskSpace::Enough, false));
    }
}
