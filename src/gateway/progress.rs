//! The progress of one connection, counted by the listener and read by the session.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// The progress of one connection: how many bytes its client has taken, which tells a slow reader from one that doesn't read;
/// and whether the connection ends before everything that the client sent was read.
#[derive(Debug, Default)]
pub struct ConnectionProgress {
    taken: AtomicU64,
    stalled: AtomicBool,
    left_unread: AtomicBool,
    read: AtomicU64,
    refused: AtomicU32,
}

impl ConnectionProgress {
    /// Counts bytes that the client has taken.
    pub fn add(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The client has taken too little for too long, and the connection is being ended for that.
    pub fn set_stalled(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// The server reads no further, though the client may still be sending.
    pub fn set_left_unread(&self) {
        self.left_unread.store(true, Ordering::Relaxed);
    }

    /// All that the client has sent so far was read.
    pub fn clear_left_unread(&self) {
        self.left_unread.store(false, Ordering::Relaxed);
    }

    /// True when the client may still be sending and nothing reads it. False for a client that takes nothing either.
    pub fn is_left_unread(&self) -> bool {
        self.left_unread.load(Ordering::Relaxed) && !self.stalled.load(Ordering::Relaxed)
    }

    /// Counts bytes that were read.
    pub fn add_read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts an answer. After a refusal (429): by how many refusals exceed other answers so far. After any other answer: 0.
    pub fn count_answer(&self, is_refused: bool) -> u32 {
        // Requests of a connection come one after the other.
        let refused = self.refused.load(Ordering::Relaxed);
        let refused = if is_refused { refused.saturating_add(1) } else { refused.saturating_sub(1) };
        self.refused.store(refused, Ordering::Relaxed);
        if is_refused { refused } else { 0 }
    }

    /// Bytes that were read.
    pub(super) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// True once [`ConnectionProgress::set_stalled`] was called.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Bytes that the client has taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}
