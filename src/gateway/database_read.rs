//! A session's look at the database, with a time limit.

use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use crate::store::Result;
use crate::tasks::jittered;

/// The longest time for one look at the database.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The first pause after a failed read of the database; it doubles up to [`MAX_RETRY_PAUSE`].
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// The longest pause while the retry budget lasts. After that it is as long as the budget.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A failing database is asked again, ever more slowly.
#[derive(Clone, Copy)]
pub(super) struct Retry {
    pub(super) since: Instant,
    pub(super) pause: Duration,
    pub(super) due: Instant,
}

impl Retry {
    /// The next attempt behind one that has just failed.
    pub(super) fn after(former: Option<Self>, budget: Duration) -> Self {
        let now = Instant::now();
        let (since, pause) = match former {
            Some(former) => (former.since, (former.pause * 2).min(MAX_RETRY_PAUSE)),
            None => (now, FIRST_RETRY),
        };
        let pause = if now.duration_since(since) < budget { pause } else { budget.max(MAX_RETRY_PAUSE) };
        Self { since, pause, due: now + jittered(pause) }
    }
}

/// Why there is no frame to send.
pub(super) enum ReadError {
    /// The device is gone or logged out.
    Dismissed,
    /// The database failed or took too long. It has been logged.
    Failed,
}

/// What a look at the database found, within the time that one may take.
pub(super) async fn with_timeout<T>(read: impl Future<Output = Result<T>>) -> std::result::Result<T, ReadError> {
    match tokio::time::timeout(READ_TIMEOUT, read).await {
        Ok(Ok(value)) => Ok(value),
        // An outage fails the looks of all sessions, and the requests log it already.
        Ok(Err(error)) => {
            debug!(%error, "a session could not read the database; it will try again");
            Err(ReadError::Failed)
        }
        Err(_) => {
            debug!("a session waited too long for the database; it will try again");
            Err(ReadError::Failed)
        }
    }
}
