//! So that what every client can cause at will, such as a request while the database is away, doesn't fill the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The pause between two lines of the same kind.
const PAUSE: Duration = Duration::from_secs(10);

/// Lets one line through in ten seconds. The metrics count the others. It is about the log, which a process has one of;
/// so it may be a `static`, as nothing else is.
#[derive(Debug)]
pub struct LogThrottle {
    last: Mutex<Option<Instant>>,
    pause: Duration,
}

impl LogThrottle {
    /// The first line is let through.
    pub const fn new() -> Self {
        Self::every(PAUSE)
    }

    /// The same with this pause between two lines.
    pub const fn every(pause: Duration) -> Self {
        Self { last: Mutex::new(None), pause }
    }

    /// Whether this line may be logged above `debug`.
    pub fn try_acquire(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|at| at.elapsed() >= self.pause);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

impl Default for LogThrottle {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_at_once_one_is_let_through() {
        let throttle = LogThrottle::new();
        assert_eq!((0..1000).filter(|_| throttle.try_acquire()).count(), 1);
        *throttle.last.lock().unwrap() = Instant::now().checked_sub(PAUSE);
        assert_eq!((0..1000).filter(|_| throttle.try_acquire()).count(), 1);
    }
}
