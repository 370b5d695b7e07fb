//! How fast one client takes its frames: how large the next one may be, and how long its silence means only that it reads.

use std::time::Duration;

use tokio::time::Instant;

use crate::gateway::pipe::LEAST_RATE;

/// A frame with up to so many bytes of messages, or with a single larger one, is sent however little memory is left.
pub(super) const MODEST_BYTES: usize = 64 << 10;
/// The first frame of a socket has up to so many bytes of messages. A client that takes frames quickly gets larger ones,
/// up to the configured size, and one that takes them slowly smaller ones, so that they arrive before its network changes.
const FIRST_FRAME_BYTES: usize = 256 << 10;
/// A frame that is taken in this time may be followed by one of twice its size.
const QUICK: Duration = Duration::from_millis(500);
/// One that takes longer is followed by one of half its size.
const SLOW: Duration = Duration::from_secs(4);
/// The longest time that a client may be silent for because it is still reading: buffers and proxies between hold some
/// megabytes, and neither a ping nor an answer passes them.
const LONGEST_READING: Duration = Duration::from_mins(10);

/// The pace of one client.
pub(super) struct Pace {
    /// Until then the client may still be reading what it was sent.
    reading_until: Instant,
    /// The most that the next frame may have, in bytes of messages.
    frame_limit: usize,
    /// Size of the frame under way, and when it was started.
    frame: (usize, Instant),
}

impl Pace {
    /// That of a client of which nothing is known yet.
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
    pub(super) fn starts(&mut self, size: usize, now: Instant) {
        self.frame = (size, now);
    }

    /// The frame under way, or an answer to a ping, has been handed to the kernel, and the client has taken so many bytes
    /// meanwhile. No frame may be larger than `most`.
    pub(super) fn was_taken(&mut self, taken: u64, most: usize) {
        let now = Instant::now();
        self.takes(taken, now);
        let (size, began) = std::mem::replace(&mut self.frame, (0, now));
        let took = now.duration_since(began);
        if size == 0 {
            return;
        }
        if took > SLOW {
            self.frame_limit = (self.frame_limit / 2).max(MODEST_BYTES);
        } else if took < QUICK && size > self.frame_limit / 2 {
            self.frame_limit = (self.frame_limit * 2).min(most.max(MODEST_BYTES));
        }
    }

    /// Gives the client time for what it has taken. True when that is anything.
    pub(super) fn takes(&mut self, taken: u64, now: Instant) -> bool {
        if taken > 0 {
            let time = Duration::from_millis(taken.saturating_mul(1000) / LEAST_RATE);
            self.reading_until = (self.reading_until.max(now) + time).min(now + LONGEST_READING);
        }
        taken > 0
    }
}
