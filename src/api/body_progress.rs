//! The body of a request while it comes in: its progress, the time limit for slow senders, and what happens to the unread rest.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::time::Instant;

use crate::gateway::{ConnectionProgress, SUSPENDED_AFTER};
use crate::limits::LEAST_RATE;

/// An unread rest of at most this size is left to hyper. Hyper often has it already, and then the connection stays open.
const SMALL_REST: u64 = 64 << 10;

/// Before an early answer through a proxy, bodies up to this size are read, for this time.
const MAX_READ_AHEAD: u64 = 8 << 20;
const MAX_READ_AHEAD_TIME: Duration = Duration::from_secs(30);

/// How much of a request's body has come in, and since when. Times are milliseconds since the head was read.
#[derive(Debug)]
pub struct BodyProgress {
    began: Instant,
    bytes: AtomicU64,
    last: AtomicU64,
    is_whole: AtomicBool,
    /// The body, if it was dropped before its end.
    rest: Mutex<Option<Incoming>>,
}

impl BodyProgress {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            bytes: AtomicU64::new(0),
            last: AtomicU64::new(0),
            is_whole: false.into(),
            rest: Mutex::default(),
        }
    }

    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.touch();
    }

    fn set_complete(&self) {
        self.is_whole.store(true, Ordering::Relaxed);
        self.touch();
    }

    fn touch(&self) {
        let since = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(since, Ordering::Relaxed);
    }

    /// Reads the rest of the body and throws it away, if the body is not large. For answers through a proxy: some proxies
    /// close their client's connection when an answer comes early, and the client then loses the answer.
    pub async fn read_to_end(&self, announced: Option<u64>, progress: &ConnectionProgress) {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(body) = &mut rest else { return };
        if announced.is_some_and(|announced| announced > MAX_READ_AHEAD) {
            return;
        }
        let reading = async {
            while self.bytes.load(Ordering::Relaxed) <= MAX_READ_AHEAD {
                match body.frame().await {
                    Some(Ok(frame)) => self.add(frame.data_ref().map_or(0, Bytes::len)),
                    Some(Err(_)) => return,
                    None => {
                        self.set_complete();
                        progress.clear_left_unread();
                        return;
                    }
                }
            }
        };
        let _ = tokio::time::timeout(MAX_READ_AHEAD_TIME, reading).await;
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}

/// Until when a request has to be answered. The limit counts from the last byte of the body, but a body that comes in
/// more slowly than [`LEAST_RATE`] uses it up.
pub struct Deadline {
    at: Instant,
    limit: Duration,
    seen: u64,
}

impl Deadline {
    /// This long from now, or from the last byte of the body.
    pub fn new(limit: Duration) -> Self {
        Self { at: Instant::now() + limit, limit, seen: 0 }
    }

    /// The time at which [`Deadline::check_expired`] has to be asked.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// True when the time is over at `now`. Otherwise bytes have come in that put it off.
    pub fn check_expired(&mut self, body_progress: Option<&BodyProgress>, now: Instant) -> bool {
        if now.saturating_duration_since(self.at) > SUSPENDED_AFTER {
            self.at = now + self.limit;
            return false;
        }
        let Some(body_progress) = body_progress else { return true };
        let bytes = body_progress.bytes.load(Ordering::Relaxed);
        let latest = body_progress.last() + self.limit;
        self.at = if body_progress.is_whole.load(Ordering::Relaxed) {
            latest
        } else {
            latest.min(self.at + time_for(bytes - self.seen))
        };
        self.seen = bytes;
        self.at <= now
    }
}

/// How long this number of bytes may take.
fn time_for(bytes: u64) -> Duration {
    Duration::from_millis(bytes.saturating_mul(1000) / LEAST_RATE)
}

/// A body that reports its progress. If it is dropped before its end, the connection is read on after the answer.
pub struct TrackedBody {
    /// Present until it is dropped.
    body: Option<Incoming>,
    body_progress: Arc<BodyProgress>,
    progress: Arc<ConnectionProgress>,
}

impl TrackedBody {
    /// The body of a request on the connection with this progress; `None` for a request without one.
    pub fn watch(body: Incoming, progress: &Arc<ConnectionProgress>) -> (Body, Option<Arc<BodyProgress>>) {
        if body.is_end_stream() {
            return (Body::empty(), None);
        }
        let body_progress = Arc::new(BodyProgress::new());
        (
            Body::new(Self { body: Some(body), body_progress: body_progress.clone(), progress: progress.clone() }),
            Some(body_progress),
        )
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => this.body_progress.add(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(_)) => {}
            None => this.body_progress.set_complete(),
        }
        if body.is_end_stream() {
            this.body_progress.set_complete();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        if !self.body_progress.is_whole.load(Ordering::Relaxed) {
            self.progress.set_left_unread();
            *self.body_progress.rest.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
        }
    }
}

/// Adds `connection: close` to an answer if much of the request's body is still unread; that rest is thrown away.
pub fn announce_end(response: &mut Response, body_progress: &BodyProgress, length: Option<u64>) {
    let missing = length.map(|length| length.saturating_sub(body_progress.bytes.load(Ordering::Relaxed)));
    if !body_progress.is_whole.load(Ordering::Relaxed) && missing.is_none_or(|missing| missing > SMALL_REST) {
        response.headers_mut().append(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// The announced length of a body; `None` for one that comes in chunks.
pub fn announced_length(headers: &HeaderMap) -> Option<u64> {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        return None;
    }
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Plays a body that comes in with `rate` bytes a second until it has `total`; answers when it was cut, if it was.
    async fn played(limit: Duration, rate: u64, total: u64) -> Option<Duration> {
        let (body_progress, mut deadline) = (BodyProgress::new(), Deadline::new(limit));
        for _ in 0..total / rate {
            tokio::time::advance(SECOND).await;
            let now = Instant::now();
            if deadline.at() <= now && deadline.check_expired(Some(&body_progress), now) {
                return Some(body_progress.began.elapsed());
            }
            body_progress.add(usize::try_from(rate).unwrap());
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_as_long_as_it_comes_in_steadily() {
        assert_eq!(played(30 * SECOND, 20_000, 50 << 20).await, None);
        assert_eq!(played(120 * SECOND, 350_000, 50 << 20).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_in_uses_its_time_up() {
        let took = played(30 * SECOND, 1, 2 << 20).await.unwrap();
        assert!(took <= 31 * SECOND, "{took:?}");
        let took = played(30 * SECOND, LEAST_RATE / 2, 2 << 20).await.unwrap();
        assert!(took < 75 * SECOND, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_has_its_whole_time_behind_the_last_byte_and_behind_a_pause() {
        let (body_progress, mut deadline) = (BodyProgress::new(), Deadline::new(3 * SECOND));
        tokio::time::advance(2 * SECOND).await;
        body_progress.add(1);
        body_progress.set_complete();
        tokio::time::advance(SECOND).await;
        assert!(!deadline.check_expired(Some(&body_progress), Instant::now()));
        assert_eq!(deadline.at(), body_progress.began + 5 * SECOND);
        tokio::time::advance(2 * SECOND).await;
        assert!(deadline.check_expired(Some(&body_progress), Instant::now()));
        let mut paused = Deadline::new(SECOND);
        tokio::time::advance(60 * SECOND).await;
        assert!(!paused.check_expired(None, Instant::now()));
        tokio::time::advance(SECOND).await;
        assert!(paused.check_expired(None, Instant::now()));
    }
}
