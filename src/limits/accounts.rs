//! Budgets for sign-ups, for tries at passwords, and for uploads.

use std::time::Duration;

use crate::config;
use crate::limits::{
    LimitSubject, Quota, RateLimit, RateLimited, ResourceLimit, ResourceLimitConfig, ResourcePermit, Scope,
};
use crate::model::ids::UserId;
use crate::telemetry::metrics::Refusal;

/// When a name has no tries left, each network (/24, /48) has so many at this name, at once …
const GUESSES_OF_NETWORK: u32 = 3;
/// … and in an hour …
const GUESSES_OF_NETWORK_PER_HOUR: u32 = 2;
/// … and all networks together so many times the name's own.
const GUESSES_OF_NETWORKS: u32 = 2;

/// Uploads of all accounts together that may begin in a second …
const UPLOADS_PER_SECOND: u32 = 500;
/// … and at once.
const UPLOADS_AT_ONCE: u32 = 2000;
/// Of them from one address, in a second and at once …
const UPLOADS_FROM_ADDRESS: [u32; 2] = [50, 500];
/// … and from one network (/24, /48).
const UPLOADS_FROM_NETWORK: [u32; 2] = [100, 1000];
/// Uploads that may be under way at a time, in all …
const UPLOADS_UNDER_WAY: u32 = 1024;
/// … of one account …
const UPLOADS_OF_ACCOUNT: u32 = 64;
/// … of one address …
const UPLOADS_OF_ADDRESS: u32 = 128;
/// … and of one network (/24, /48).
const UPLOADS_OF_NETWORK: u32 = 256;
/// The `Retry-After` of an account that has as many uploads under way as it may.
const UPLOAD_WAIT: Duration = Duration::from_secs(1);

/// The budgets of this node for sign-ups, passwords and uploads.
pub struct AccountLimits {
    sign_ups: RateLimit,
    guesses: RateLimit,
    proven_guesses: RateLimit,
    /// By name and network …
    guesses_of_network: RateLimit,
    /// … and by name.
    guesses_of_networks: RateLimit,
    uploads: RateLimit,
    under_way: ResourceLimit,
}

impl AccountLimits {
    /// Full buckets, and all amounts free. A rate of zero is no limit.
    pub fn new(config: &config::Accounts) -> Self {
        let sign_ups = RateLimit::new(Refusal::SignUpLimit)
            .with(Scope::Own, Quota::per_day(config.sign_ups_per_address))
            .with(Scope::Block, Quota::per_day(config.sign_ups_per_network))
            .with(Scope::All, Quota::per_hour(config.sign_ups_per_hour));
        let [per_hour, burst] = [config.wrong_passwords_per_hour, config.wrong_passwords_burst.max(1)];
        let guesses = |per_hour, burst| {
            RateLimit::new(Refusal::PasswordLimit).with(Scope::Own, Quota::per_hour_with_burst(per_hour, burst))
        };
        let of_networks = |number: u32| number.saturating_mul(GUESSES_OF_NETWORKS);
        let uploads = Quota::per_second(config.uploads_per_second, config.uploads_burst);
        let begun = |[per_second, at_once]: [u32; 2]| uploads.and(Quota::per_second(per_second, at_once));
        let shares = vec![
            (Scope::Own, UPLOADS_OF_ACCOUNT),
            (Scope::Client, UPLOADS_OF_ADDRESS),
            (Scope::Block, UPLOADS_OF_NETWORK),
        ];
        let under_way = ResourceLimitConfig { shares, ..ResourceLimitConfig::total(UPLOADS_UNDER_WAY) };
        Self {
            sign_ups,
            guesses: guesses(per_hour, burst),
            proven_guesses: guesses(per_hour, burst),
            guesses_of_network: guesses(GUESSES_OF_NETWORK_PER_HOUR, GUESSES_OF_NETWORK),
            guesses_of_networks: guesses(of_networks(per_hour), of_networks(burst)),
            uploads: RateLimit::new(Refusal::UploadRate)
                .with(Scope::Own, uploads)
                .with(Scope::Client, begun(UPLOADS_FROM_ADDRESS))
                .with(Scope::Block, begun(UPLOADS_FROM_NETWORK))
                .with(Scope::All, begun([UPLOADS_PER_SECOND, UPLOADS_AT_ONCE])),
            under_way: ResourceLimit::new(under_way),
        }
    }

