//! How many connections there may be at a time: in all, and from one client.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use crate::api::limits::network;

/// The connections that are open. Cloning gives the same count.
#[derive(Clone, Debug)]
pub struct Connections {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    max: usize,
    max_per_client: usize,
    trusted: Vec<IpNet>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    total: usize,
    /// Those of clients that have any. There are at most `total` entries.
    by_client: HashMap<IpAddr, usize>,
}

impl Connections {
    /// At most `max` connections, and `max_per_client` from one IPv4 address or IPv6 /64. The peers in `trusted` are
    /// proxies, behind which many clients are: for them only the total counts.
    pub fn new(max: usize, max_per_client: usize, trusted: Vec<IpNet>) -> Self {
        Self { inner: Arc::new(Inner { max, max_per_client, trusted, open: Mutex::default() }) }
    }

    /// Counts a new connection, or refuses it.
    pub fn admit(&self, peer: IpAddr) -> Option<Permit> {
        let peer = peer.to_canonical();
        let is_proxy = self.inner.trusted.iter().any(|network| network.contains(&peer));
        let client = (!is_proxy).then(|| network(peer));
        let mut open = self.inner.open();
        if open.total >= self.inner.max {
            return None;
        }
        if let Some(client) = client {
            let of_client = open.by_client.get(&client).copied().unwrap_or_default();
            if of_client >= self.inner.max_per_client {
                return None;
            }
            open.by_client.insert(client, of_client + 1);
        }
        open.total += 1;
        Some(Permit { client, connections: self.inner.clone() })
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.inner.open().total
    }
}

impl Inner {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open connection. Dropping it makes room for another.
#[derive(Debug)]
pub struct Permit {
    client: Option<IpAddr>,
    connections: Arc<Inner>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.connections.open();
        open.total -= 1;
        let Some(client) = self.client else { return };
        let Some(of_client) = open.by_client.get_mut(&client) else { return };
        *of_client -= 1;
        if *of_client == 0 {
            open.by_client.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_has_a_share_of_the_total_until_it_lets_go() {
        let connections = Connections::new(3, 2, Vec::new());
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
    fn neighbours_in_one_v6_network_are_one_client() {
        let connections = Connections::new(10, 1, Vec::new());
        let _first = connections.admit(ip("2001:db8::1")).unwrap();
        assert!(connections.admit(ip("2001:db8::ffff:2")).is_none());
        assert!(connections.admit(ip("2001:db8:0:1::1")).is_some());
    }

    #[test]
    fn a_trusted_proxy_is_bound_by_the_total_only() {
        let connections = Connections::new(3, 1, vec!["10.0.0.0/8".parse().unwrap()]);
        let _all: Vec<_> = (0..3).map(|_| connections.admit(ip("::ffff:10.1.2.3")).unwrap()).collect();
        assert!(connections.admit(ip("10.1.2.3")).is_none());
    }

    #[test]
    fn closed_connections_leave_nothing_behind() {
        let connections = Connections::new(1000, 10, Vec::new());
        for last in 0..=255 {
            connections.admit(ip(&format!("192.0.2.{last}"))).unwrap();
        }
        assert_eq!(connections.open(), 0);
        assert!(connections.inner.open().by_client.is_empty());
    }
}
