//! Accepts connections and serves HTTP on them, each within bounds.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tower::ServiceExt;
use tracing::{debug, error, info};

use crate::api::connections::{Connections, Permit};
use crate::gateway::Progress;
use crate::tasks::Tasks;
use crate::telemetry::metrics::{Held, Metrics, Port};

/// The most that hyper buffers of a connection: bounds the request head and what is read ahead of a body.
const BUFFER_BYTES: usize = 64 << 10;
/// After accepting has failed (no descriptors left, say), before it is tried again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Open files beside connections: databases, attachments on their way, logs.
const OTHER_FILES: u64 = 128;

/// Raises this process's limit of open files as far as it may, and answers how many of `wanted` connections fit.
pub fn connections_that_fit(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let open_files = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        Err(_) => limit.current,
    };
    let fit = open_files.map_or(u64::MAX, |files| files.saturating_sub(OTHER_FILES).max(files / 2));
    let fit = usize::try_from(fit).unwrap_or(usize::MAX);
    if fit < wanted {
        info!(
            connections = fit,
            "as many connections as the system allows open files for, fewer than --server-max-connections"
        );
    }
    fit.min(wanted)
}

/// How long a client may make the server wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For each request head, and for the pause before it.
    pub head: Duration,
    /// For the next byte of an answer or a frame to be taken.
    pub write: Duration,
}

/// Serves `router` on every connection that comes in, until shutdown.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: Connections,
    patience: Patience,
    (port, metrics): (Port, Metrics),
    tasks: Tasks,
) {
    loop {
        let accepted = tokio::select! {
            () = tasks.stopping() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                error!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
                continue;
            }
        };
        // Above the caps a connection is closed at once: answering would cost what the cap is there to save.
        let Some(permit) = connections.admit(peer.ip()) else {
            metrics.connections_turned_away.one(port);
            debug!("a connection above the caps was turned away");
            continue;
        };
        let _ = stream.set_nodelay(true);
        metrics.connections_accepted.one(port);
        let place = (permit, metrics.connections.hold(port));
        let progress = Arc::<Progress>::default();
        let stream = Bounded { stream, progress, write_timeout: patience.write, stalled: None, _place: place };
        tasks.attend(converse(stream, peer, router.clone(), patience.head, tasks.clone()));
    }
}

/// One connection, from its first request to its last.
async fn converse(stream: Bounded, peer: SocketAddr, router: Router, head_timeout: Duration, tasks: Tasks) {
    let progress = stream.progress.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        request.extensions_mut().insert(progress.clone());
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tasks.stopping() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection ended early");
    }
}

/// A connection that counts the bytes the kernel takes, ends when it takes none for too long, and holds its place among
/// the open ones for as long as it lives, also as a WebSocket.
struct Bounded {
    stream: TcpStream,
    progress: Arc<Progress>,
    write_timeout: Duration,
    /// Runs while a write waits for the client to read. Boxed, because most connections never need it.
    stalled: Option<Pin<Box<Sleep>>>,
    _place: (Permit, Held),
}

impl Bounded {
    fn watch(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(done) = written {
            self.stalled = None;
            self.progress.add(done.as_ref().copied().unwrap_or_default());
            return Poll::Ready(done);
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        std::task::ready!(stalled.as_mut().poll(context));
        self.progress.has_stalled();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Bounded {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.watch(context, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, bytes);
        this.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_connections_are_promised_than_files_may_be_open() {
        assert_eq!(connections_that_fit(1), 1);
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!((connections_that_fit(usize::MAX) as u64) <= files);
    }
}