    /// Takes a sign-up from a client's address.
    pub fn sign_up(&self, client: LimitSubject) -> Result<(), RateLimited> {
        self.sign_ups.take(client)
    }

    /// Takes a try at the password of the account with this name, which may not exist. Give it back if it was right.
    pub fn guess(&self, username: &str) -> Result<Guess<'_>, RateLimited> {
        Guess::take(&self.guesses, LimitSubject::named(username))
    }

    /// The same for a client that has shown a live refresh token of the account. Other clients can't use this budget up.
    pub fn proven_guess(&self, account: UserId) -> Result<Guess<'_>, RateLimited> {
        Guess::take(&self.proven_guesses, LimitSubject::Account(account))
    }

    /// The same for a client of a network that has had hardly any wrong password for this name, when the name has no tries
    /// left. Guessing from a few networks doesn't use this up for the others.
    pub fn guess_from(&self, username: &str, client: LimitSubject) -> Result<Guess<'_>, RateLimited> {
        let of_network = Guess::take(&self.guesses_of_network, LimitSubject::named_within_network(username, client))?;
        match Guess::take(&self.guesses_of_networks, LimitSubject::named(username)) {
            Ok(of_networks) => Ok(Guess { wider: Some((of_networks.rate, of_networks.subject)), ..of_network }),
            Err(wait) => {
                of_network.refund();
                Err(wait)
            }
        }
    }

    /// Takes an upload of an account at an address, which counts as under way until the returned value is dropped.
    pub fn upload(&self, subject: LimitSubject) -> Result<ResourcePermit, RateLimited> {
        let held = self.under_way.try_take(subject, 1).ok_or(RateLimited(UPLOAD_WAIT, Refusal::UploadRate))?;
        self.uploads.take(subject)?;
        Ok(held)
    }
}

/// A try at a password. It counts as a wrong one unless [`Guess::refund`] says otherwise.
pub struct Guess<'a> {
    rate: &'a RateLimit,
    subject: LimitSubject,
    /// What it was taken from as well.
    wider: Option<(&'a RateLimit, LimitSubject)>,
}

impl<'a> Guess<'a> {
    fn take(rate: &'a RateLimit, subject: LimitSubject) -> Result<Self, RateLimited> {
        rate.take(subject)?;
        Ok(Self { rate, subject, wider: None })
    }

