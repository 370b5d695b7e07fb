//! How fast one socket is read. Every frame costs work, whatever its content is, so frames cost tokens. Without tokens the
//! socket is read later; nothing that its client sent is dropped. Acks of messages that were sent on this socket are free,
//! because there are no more of them than deliveries.

use std::time::Duration;

use tokio::time::Instant;

/// Tokens of a new socket: enough for pings, and for acks of messages that were sent on an earlier socket.
const BURST: u32 = 2000;
/// From one token to the next.
const TOKEN_INTERVAL: Duration = Duration::from_millis(10);
/// Bytes that cost a token while they are not a whole message yet. A client could send empty parts of one without end.
pub(super) const BYTES_PER_TOKEN: u32 = 256;

/// The tokens of one socket.
pub(super) struct ReadLimiter {
    /// When all tokens are back.
    full_at: Instant,
    /// While there are none: when there is one again.
    closed_until: Option<Instant>,
}

impl ReadLimiter {
    pub(super) fn new(now: Instant) -> Self {
        Self { full_at: now, closed_until: None }
    }

    /// Takes tokens; more than there are leave a debt.
    pub(super) fn charge(&mut self, tokens: u32, now: Instant) {
        self.full_at = self.full_at.max(now) + TOKEN_INTERVAL * tokens;
        let opens_at = self.full_at.checked_sub(TOKEN_INTERVAL * BURST).unwrap_or(now);
        self.closed_until = Some(opens_at).filter(|opens_at| *opens_at > now);
    }

    /// True while the socket may be read.
    pub(super) fn is_open(&self) -> bool {
        self.closed_until.is_none()
    }

    /// When [`ReadLimiter::reopen`] is due.
    pub(super) fn reopens_at(&self) -> Option<Instant> {
        self.closed_until
    }

    /// Opens again if it is time. True if it was closed until now.
    pub(super) fn reopen(&mut self, now: Instant) -> bool {
        let is_due = self.closed_until.is_some_and(|opens_at| opens_at <= now);
        if is_due {
            self.closed_until = None;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_a_debt_is_waited_for() {
        let start = Instant::now();
        let mut read_limiter = ReadLimiter::new(start);
        for _ in 0..BURST {
            read_limiter.charge(1, start);
        }
        assert!(read_limiter.is_open());
        read_limiter.charge(3, start);
        assert!(!read_limiter.is_open());
        assert_eq!(read_limiter.reopens_at(), Some(start + 3 * TOKEN_INTERVAL));
        assert!(!read_limiter.reopen(start + 2 * TOKEN_INTERVAL));
        assert!(read_limiter.reopen(start + 3 * TOKEN_INTERVAL) && read_limiter.is_open());
        assert!(!read_limiter.reopen(start + 3 * TOKEN_INTERVAL), "once");
    }

    #[test]
    fn tokens_come_back_up_to_the_burst() {
        let start = Instant::now();
        let mut read_limiter = ReadLimiter::new(start);
        read_limiter.charge(BURST, start);
        let later = start + 100 * TOKEN_INTERVAL * BURST;
        read_limiter.charge(BURST, later);
        assert!(read_limiter.is_open());
        read_limiter.charge(1, later);
        assert!(!read_limiter.is_open());
    }
}
