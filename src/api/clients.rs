//! The client of a request: which address counts, and the limits that are checked before anything else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{error, warn};

use crate::api::error::ApiError;
use crate::app::App;
use crate::config::Server;
use crate::gateway::ConnectionProgress;
use crate::limits::{LimitSubject, Tier};

const FORWARDED_FOR: &str = "x-forwarded-for";
/// Refusals, less other answers, that one connection gets at once …
const QUICK_REFUSALS: u32 = 20;
/// … how much longer each further one takes than the one before …
const REFUSAL_STEP: Duration = Duration::from_millis(50);
/// … and the longest that one takes.
const SLOWEST_REFUSAL: Duration = Duration::from_secs(1);

/// What [`admit`] has found out about a request.
#[derive(Clone, Copy, Debug)]
pub struct AdmittedRequest {
    /// The client's address; the account, once a valid token has been seen.
    pub subject: LimitSubject,
    /// The client's address again, if it is that of a client. `None` for requests that a trusted proxy makes itself, or passes
    /// on without saying for whom.
    pub client: Option<IpAddr>,
    /// The largest body that its route takes, in bytes.
    pub max_body: usize,
}

impl AdmittedRequest {
    /// What is charged for what the request holds while it lasts: the account and its client's address. An account alone would let
    /// one client hold all there is, with a few accounts.
    pub fn limit_subject(&self) -> LimitSubject {
        match (self.subject, self.client) {
            (LimitSubject::Account(account), Some(address)) => LimitSubject::AccountAt(account, address),
            (subject, _) => subject,
        }
    }
}

/// What the requests of a route need to be let in.
#[derive(Clone)]
pub struct AdmissionConfig {
    /// Has the limits, and knows the proxies.
    pub app: App,
    /// The bucket that each request takes a token from.
    pub tier: Tier,
    /// The largest body, in bytes.
    pub max_body: usize,
}

/// Lets a request through as [`AdmittedRequest`], or answers 429. It needs the peer's address as [`ConnectInfo`].
pub async fn admit(State(entrance): State<AdmissionConfig>, request: Request, next: Next) -> Response {
    let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>().copied() else {
        error!("a request came without the address of its peer");
        return ApiError::Internal.into_response();
    };
    let progress = request.extensions().get::<Arc<ConnectionProgress>>().cloned();
    // A proxy's connection serves many clients, which must not wait for each other's refusals.
    let is_of_one_client = !entrance.app.config.server.trusts(peer.ip().to_canonical());
    let response = admitted(entrance, peer.ip(), request, next).await;
    if let Some(progress) = progress.filter(|_| is_of_one_client) {
        slow_down(&progress, response.status()).await;
    }
    response
}

async fn admitted(entrance: AdmissionConfig, peer: IpAddr, mut request: Request, next: Next) -> Response {
    let AdmissionConfig { app, tier, max_body } = entrance;
    let address = client_address(&app.config.server, peer, request.headers());
    let (subject, client) =
        (LimitSubject::Address(address), Some(address).filter(|address| !app.config.server.trusts(*address)));
    if let Err(wait) = app.limits.address(tier, subject) {
        return ApiError::from(wait).into_response();
    }
    request.extensions_mut().insert(AdmittedRequest { subject, client, max_body });
    next.run(request).await
}

/// Delays a refusal on a connection that was refused more often than not. Otherwise a client that sends many requests ahead
/// could keep the server busy with refusals, each of which costs a little.
async fn slow_down(progress: &ConnectionProgress, status: StatusCode) {
    let refusals = progress.count_answer(status == StatusCode::TOO_MANY_REQUESTS);
    if refusals > QUICK_REFUSALS {
        tokio::time::sleep((REFUSAL_STEP * (refusals - QUICK_REFUSALS)).min(SLOWEST_REFUSAL)).await;
    }
}

/// The address of the client behind `peer`: the peer itself, unless it is a trusted proxy. Then the forwarded addresses
/// are read from right to left, past those of trusted proxies. An item that is no address ends the reading, because what
/// stands to its left may be the client's invention; the address read just before it counts, or else the peer.
pub fn client_address(server: &Server, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
    let peer = peer.to_canonical();
    // All lines, because a proxy may append one of its own instead of extending the client's.
    let lines: Vec<_> = headers.get_all(FORWARDED_FOR).iter().collect();
    if !server.trusts(peer) {
        if !lines.is_empty() {
            log_untrusted_proxy(peer);
        }
        return peer;
    }
    let mut last = None;
    for item in lines.iter().rev().flat_map(|line| line.as_bytes().rsplit(|&byte| byte == b',')) {
        match parse_forwarded(item) {
            None => return last.unwrap_or(peer),
            Some(address) if !server.trusts(address) => return address,
            trusted => last = trusted,
        }
    }
    peer
}

/// Reads an address, as some proxies write it also with a port.
fn parse_forwarded(item: &[u8]) -> Option<IpAddr> {
    let item = std::str::from_utf8(item).ok()?.trim();
    let bare = item.strip_prefix('[').and_then(|item| item.strip_suffix(']')).unwrap_or(item);
    let address = bare.parse().ok().or_else(|| item.parse().ok().map(|with_port: SocketAddr| with_port.ip()))?;
    Some(IpAddr::to_canonical(&address))
}

/// Logs once that a proxy is not trusted: all its clients then count as one.
fn log_untrusted_proxy(peer: IpAddr) {
    static LOGGED: AtomicBool = AtomicBool::new(false);
    if is_local(peer) && !LOGGED.swap(true, Ordering::Relaxed) {
        warn!(
            "requests with X-Forwarded-For come from this machine or a private network that is not in \
             --trusted-proxies: if that is a proxy, add its address, or all its clients share one rate limit"
        );
    }
}

/// True for the addresses that the operator's own proxy may have: loopback, private, link-local.
fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests;
