//! Accepts connections and serves HTTP on them, each within bounds.

mod linger;
mod stream;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{ConnectInfo, Request};
use axum::http::header;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};
use tower::ServiceExt;
use tracing::{debug, error, info, warn};

use crate::api::body_progress::{TrackedBody, announce_end, announced_length};
use crate::api::connections::Connections;
use crate::gateway::ConnectionProgress;
use crate::listener::linger::Lingering;
use crate::listener::stream::{Common, TimedStream, UNSENT_BYTES};
use crate::tasks::Tasks;
use crate::telemetry::metrics::{Metrics, Port};

/// The most that hyper buffers of a connection: bounds the request head and what is read ahead of a body.
const BUFFER_BYTES: usize = 64 << 10;
/// After accepting has failed (no descriptors left, say), before it is tried again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Connections to the API port that wait to be accepted.
const BACKLOG: u32 = 1024;
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
pub struct Timeouts {
    /// For each request head, and for the pause before it.
    pub head: Duration,
    /// For the first bytes of an answer or a frame to be taken. Each byte that a client takes gives it more time.
    pub write: Duration,
}

/// Serves `router` on every connection that comes in, until shutdown.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: Connections,
    timeouts: Timeouts,
    (port, metrics): (Port, Metrics),
    tasks: Tasks,
) {
    // Connections inherit it. Without it a client that takes nothing is noticed later.
    if let Err(error) = SockRef::from(&listener).set_tcp_notsent_lowat(UNSENT_BYTES) {
        warn!(%error, "the system does not limit what waits unsent for a client");
    }
    let lingering = Lingering::beside(&connections, tasks.clone());
    let common = Arc::new(Common { write_timeout: timeouts.write, lingering });
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
            metrics.connections_turned_away.increment(port);
            debug!("a connection above the caps was turned away");
            continue;
        };
        let _ = stream.set_nodelay(true);
        metrics.connections_accepted.increment(port);
        let place = (permit, metrics.connections.hold(port));
        let stream = TimedStream::new(stream, Arc::<ConnectionProgress>::default(), common.clone(), place);
        tasks.spawn_tracked(serve_connection(stream, peer, router.clone(), timeouts.head, tasks.clone()));
    }
}

/// One connection, from its first request to its last.
async fn serve_connection(stream: TimedStream, peer: SocketAddr, router: Router, head_timeout: Duration, tasks: Tasks) {
    let progress = stream.progress().clone();
    let (of_service, of_tasks) = (progress.clone(), tasks.clone());
    let service =
        service_fn(move |request: Request<Incoming>| answer(router.clone(), request, peer, (&of_service, &of_tasks)));
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
        // A client that doesn't speak HTTP may still be sending.
        progress.set_left_unread();
        debug!(%error, "a connection ended early");
    }
}

/// Serves one request. If much of its body was not read, the response has `connection: close`.
fn answer(
    router: Router,
    request: Request<Incoming>,
    peer: SocketAddr,
    (progress, tasks): (&Arc<ConnectionProgress>, &Tasks),
) -> impl Future<Output = Result<Response, Infallible>> + use<> {
    // There is a next request, so the previous one was read to its end.
    progress.clear_left_unread();
    let (head, body) = request.into_parts();
    let (body, body_progress) = TrackedBody::watch(body, progress);
    let length = announced_length(&head.headers);
    let is_forwarded = head.headers.contains_key("x-forwarded-for") || head.headers.contains_key(header::FORWARDED);
    let mut request = Request::from_parts(head, body);
    request.extensions_mut().insert(ConnectInfo(peer));
    request.extensions_mut().insert(progress.clone());
    if let Some(body_progress) = &body_progress {
        request.extensions_mut().insert(body_progress.clone());
    }
    let waits_for_body = is_forwarded && !request.headers().contains_key(header::EXPECT);
    let (progress, tasks) = (progress.clone(), tasks.clone());
    let answered = router.oneshot(request);
    async move {
        let mut response = answered.await?;
        if let Some(body_progress) = body_progress {
            if waits_for_body {
                tokio::select! {
                    () = tasks.stopping() => {}
                    () = body_progress.read_to_end(length, &progress) => {}
                }
            }
            announce_end(&mut response, &body_progress, length);
        }
        Ok(response)
    }
}

/// Takes a port without listening yet: connections to it are refused at once. An error if it is in use.
pub fn claim(address: SocketAddr) -> Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A port whose last connections are still fading away may be used again.
    socket.set_reuseaddr(true)?;
    socket.bind(address).with_context(|| in_use(address))?;
    Ok(socket)
}

/// Takes connections from now on. An error if the port is in use.
pub fn listen(socket: TcpSocket) -> Result<TcpListener> {
    let address = socket.local_addr()?;
    // Another process that claimed the port as well may have been quicker.
    socket.listen(BACKLOG).with_context(|| in_use(address))
}

fn in_use(address: SocketAddr) -> String {
    format!("can't listen on {address}; stop what uses that port, or choose another with --server-port or --mgmt-port")
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
