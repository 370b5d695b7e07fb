//! Being on time.

use std::time::{Duration, Instant};

/// The runtime's timer counts whole milliseconds and may be late by one of them.
const COARSE: Duration = Duration::from_millis(2);

/// Waits until `moment`, to within a tenth of a millisecond or so: what comes later would be taken for the server's
/// latency.
pub async fn until(moment: Instant) {
    if let Some(early) = moment.checked_sub(COARSE) {
        tokio::time::sleep_until(early.into()).await;
    }
    let rest = moment.saturating_duration_since(Instant::now());
    if !rest.is_zero() {
        // It can only fail when the runtime ends.
        let _ = tokio::task::spawn_blocking(move || std::thread::sleep(rest)).await;
    }
}
