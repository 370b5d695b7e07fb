//! All budgets of this node, decided in one way: what one subject may use, what subjects share, what there is in all.
//!
//! There are two kinds. A [`RateLimit`] says how often, a [`ResourceLimit`] how much at a time. Both know subjects by a [`LimitSubject`] and
//! share by a [`Scope`]. Stored quantities (bytes of attachments, messages of an inbox) count for the whole deployment
//! and live in the store. `docs/SECURITY-LIMITS.md` lists every default.

mod accounts;
mod rate_limit;
mod resource_limit;
mod subject;

use std::ops::Deref;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

pub use accounts::{AccountLimits, Guess};
pub use rate_limit::{Quota, RateLimit, RateLimited};
pub use resource_limit::{NoRoom, ResourceLimit, ResourceLimitConfig, ResourcePermit};
pub use subject::{LimitSubject, Scope};

use crate::config;
use crate::model::ids::UserId;
use crate::telemetry::metrics::Refusal;

/// Bytes a second that each client has to take or send, once it has used up the time in which it may do nothing. A steady
/// client with 20 kB/s stays well above it, also with buffers on the way.
pub const LEAST_RATE: u64 = 8 << 10;

/// While an account is being flooded: sends of each sender that still reach it at once …
const TRICKLE_BURST: u32 = 20;
/// … and in a second, so that a flood doesn't silence the others.
const TRICKLE_PER_SECOND: u32 = 1;
/// Uploads of keys of an account in an hour. Each makes the database remember one more signed prekey.
const REFILLS_PER_HOUR: u32 = 240;
/// Uploads of keys of an account at once.
const REFILLS_AT_ONCE: u32 = 300;
/// How many times the rate of one of its /64s an IPv6 /48 has.
const SITE: u32 = 20;
/// How many times the standard rate attachments, the document and unknown paths have …
const OPEN: u32 = 10;
/// … and how many times its burst.
const OPEN_BURST: u32 = 50;

/// Memory for the bodies of requests without a valid token, in KiB.
const GUEST_BODIES_KIB: u32 = 64 << 10;
/// Memory for the bodies of requests of accounts, in KiB.
const ACCOUNT_BODIES_KIB: u32 = 64 << 10;
/// The part of each that is reserved for small bodies, in KiB.
const SMALL_BODIES_KIB: u32 = 16 << 10;
/// The largest small body, in KiB.
const SMALL_BODY_KIB: u32 = 64;
/// The share of one account's bodies, in KiB.
const BODIES_OF_ACCOUNT_KIB: u32 = 16 << 10;
/// The share of one address for the bodies of all its accounts, in KiB …
const ACCOUNT_BODIES_OF_ADDRESS_KIB: u32 = 16 << 10;
/// … and of its network (/24, /48).
const ACCOUNT_BODIES_OF_NETWORK_KIB: u32 = 32 << 10;
/// An address can hold one of the largest bodies that need no token, an IPv6 /48 this many.
const GUEST_BODIES_OF_SITE: u32 = 8;
/// Memory for the large frames of all sockets, in KiB.
const FRAMES_KIB: u32 = 64 << 10;
/// The share of one account's large frames, in KiB. No frame is larger.
pub const FRAMES_OF_ACCOUNT_KIB: u32 = 16 << 10;
/// The share of one address for the large frames of all its accounts, in KiB …
const FRAMES_OF_ADDRESS_KIB: u32 = 32 << 10;
/// … and of its network (/24, /48).
const FRAMES_OF_NETWORK_KIB: u32 = 48 << 10;
/// Messages that may wait for the memory of frames, of all sockets together. Each frame looks at all of them.
const FRAMES_WAITING: usize = 128;
/// Requests that may wait for room.
const WAITING: usize = 256;
/// How long a body waits for the memory of others.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Which of the buckets of its client's address a request takes a token from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Most of the API.
    Standard,
    /// Sign-up, log-in and other requests that begin or end a session.
    Auth,
    /// Attachments, the document and unknown paths.
    Open,
}

