//! What a request is charged to, and with whom that shares a limit.

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use crate::model::ids::UserId;

/// What a request, a body or a connection is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitSubject {
    /// A client, by its address.
    Address(IpAddr),
    /// An account, from all addresses together.
    Account(UserId),
    /// An account and the address that it comes from, which both have a share.
    AccountAt(UserId, IpAddr),
    /// An account that does something to another one: first the actor, then the target.
    Pair(UserId, UserId),
    /// A user name or a domain, by the hash that [`LimitSubject::named`] makes.
    Named(u64),
    /// The server itself, or a trusted proxy: only the total counts.
    Exempt,
}

/// How far a budget is shared. From narrow to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The subject alone: an account, a pair, a name, an IPv4 address, or the /64 that an IPv6 client has.
    Own,
    /// The address of a client: an IPv4 address, or the /64 that an IPv6 client has. Accounts by themselves have none.
    Client,
    /// An IPv6 /48, which one customer may have. IPv4 addresses and accounts by themselves have none.
    Site,
    /// An IPv4 /24 or an IPv6 /48. Accounts by themselves have none.
    Block,
    /// All subjects together.
    All,
}

/// A secret hash of a subject within a scope: 64 bits, different after each start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(pub(super) u64);

/// Clients can't choose names, addresses or ids that collide, because they don't know this.
static SECRET: LazyLock<RandomState> = LazyLock::new(RandomState::new);

impl LimitSubject {
    /// A subject with this name.
    pub fn named(name: &str) -> Self {
        Self::Named(SECRET.hash_one(name))
    }

    /// A subject with this name within the network (/24, /48) of a client.
    pub fn named_within_network(name: &str, client: Self) -> Self {
        Self::Named(SECRET.hash_one((name, client.key(Scope::Block))))
    }

    /// Subjects with the same key share a budget of this scope. `None` if this subject has no budget of this scope.
    pub(super) fn key(self, scope: Scope) -> Option<Key> {
        let hash = match (scope, self) {
            (Scope::All, _) => 0,
            (Scope::Own, Self::Address(address)) => hash(scope, client(address)),
            (Scope::Own, Self::Account(account) | Self::AccountAt(account, _)) => hash(scope, account),
            (Scope::Own, Self::Pair(actor, target)) => hash(scope, (actor, target)),
            (Scope::Own, Self::Named(name)) => name,
            (Scope::Client, Self::Address(address) | Self::AccountAt(_, address)) => hash(scope, client(address)),
            (Scope::Site, Self::Address(address) | Self::AccountAt(_, address)) => match address.to_canonical() {
                IpAddr::V6(address) => hash(scope, v6_network(address, 48)),
                IpAddr::V4(_) => return None,
            },
            (Scope::Block, Self::Address(address) | Self::AccountAt(_, address)) => match address.to_canonical() {
                IpAddr::V6(address) => hash(scope, v6_network(address, 48)),
                IpAddr::V4(address) => hash(scope, Ipv4Addr::from_bits(address.to_bits() & !0xff)),
            },
            (Scope::Own | Scope::Client | Scope::Site | Scope::Block, _) => return None,
        };
        Some(Key(hash))
    }
}

fn hash(scope: Scope, value: impl Hash) -> u64 {
    SECRET.hash_one((scope, value))
}

/// An IPv4 address, also when it is written as a mapped one, or the /64 that an IPv6 client has at its disposal.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(v6_network(address, 64)),
        v4 => v4,
    }
}

fn v6_network(address: Ipv6Addr, prefix: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(address.to_bits() >> (128 - prefix) << (128 - prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(address: &str, scope: Scope) -> Option<Key> {
        LimitSubject::Address(address.parse().unwrap()).key(scope)
    }

    #[test]
    fn addresses_share_by_prefix() {
        for (scope, one, other, share) in [
            (Scope::Own, "192.0.2.1", "::ffff:192.0.2.1", true),
            (Scope::Own, "192.0.2.1", "192.0.2.2", false),
            (Scope::Own, "2001:db8::1", "2001:db8::ffff:2", true),
            (Scope::Own, "2001:db8::1", "2001:db8:0:1::1", false),
            (Scope::Site, "2001:db8::1", "2001:db8:0:ffff::1", true),
            (Scope::Site, "2001:db8::1", "2001:db8:1::1", false),
            (Scope::Block, "192.0.2.1", "192.0.2.255", true),
            (Scope::Block, "192.0.2.1", "192.0.3.1", false),
            (Scope::Block, "2001:db8::1", "2001:db8:0:ffff::1", true),
            (Scope::All, "192.0.2.1", "2001:db8::1", true),
        ] {
            assert_eq!(key(one, scope) == key(other, scope), share, "{scope:?} of {one} and {other}");
            assert!(key(one, scope).is_some());
        }
        assert_eq!(key("192.0.2.1", Scope::Site), None);
        assert_eq!(key("::ffff:192.0.2.1", Scope::Site), None);
    }

    #[test]
    fn only_addresses_have_neighbours() {
        let (one, other) = (UserId::random(), UserId::random());
        for subject in [LimitSubject::Account(one), LimitSubject::Pair(one, other), LimitSubject::named("example.org")]
        {
            assert!(subject.key(Scope::Own).is_some() && subject.key(Scope::All).is_some());
            assert_eq!([Scope::Client, Scope::Site, Scope::Block].map(|scope| subject.key(scope)), [None; 3]);
        }
        let address = "2001:db8::1".parse().unwrap();
        let both = LimitSubject::AccountAt(one, address);
        assert_eq!(both.key(Scope::Own), LimitSubject::Account(one).key(Scope::Own));
        for scope in [Scope::Client, Scope::Site, Scope::Block] {
            assert_eq!(both.key(scope), LimitSubject::Address(address).key(scope));
        }
        assert_ne!(LimitSubject::Pair(one, other).key(Scope::Own), LimitSubject::Pair(other, one).key(Scope::Own));
        assert_eq!(LimitSubject::Exempt.key(Scope::Own), None);
    }
}
