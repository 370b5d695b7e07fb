//! How many connections there may be at a time: in all, from one client, and from neighbours.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::config::Server;
use crate::limits::{LimitSubject, Quota, RateLimit, ResourceLimit, ResourceLimitConfig, ResourcePermit, Scope};
use crate::telemetry::metrics::Refusal;

/// How many times the connections of one of its /64s an IPv6 /48 may have.
const SITE: u32 = 4;

/// A client may open this many times its share at once …
const OPENED_AT_ONCE: u32 = 4;
/// … and its share divided by this in a second.
const OPENED_IN_A_SECOND: u32 = 4;

/// The connections that are open. Cloning gives the same count.
#[derive(Clone)]
pub struct Connections {
    open: ResourceLimit,
    /// Opening a connection costs more than a request, and a new connection gets its first refusals without delay.
    opened: Option<Arc<RateLimit>>,
    /// Knows the trusted proxies. A proxy has many clients, so only the total counts for it.
    server: Option<Server>,
}

/// An open connection. Dropping it makes room for another.
pub type Permit = ResourcePermit;

impl Connections {
    /// At most `max` connections, and `max_per_client` from one IPv4 address or IPv6 /64. The trusted proxies of
    /// `server`, if it is given, are bound by the total only.
    pub fn new(max: usize, max_per_client: usize, server: Option<Server>) -> Self {
        let [total, own] = [max, max_per_client].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        let shares = vec![(Scope::Own, own), (Scope::Site, own.saturating_mul(SITE))];
        Self {
            open: ResourceLimit::new(ResourceLimitConfig { shares, ..ResourceLimitConfig::total(total) }),
            opened: None,
            server,
        }
    }

    /// The same, with a limit on how often one address opens a connection: a quarter of `max_per_client` in a second, four
    /// times `max_per_client` at once.
    pub fn with_rate(self, max_per_client: usize) -> Self {
        let own = u32::try_from(max_per_client).unwrap_or(u32::MAX);
        let quota = Quota::per_second((own / OPENED_IN_A_SECOND).max(1), own.saturating_mul(OPENED_AT_ONCE));
        Self { opened: Some(Arc::new(RateLimit::new(Refusal::AddressLimit).with(Scope::Own, quota))), ..self }
    }

    /// A separate count with these limits and the same trusted proxies, of connections that this one has let in.
    pub fn like(&self, max: usize, max_per_client: usize) -> Self {
        Self::new(max, max_per_client, self.server.clone())
    }

    /// Counts a new connection, or refuses it.
    pub fn admit(&self, peer: IpAddr) -> Option<Permit> {
        let is_proxy = self.server.as_ref().is_some_and(|server| server.trusts(peer));
        let subject = if is_proxy { LimitSubject::Exempt } else { LimitSubject::Address(peer) };
        if let Some(opened) = &self.opened {
            opened.take(subject).ok()?;
        }
        self.open.try_take(subject, 1)
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.open.taken() as usize
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.open.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_has_a_share_of_the_total_until_it_lets_go() {
        let connections = Connections::new(3, 2, None);
        let first = connections.admit(ip("192.0.2.1")).unwrap();
        let _second = connections.admit(ip("::ffff:192.0.2.1")).unwrap();
        assert!(connections.admit(ip("192.0.2.1")).is_none());
        let _third = connections.admit(ip("192.0.2.2")).unwrap();
        assert!(connections.admit(ip("192.0.2.3")).is_none(), "the total is reached");
        drop(first);
        assert!(connections.admit(ip("192.0.2.1")).is_some());
        assert_eq!(connections.open(), 2);
    }

    #[test]
    fn neighbours_in_one_v6_network_are_one_client_and_a_site_has_four_shares() {
        let connections = Connections::new(10, 1, None);
        let mut open = vec![connections.admit(ip("2001:db8::1")).unwrap()];
        assert!(connections.admit(ip("2001:db8::ffff:2")).is_none());
        open.extend((1..10).filter_map(|network| connections.admit(ip(&format!("2001:db8:0:{network}::1")))));
        assert_eq!(open.len(), 4);
        assert!(connections.admit(ip("2001:db8:1::1")).is_some());
    }

    #[test]
    fn connections_that_were_let_in_once_have_no_rate() {
        let connections = Connections::new(1000, 8, None).with_rate(8).like(1000, 8);
        assert_eq!((0..500).filter(|_| connections.admit(ip("192.0.2.1")).is_some()).count(), 500);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_opens_and_closes_is_slowed_and_a_proxy_is_not() {
        let server = Config::embedded(Path::new("unused")).unwrap().server;
        let connections = Connections::new(1000, 8, Some(server)).with_rate(8);
        let opened = |peer| (0..500).filter(|_| connections.admit(ip(peer)).is_some()).count();
        assert_eq!(opened("192.0.2.1"), 32);
        assert_eq!((opened("192.0.2.2"), opened("127.0.0.1")), (32, 500));
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        assert_eq!(opened("192.0.2.1"), 2);
    }

    #[test]
    fn a_trusted_proxy_is_bound_by_the_total_only() {
        let server = Config::embedded(Path::new("unused")).unwrap().server;
        let connections = Connections::new(3, 1, Some(server));
        let proxies = ["::ffff:10.1.2.3", "10.1.2.3", "::1"];
        let _all = proxies.map(|proxy| connections.admit(ip(proxy)).unwrap());
        assert!(connections.admit(ip("10.1.2.3")).is_none());
    }
}