/// The budgets of this node. Cloning gives the same ones.
#[derive(Clone)]
pub struct Limits(Arc<Budgets>);

impl Deref for Limits {
    type Target = Budgets;

    fn deref(&self) -> &Budgets {
        &self.0
    }
}

/// The budgets, as fields of [`Limits`].
pub struct Budgets {
    standard: RateLimit,
    auth: RateLimit,
    open: RateLimit,
    requests: RateLimit,
    /// Sends that reach an account from all others together …
    received: RateLimit,
    /// … and from each of them while there are too many.
    trickle: RateLimit,
    bundles: RateLimit,
    one_time_prekeys: RateLimit,
    refills: RateLimit,
    guest_bodies: ResourceLimit,
    account_bodies: ResourceLimit,
    /// Memory for the large frames of all sockets, in KiB.
    pub frames: ResourceLimit,
    /// Threads that check signatures: half of the processors.
    pub signatures: ResourceLimit,
}

impl Limits {
    /// Full buckets, and all amounts free. `largest_guest_body` is in bytes: no request without a token has a larger
    /// body. An account's rate of zero is no limit.
    pub fn new(addresses: &config::RateLimits, accounts: &config::AccountRates, largest_guest_body: usize) -> Self {
        let address_rate = |limit, per_second: u32, burst: u32| {
            let wide = Quota::per_second(per_second.saturating_mul(SITE), burst.saturating_mul(SITE));
            RateLimit::new(limit).with(Scope::Own, Quota::per_second(per_second, burst)).with(Scope::Site, wide)
        };
        let rate = |limit, quota| RateLimit::new(limit).with(Scope::Own, quota);
        // A rate of zero counts as one here.
        let [standard, burst] = [addresses.per_second.max(1), addresses.burst.max(1)];
        let received = Quota::per_second(accounts.target_per_second, accounts.target_burst);
        let bodies = |total, shares| {
            let (reserve, small) = (SMALL_BODIES_KIB, SMALL_BODY_KIB);
            ResourceLimit::new(ResourceLimitConfig {
                total,
                shares,
                reserve,
                small,
                max_waiting: WAITING,
                fairness: Scope::Own,
                in_turn: false,
            })
        };
        let guest = kib(largest_guest_body);
        let halved = available_parallelism().map_or(1, |processors| processors.get() / 2).max(1);
        Self(Arc::new(Budgets {
            standard: address_rate(Refusal::AddressLimit, standard, burst),
            auth: address_rate(Refusal::AddressAuthLimit, addresses.auth_per_second.max(1), addresses.auth_burst),
            open: address_rate(Refusal::AddressLimit, standard.saturating_mul(OPEN), burst.saturating_mul(OPEN_BURST)),
            requests: rate(Refusal::AccountLimit, Quota::per_second(accounts.per_second, accounts.burst)),
            trickle: rate(Refusal::TargetLimit, received.and(Quota::per_second(TRICKLE_PER_SECOND, TRICKLE_BURST))),
            received: rate(Refusal::TargetLimit, received),
            bundles: rate(Refusal::BundleLimit, Quota::per_hour(accounts.bundles_per_hour)),
            one_time_prekeys: rate(
                Refusal::BundleLimit,
                Quota::per_hour_with_burst(accounts.one_time_prekeys_per_hour, accounts.one_time_prekeys_burst),
            ),
            refills: rate(Refusal::AccountLimit, Quota::per_hour_with_burst(REFILLS_PER_HOUR, REFILLS_AT_ONCE)),
            guest_bodies: bodies(
                GUEST_BODIES_KIB,
                vec![(Scope::Own, guest), (Scope::Site, guest.saturating_mul(GUEST_BODIES_OF_SITE))],
            ),
            account_bodies: bodies(
                ACCOUNT_BODIES_KIB,
                vec![
                    (Scope::Own, BODIES_OF_ACCOUNT_KIB),
                    (Scope::Client, ACCOUNT_BODIES_OF_ADDRESS_KIB),
                    (Scope::Block, ACCOUNT_BODIES_OF_NETWORK_KIB),
                ],
            ),
            frames: ResourceLimit::new(frames()),
            signatures: ResourceLimit::new(ResourceLimitConfig {
                max_waiting: WAITING,
                fairness: Scope::Block,
                ..ResourceLimitConfig::total(u32::try_from(halved).unwrap_or(u32::MAX))
            }),
        }))
    }
}

