//! When a socket is pinged.

use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Timestamp;

/// Pings that are due within this time go out together, because a wake-up costs more than a ping.
const PING_SLOT: Duration = Duration::from_millis(250);

/// When to ping again after `interval`: a little early, at the beginning of a slot that all sessions share. `wall` is the
/// time of day now.
pub(super) fn next_ping(now: Instant, wall: Timestamp, interval: Duration) -> Instant {
    let slot = PING_SLOT.min(interval / 8).as_millis().max(1);
    let due = u128::from(wall.millis().unsigned_abs()) + interval.as_millis();
    now + interval.saturating_sub(Duration::from_millis((due % slot) as u64))
}
