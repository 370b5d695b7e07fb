//! A connection that ends when its client makes no progress.
//!
//! The bytes that the kernel has accepted say little about the client, because a send buffer grows to megabytes. So the
//! listener limits how much may wait unsent (`TCP_NOTSENT_LOWAT`). Then each accepted byte beyond [`UNSENT_BYTES`] means
//! that an earlier byte is on its way to the client. These bytes count as progress.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tracing::debug;

use crate::api::connections::Permit;
use crate::gateway::{ConnectionProgress, SUSPENDED_AFTER};
use crate::limits::LEAST_RATE;
use crate::listener::linger::Lingering;
use crate::telemetry::metrics::ActiveGuard;

/// How many bytes of a connection the kernel may hold unsent.
pub(super) const UNSENT_BYTES: u32 = 128 << 10;
/// The most that the kernel really holds unsent: it accepts whole pieces, and the last one may pass the limit.
const MOST_UNSENT: u64 = UNSENT_BYTES as u64 + (64 << 10);
/// The longest time in which a client that took much may take nothing. A proxy takes megabytes at once, and then nothing
/// until its own client has read a third of them.
const LONGEST_STALL: Duration = Duration::from_mins(3);

/// What all connections of a listener have in common.
pub(super) struct Common {
    /// How long a new client may take nothing.
    pub write_timeout: Duration,
    pub lingering: Lingering,
}

/// A connection that counts the bytes its client takes, and ends when the client is too slow. It holds its place among the
/// open connections as long as it lives, also as a WebSocket. If bytes of its client are unread at the end, the connection
/// goes to [`Lingering`].
pub(super) struct TimedStream {
    /// Present until it is dropped.
    stream: Option<TcpStream>,
    progress: Arc<ConnectionProgress>,
    common: Arc<Common>,
    /// Accepted by the kernel so far.
    written: u64,
    /// How long the client may still make the server wait, in bytes at [`LEAST_RATE`].
    credit: u64,
    /// When a write last went on after it had to wait.
    moved_on: Option<Instant>,
    /// Runs while a write waits for the client to read. Boxed, because most connections never need it.
    stalled: Option<Box<Stall>>,
    place: Option<(Permit, ActiveGuard)>,
}

struct Stall {
    began: Instant,
    end: Pin<Box<Sleep>>,
}

impl TimedStream {
    pub fn new(
        stream: TcpStream,
        progress: Arc<ConnectionProgress>,
        common: Arc<Common>,
        place: (Permit, ActiveGuard),
    ) -> Self {
        let credit = bytes_in(common.write_timeout);
        Self {
            stream: Some(stream),
            progress,
            common,
            written: 0,
            credit,
            moved_on: None,
            stalled: None,
            place: Some(place),
        }
    }

    pub fn progress(&self) -> &Arc<ConnectionProgress> {
        &self.progress
    }

    fn stream(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.stream.as_mut().expect("it is there until the drop"))
    }

    fn watch(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let Poll::Ready(done) = written else { return self.wait(context) };
        let bytes = done.as_ref().copied().unwrap_or_default() as u64;
        if let Some(stall) = self.stalled.take() {
            self.credit = self.credit.saturating_sub(bytes_in(stall.began.elapsed()));
            self.moved_on = Some(Instant::now());
        }
        // The first bytes, which may still be unsent, don't count; all later ones do.
        let unsent_before = MOST_UNSENT.saturating_sub(self.written);
        self.written += bytes;
        let taken = bytes.saturating_sub(unsent_before);
        if taken > 0 {
            let most = bytes_in(LONGEST_STALL.max(self.common.write_timeout));
            self.credit = (self.credit + taken).min(most);
            self.progress.add(taken);
        }
        Poll::Ready(done)
    }

    /// A write has to wait. Returns an error when the client has used up its time.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let stall = match &mut self.stalled {
            Some(stall) => stall,
            none => {
                let (now, timeout) = (Instant::now(), self.common.write_timeout);
                // A client that has kept up for a while gets its first time back.
                if self.moved_on.is_none_or(|moved_on| now.duration_since(moved_on) >= timeout) {
                    self.credit = self.credit.max(bytes_in(timeout));
                }
                let end = now + Duration::from_millis(self.credit.saturating_mul(1000) / LEAST_RATE);
                none.insert(Box::new(Stall { began: now, end: Box::pin(tokio::time::sleep_until(end)) }))
            }
        };
        std::task::ready!(stall.end.as_mut().poll(context));
        let now = Instant::now();
        if now.duration_since(stall.end.deadline()) > SUSPENDED_AFTER {
            // The server was paused, and has not seen yet what the client took meanwhile.
            stall.end.as_mut().reset(now + self.common.write_timeout);
            (self.credit, stall.began) = (bytes_in(self.common.write_timeout), now);
            return stall.end.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()));
        }
        debug!("a client that takes too little is being disconnected");
        self.progress.set_stalled();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

/// What a client has to take in this time.
fn bytes_in(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).saturating_mul(LEAST_RATE) / 1000
}

impl Drop for TimedStream {
    fn drop(&mut self) {
        let (Some(stream), place) = (self.stream.take(), self.place.take()) else { return };
        if self.progress.is_left_unread() {
            self.common.lingering.take_over(stream, place);
        }
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (this, before) = (self.get_mut(), buffer.filled().len());
        let read = this.stream().poll_read(context, buffer);
        this.progress.add_read(buffer.filled().len() - before);
        read
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.stream().poll_write(context, bytes);
        this.watch(context, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.stream().poll_write_vectored(context, bytes);
        this.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_shutdown(context)
    }
}
