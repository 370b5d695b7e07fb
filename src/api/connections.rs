//! How many connections there may be at a time: in all, from one client, and from neighbours.

use std::net::IpAddr;

use crate::config::Server;
use crate::limits::{Amount, Held, Payer, Scope, Terms};

/// An IPv6 /48 may have so many times the connections of one of its /64s.
const SITE: u32 = 4;

/// The connections that are open. Cloning gives the same count.
#[derive(Clone, Debug)]
pub struct Connections {
    open: Amount,
    /// Whose peers are proxies, behind which many clients are: for them only the total counts.
    server: Option<Server>,
}

/// An open connection. Dropping it makes room for another.
pub type Permit = Held;

impl Connections {
    /// At most `max` connections, and `max_per_client` from one IPv4 address or IPv6 /64. The trusted proxies of
    /// `server`, if it is given, are bound by the total only.
    pub fn new(max: usize, max_per_client: usize, server: Option<Server>) -> Self {
        let [total, own] = [max, max_per_client].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        let shares = vec![(Scope::Own, own), (Scope::Site, own.saturating_mul(SITE))];
        Self { open: Amount::new(Terms { shares, ..Terms::total(total) }), server }
    }

    /// A count of its own with these limits, for which the same peers are proxies.
    pub fn like(&self, max: usize, max_per_client: usize) -> Self {
        Self::new(max, max_per_client, self.server.clone())
    }

    /// Counts a new connection, or refuses it.
    pub fn admit(&self, peer: IpAddr) -> Option<Permit> {
        let is_proxy = self.server.as_ref().is_some_and(|server| server.trusts(peer));
        self.open.try_take(if is_proxy { Payer::Exempt } else { Payer::Address(peer) }, 1)
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.open.taken() as usize
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
    fn a_trusted_proxy_is_bound_by_the_total_only() {
        let server = Config::embedded(Path::new("unused")).unwrap().server;
        let connections = Connections::new(3, 1, Some(server));
        let proxies = ["::ffff:10.1.2.3", "10.1.2.3", "::1"];
        let _all = proxies.map(|proxy| connections.admit(ip(proxy)).unwrap());
        assert!(connections.admit(ip("10.1.2.3")).is_none());
    }
}
