//! Rate limits for each client address, and what a client's address is behind proxies.
//!
//! Memory is bounded: a bucket that is full again is the same as one that was never used, so a sweep drops it. When
//! [`MAX_BUCKETS`] are in use all the same, that sweep runs at once; if it does not help, all buckets of the tier are
//! dropped, that is, filled. Refusing newcomers instead would let whoever commands many addresses lock everybody else
//! out; and filling helps no attacker, because he needs [`MAX_BUCKETS`] fresh addresses, each with a full bucket of its
//! own, to fill one that he has emptied.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use governor::clock::Clock as _;
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use ipnet::IpNet;
use tracing::{error, warn};

use crate::api::error::ApiError;
use crate::config;
use crate::telemetry::metrics::Refusal;

/// Buckets of one tier that are kept at the most; some 8 MiB of memory.
pub const MAX_BUCKETS: usize = 100_000;

/// Which of a client's two buckets a request takes its token from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Most of the API.
    Standard,
    /// Sign-up, log-in and what else starts or ends a session.
    Auth,
}

/// The rate limits of this node. Cloning gives the same limits.
#[derive(Clone)]
pub struct Limits {
    inner: Arc<Inner>,
}

struct Inner {
    standard: Buckets,
    auth: Buckets,
    trusted: Vec<IpNet>,
}

impl Limits {
    /// Full buckets for everybody. Forwarded addresses are believed from peers in `trusted`.
    pub fn new(config: &config::RateLimits, trusted: Vec<IpNet>) -> Self {
        let standard = Buckets::new(config.per_second, config.burst);
        let auth = Buckets::new(config.auth_per_second, config.auth_burst);
        Self { inner: Arc::new(Inner { standard, auth, trusted }) }
    }

    /// The address of the client behind `peer`: the rightmost forwarded address that is not a trusted proxy, when the
    /// peer is one; otherwise the peer itself.
    pub fn client_address(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.to_canonical();
        if !self.is_trusted(peer) {
            return peer;
        }
        // All lines, because a proxy may append one of its own instead of extending the client's.
        let lines: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
        let items = lines.iter().rev().flat_map(|line| line.as_bytes().rsplit(|&byte| byte == b','));
        items.filter_map(parse_forwarded).find(|&address| !self.is_trusted(address)).unwrap_or(peer)
    }

    /// Takes a token from the bucket of this address, or answers how long to wait for one.
    pub fn check(&self, tier: Tier, address: IpAddr) -> Result<(), ApiError> {
        let (buckets, limit) = match tier {
            Tier::Standard => (&self.inner.standard, Refusal::AddressLimit),
            Tier::Auth => (&self.inner.auth, Refusal::AddressAuthLimit),
        };
        let taken = buckets.take(network(address));
        taken.map_err(|retry_after_secs| ApiError::TooManyRequests { retry_after_secs, limit })
    }

    /// Drops the buckets that are full again.
    pub fn sweep(&self) {
        self.inner.standard.sweep();
        self.inner.auth.sweep();
    }

    fn is_trusted(&self, address: IpAddr) -> bool {
        self.inner.trusted.iter().any(|network| network.contains(&address))
    }
}

/// Lets a request of the standard tier through, or answers 429. It needs the peer's address as [`ConnectInfo`].
pub async fn standard(limits: State<Limits>, request: Request, next: Next) -> Response {
    limited(&limits, Tier::Standard, request, next).await
}

/// Lets a request of the auth tier through, or answers 429. It needs the peer's address as [`ConnectInfo`].
pub async fn auth(limits: State<Limits>, request: Request, next: Next) -> Response {
    limited(&limits, Tier::Auth, request, next).await
}

async fn limited(limits: &Limits, tier: Tier, request: Request, next: Next) -> Response {
    let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>() else {
        error!("a request came without the address of its peer");
        return ApiError::Internal.into_response();
    };
    let address = limits.client_address(peer.ip(), request.headers());
    match limits.check(tier, address) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// What shares a bucket: an IPv4 address, or the /64 that an IPv6 client has at its disposal.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// Reads an address, as some proxies write it also with a port. An item that is none is skipped: `None`.
fn parse_forwarded(item: &[u8]) -> Option<IpAddr> {
    let item = std::str::from_utf8(item).ok()?.trim();
    let bare = item.strip_prefix('[').and_then(|item| item.strip_suffix(']')).unwrap_or(item);
    let address = bare.parse().ok().or_else(|| item.parse().ok().map(|with_port: SocketAddr| with_port.ip()))?;
    Some(IpAddr::to_canonical(&address))
}

type Limiter = RateLimiter<IpAddr, DashMapStateStore<IpAddr>, Monotonic, NoOpMiddleware<std::time::Instant>>;

/// The buckets of one tier.
struct Buckets {
    quota: Quota,
    limiter: RwLock<Limiter>,
}

impl Buckets {
    fn new(per_second: u32, burst: u32) -> Self {
        let at_least_one = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(at_least_one(per_second)).allow_burst(at_least_one(burst));
        Self { quota, limiter: RwLock::new(limiter(quota)) }
    }

    /// Takes a token, or answers after how many whole seconds there is one: the wait rounded down, plus one.
    fn take(&self, client: IpAddr) -> Result<(), u64> {
        let (taken, is_crowded) = {
            let limiter = self.limiter.read().unwrap_or_else(PoisonError::into_inner);
            (limiter.check_key(&client), limiter.len() > MAX_BUCKETS)
        };
        if is_crowded {
            self.make_room();
        }
        taken.map_err(|refused| refused.wait_time_from(Monotonic.now()).as_secs() + 1)
    }

    fn make_room(&self) {
        let mut limiter = self.limiter.write().unwrap_or_else(PoisonError::into_inner);
        if limiter.len() <= MAX_BUCKETS {
            return;
        }
        limiter.retain_recent();
        if limiter.len() > MAX_BUCKETS / 2 {
            warn!("more clients than can be told apart; all may send a burst again");
            *limiter = self::limiter(self.quota);
        }
    }

    fn sweep(&self) {
        let limiter = self.limiter.read().unwrap_or_else(PoisonError::into_inner);
        limiter.retain_recent();
        limiter.shrink_to_fit();
    }
}

fn limiter(quota: Quota) -> Limiter {
    RateLimiter::new(quota, DashMapStateStore::default(), Monotonic)
}

/// The clock of tokio: it never goes back, and a test can set it.
#[derive(Clone, Copy, Debug)]
struct Monotonic;

impl governor::clock::Clock for Monotonic {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        tokio::time::Instant::now().into_std()
    }
}

#[cfg(test)]
mod tests;
