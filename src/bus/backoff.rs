//! How long to wait before the next attempt to reach Valkey.

use std::time::Duration;

use crate::config;
use crate::tasks::jittered;

/// The pauses between attempts to connect.
pub struct Backoff {
    next: Duration,
    min: Duration,
    max: Duration,
    stable_after: Duration,
}

impl Backoff {
    /// Starts with the shortest pause.
    pub fn new(config: &config::Pubsub) -> Self {
        let config::Pubsub { min_backoff: min, max_backoff: max, stable_after, .. } = *config;
        Self { next: min, min, max, stable_after }
    }

    /// The next pause, 1.5 times the one before: a Valkey that was away for a short time is found soon after it is back, and
    /// one that stays away is tried ever more rarely. It starts over after a connection that held for long enough.
    pub fn pause(&mut self, held: Option<Duration>) -> Duration {
        if held.is_some_and(|held| held >= self.stable_after) {
            self.next = self.min;
        }
        let pause = self.next;
        self.next = (pause * 3 / 2).min(self.max);
        jittered(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn it_grows_by_half_up_to_its_limit_and_starts_over_after_a_good_connection() {
        let seconds = Duration::from_secs;
        let (min_backoff, max_backoff, stable_after) = (seconds(1), seconds(5), seconds(30));
        let config = config::Pubsub { url: Secret::new("local:"), min_backoff, max_backoff, stable_after };
        let mut backoff = Backoff::new(&config);
        let held = [None, Some(seconds(29)), None, None, None, None, Some(seconds(30)), None];
        let pauses = held.map(|held| backoff.pause(held).as_secs_f64());
        for (pause, expected) in pauses.into_iter().zip([1.0, 1.5, 2.25, 3.375, 5.0, 5.0, 1.0, 1.5]) {
            assert!((0.85 * expected..1.15 * expected).contains(&pause), "{pauses:?}");
        }
    }
}