/// What the memory for large frames allows, in KiB.
fn frames() -> ResourceLimitConfig {
    let shares = vec![
        (Scope::Own, FRAMES_OF_ACCOUNT_KIB),
        (Scope::Client, FRAMES_OF_ADDRESS_KIB),
        (Scope::Block, FRAMES_OF_NETWORK_KIB),
    ];
    let (max_waiting, fairness, in_turn) = (FRAMES_WAITING, Scope::Client, true);
    ResourceLimitConfig { shares, max_waiting, fairness, in_turn, ..ResourceLimitConfig::total(FRAMES_KIB) }
}

impl Budgets {
    /// Takes a request from a client's address.
    pub fn address(&self, tier: Tier, client: LimitSubject) -> Result<(), RateLimited> {
        match tier {
            Tier::Standard => self.standard.take(client),
            Tier::Auth => self.auth.take(client),
            Tier::Open => self.open.take(client),
        }
    }

    /// Takes a request of this account.
    pub fn request(&self, account: UserId) -> Result<(), RateLimited> {
        self.requests.take(LimitSubject::Account(account))
    }

    /// Takes a send from one account to another. Sends of an account to itself are free.
    pub fn send(&self, sender: UserId, target: UserId) -> Result<(), RateLimited> {
        if sender == target {
            return Ok(());
        }
        let Err(wait) = self.received.take(LimitSubject::Account(target)) else { return Ok(()) };
        self.trickle.take(LimitSubject::Pair(sender, target)).map_err(|other| wait.min(other))
    }

    /// Takes a fetch of another account's prekey bundles. An account's own are free.
    pub fn bundles(&self, asker: UserId, target: UserId) -> Result<(), RateLimited> {
        if asker == target { Ok(()) } else { self.bundles.take(LimitSubject::Pair(asker, target)) }
    }

    /// Returns true if a fetch may spend one-time prekeys of the target. All other accounts share this budget, and the target
    /// has the same for itself.
    pub fn may_spend_one_time_prekeys(&self, asker: UserId, target: UserId) -> bool {
        let subject = if asker == target { LimitSubject::Pair(asker, target) } else { LimitSubject::Account(target) };
        self.one_time_prekeys.take(subject).is_ok()
    }

    /// Takes an upload of keys of this account.
    pub fn refill(&self, account: UserId) -> Result<Refill<'_>, RateLimited> {
        let subject = LimitSubject::Account(account);
        self.refills.take(subject)?;
        Ok(Refill { rate: &self.refills, subject })
    }

    /// The memory for the bodies of this subject's requests, in KiB.
    pub fn bodies(&self, subject: LimitSubject) -> &ResourceLimit {
        if matches!(subject, LimitSubject::Account(_) | LimitSubject::AccountAt(..)) {
            &self.account_bodies
        } else {
            &self.guest_bodies
        }
    }
}

/// An upload of keys. It counts as one that changes something unless [`Refill::refund`] says otherwise.
pub struct Refill<'a> {
    rate: &'a RateLimit,
    subject: LimitSubject,
}

impl Refill<'_> {
    /// Nothing has changed: the upload costs nothing.
    pub fn refund(self) {
        self.rate.release(self.subject);
    }
}

/// Bytes in whole KiB.
pub fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
