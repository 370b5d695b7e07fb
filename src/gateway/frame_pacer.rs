//! How fast one client takes its frames: how large the next frame may be, and how long the client may be silent while it
//! reads.

use std::time::Duration;

use tokio::time::Instant;

use crate::gateway::memory::SMALL_FRAME_BYTES;
use crate::limits::LEAST_RATE;

/// The first frame of a socket has at most this many bytes of messages. A client that takes frames quickly gets larger ones,
/// up to the configured size. A slow client gets smaller ones, so that a frame arrives before the network changes.
const FIRST_FRAME_BYTES: usize = 256 << 10;
/// After a frame that was taken within this time, the next one may be twice as large.
const QUICK: Duration = Duration::from_millis(500);
/// After a frame that took longer than this, the next one is half as large.
const SLOW: Duration = Duration::from_secs(4);
/// The longest silence of a client that is still reading: buffers and proxies on the way hold some megabytes, and no ping
/// overtakes them.
const MAX_READING_TIME: Duration = Duration::from_mins(10);

/// The pace of one client.
pub(super) struct FramePacer {
    /// Until then the client may still be reading what it was sent.
    reading_until: Instant,
    /// The most that the next frame may have, in bytes of messages.
    frame_limit: usize,
    /// Size of the frame under way, and when it was started.
    frame: (usize, Instant),
}

impl FramePacer {
    /// The pace of a new client.
    pub(super) fn new(now: Instant) -> Self {
        Self { reading_until: now, frame_limit: FIRST_FRAME_BYTES, frame: (0, now) }
    }

    /// The most that the next frame may have, in bytes of messages.
    pub(super) fn frame_limit(&self) -> usize {
        self.frame_limit
    }

    /// Until when the client may be silent because it still reads.
    pub(super) fn reading_until(&self) -> Instant {
        self.reading_until
    }

    /// A frame of this size is started.
    pub(super) fn frame_started(&mut self, size: usize, now: Instant) {
        self.frame = (size, now);
    }

    /// The frame under way, or an answer to a ping, has been handed to the kernel, and the client has taken this many bytes
    /// meanwhile. No frame may be larger than `max_size`.
    pub(super) fn frame_written(&mut self, taken: u64, max_size: usize) {
        let now = Instant::now();
        self.record_progress(taken, now);
        let (size, began) = std::mem::replace(&mut self.frame, (0, now));
        let took = now.duration_since(began);
        if size == 0 {
            return;
        }
        if took > SLOW {
            self.frame_limit = (self.frame_limit / 2).max(SMALL_FRAME_BYTES);
        } else if took < QUICK && size > self.frame_limit / 2 {
            self.frame_limit = (self.frame_limit * 2).min(max_size.max(SMALL_FRAME_BYTES));
        }
    }

    /// Gives the client time for the bytes that it has taken. Returns true if there are any.
    pub(super) fn record_progress(&mut self, taken: u64, now: Instant) -> bool {
        if taken > 0 {
            let time = Duration::from_millis(taken.saturating_mul(1000) / LEAST_RATE);
            self.reading_until = (self.reading_until.max(now) + time).min(now + MAX_READING_TIME);
        }
        taken > 0
    }
}