    /// The password was right, or could not be checked: the try costs nothing.
    pub fn refund(self) {
        self.rate.release(self.subject);
        if let Some((rate, subject)) = self.wider {
            rate.release(subject);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> config::Accounts {
        config::Accounts {
            idle: Duration::ZERO,
            unused: Duration::ZERO,
            sign_ups_per_hour: 8,
            sign_ups_per_address: 2,
            sign_ups_per_network: 4,
            wrong_passwords_per_hour: 60,
            wrong_passwords_burst: 3,
            uploads_per_second: 1,
            uploads_burst: 5,
        }
    }

    fn sign_ups(limits: &AccountLimits, addresses: impl Iterator<Item = String>) -> usize {
        addresses.filter(|address| limits.sign_up(LimitSubject::Address(address.parse().unwrap())).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn sign_ups_have_a_share_for_each_address_and_network_and_a_total() {
        let limits = AccountLimits::new(&config());
        assert_eq!(sign_ups(&limits, (0..5).map(|_| "192.0.2.1".into())), 2);
        assert_eq!(sign_ups(&limits, (2..20).map(|n| format!("192.0.2.{n}"))), 2, "what the /24 has left");
        assert_eq!(
            sign_ups(&limits, (0..20).map(|n| format!("2001:db8:0:{n:x}::1"))),
            4,
            "a /48, by neighbouring /64s"
        );
        assert_eq!(sign_ups(&limits, (0..20).map(|n| format!("198.51.{n}.1"))), 0, "the total is used up");
        let Err(RateLimited(wait, Refusal::SignUpLimit)) =
            limits.sign_up(LimitSubject::Address("198.51.100.1".parse().unwrap()))
        else {
            panic!("it is used up")
        };
        tokio::time::advance(wait).await;
        assert_eq!(sign_ups(&limits, (0..5).map(|_| "198.51.100.1".into())), 1, "waiting as long as told suffices");
    }

    #[tokio::test(start_paused = true)]
    async fn wrong_passwords_slow_an_account_and_right_ones_cost_nothing() {
        let limits = AccountLimits::new(&config());
        (0..100).for_each(|_| limits.guess("alice").unwrap().refund());
        let wrong = |name| (0..100).filter(|_| limits.guess(name).is_ok()).count();
        assert_eq!((wrong("alice"), wrong("nobody")), (3, 3));
        let Err(RateLimited(wait, _)) = limits.guess("alice") else { panic!("it is used up") };
        assert_eq!(wait, Duration::from_mins(1));
        let alice = UserId::random();
        limits.proven_guess(alice).unwrap().refund();
        assert_eq!((0..100).filter(|_| limits.proven_guess(alice).is_ok()).count(), 3, "not without end either");
        tokio::time::advance(wait).await;
        assert_eq!(wrong("alice"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn guessing_from_a_few_networks_leaves_tries_to_the_others() {
        let limits = AccountLimits::new(&config());
        let client = |text: &str| LimitSubject::Address(text.parse().unwrap());
        let wrong = |name, host: &str| (0..100).filter(|_| limits.guess_from(name, client(host)).is_ok()).count();
        assert_eq!(wrong("alice", "192.0.2.1"), 3);
        assert_eq!((wrong("alice", "192.0.2.2"), wrong("bob", "192.0.2.2")), (0, 3), "its network, for this name");
        (0..100).for_each(|_| limits.guess_from("alice", client("198.51.100.1")).unwrap().refund());
        assert_eq!(wrong("alice", "198.51.100.1"), 3);
        assert_eq!(wrong("alice", "2001:db8:7::1"), 0, "all networks have six at once");
        tokio::time::advance(Duration::from_mins(30)).await;
        assert_eq!((wrong("alice", "192.0.2.1"), wrong("alice", "2001:db8:7::1")), (1, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_of_an_account_have_a_rate_and_a_number_under_way() {
        let limits = AccountLimits::new(&config());
        let (busy, other) = (LimitSubject::Account(UserId::random()), LimitSubject::Account(UserId::random()));
        assert_eq!((0..50).filter(|_| limits.upload(busy).is_ok()).count(), 5);
        limits.upload(other).unwrap();
        let limits = AccountLimits::new(&config::Accounts { uploads_per_second: 0, ..config() });
        let held: Vec<_> = (0..100).filter_map(|_| limits.upload(busy).ok()).collect();
        assert_eq!(held.len(), UPLOADS_OF_ACCOUNT as usize);
        limits.upload(other).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_that_begin_have_a_share_for_each_address_and_network() {
        let limits = AccountLimits::new(&config());
        let begun = |hosts: std::ops::Range<u32>| {
            let address =
                |n: u32| std::net::Ipv4Addr::new(192, 0, 2, (hosts.start + n % (hosts.end - hosts.start)) as u8);
            let upload = |n| limits.upload(LimitSubject::AccountAt(UserId::random(), address(n).into()));
            (0..2000).filter(|n| upload(*n).is_ok()).count()
        };
        assert_eq!(begun(1..2), 500);
        assert_eq!(begun(2..200), 500, "what the network has left");
        let stranger = LimitSubject::AccountAt(UserId::random(), std::net::Ipv4Addr::new(192, 0, 3, 1).into());
        limits.upload(stranger).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_under_way_have_a_share_for_each_address_and_network() {
        let limits = AccountLimits::new(&config::Accounts { uploads_per_second: 0, ..config() });
        let upload = |host: u8| {
            let address = std::net::Ipv4Addr::new(192, 0, 2, host);
            limits.upload(LimitSubject::AccountAt(UserId::random(), address.into())).ok()
        };
        let of_address: Vec<_> = (0..1000).filter_map(|_| upload(1)).collect();
        assert_eq!(of_address.len(), 128);
        let of_network: Vec<_> = (0..1000u32).filter_map(|n| upload(n as u8)).collect();
        assert_eq!(of_address.len() + of_network.len(), 256);
        let stranger = LimitSubject::AccountAt(UserId::random(), std::net::Ipv4Addr::new(192, 0, 3, 1).into());
        limits.upload(stranger).unwrap();
        drop(of_network);
        assert!(upload(2).is_some());
    }
}
