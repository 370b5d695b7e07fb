//! How often an account may do something, and have something done to it. The limits per client address are in `api`.
//!
//! A bucket of tokens for each account, or pair of accounts, in a fixed amount of memory: two rows of cells, in each of
//! which an account has the cell that a secret hash gives it. Whoever shares a cell with a busy account still has the
//! other row, since one token is enough. So nothing has to be forgotten, and nobody can have his own empty bucket
//! forgotten by using up many others. The buckets are this node's; with several nodes an account has more.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::config;
use crate::model::ids::UserId;
use crate::telemetry::metrics::Refusal;

/// Cells of a row: half a MiB.
const CELLS: usize = 1 << 16;
/// While somebody is being flooded, each account still reaches him so many times at once …
const TRICKLE_BURST: u32 = 20;
/// … and once in this time, so that a flood doesn't silence others.
const TRICKLE_STEP: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);

/// Too often, by this limit. The same is allowed after this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wait(pub Duration, pub Refusal);

/// The limits of accounts on this node. Cloning gives the same ones.
#[derive(Clone)]
pub struct Rates {
    inner: Arc<Inner>,
}

struct Inner {
    opened: Instant,
    requests: Option<Buckets>,
    /// What reaches an account from all others together, and from each one alone while that is too much.
    received: Option<(Buckets, Buckets)>,
    bundles: Option<Buckets>,
}

impl Rates {
    /// Full buckets for everybody. A rate of zero is no limit.
    pub fn new(config: &config::AccountRates) -> Self {
        let requests = Buckets::per_second(config.per_second, config.burst, Refusal::AccountLimit);
        let received = Buckets::per_second(config.target_per_second, config.target_burst, Refusal::TargetLimit)
            .map(|together| (together, Buckets::new(TRICKLE_STEP, TRICKLE_BURST, Refusal::TargetLimit)));
        let per_hour = config.bundles_per_hour;
        let bundles = (per_hour > 0).then(|| Buckets::new(HOUR / per_hour, per_hour, Refusal::BundleLimit));
        Self { inner: Arc::new(Inner { opened: Instant::now(), requests, received, bundles }) }
    }

    /// Takes a request of this account.
    pub fn request(&self, account: UserId) -> Result<(), Wait> {
        self.inner.requests.as_ref().map_or(Ok(()), |requests| requests.take(account, self.now()))
    }

    /// Takes a send from one account to another. Sends of an account to itself are free.
    pub fn send(&self, sender: UserId, target: UserId) -> Result<(), Wait> {
        let Some((together, alone)) = self.inner.received.as_ref().filter(|_| sender != target) else { return Ok(()) };
        let now = self.now();
        let Err(wait) = together.take(target, now) else { return Ok(()) };
        alone.take((sender, target), now).map_err(|other| wait.min(other))
    }

    /// Takes a look of one account at the prekey bundles of another, which costs that one prekeys.
    pub fn bundles(&self, asker: UserId, target: UserId) -> Result<(), Wait> {
        let bundles = self.inner.bundles.as_ref().filter(|_| asker != target);
        bundles.map_or(Ok(()), |bundles| bundles.take((asker, target), self.now()))
    }

    /// Nanoseconds since the start.
    fn now(&self) -> u64 {
        nanos(self.inner.opened.elapsed())
    }
}

/// Buckets of one kind.
struct Buckets {
    rows: [Row; 2],
    /// From one token to the next.
    step: u64,
    /// From an empty bucket to a full one.
    fill: u64,
    /// Which limit they are.
    limit: Refusal,
}

struct Row {
    hash: RandomState,
    /// When the bucket is full again; whatever lies in the past is full.
    full_at: Box<[AtomicU64]>,
}

impl Buckets {
    fn new(step: Duration, burst: u32, limit: Refusal) -> Self {
        let step = nanos(step);
        Self { rows: [Row::new(), Row::new()], step, fill: step.saturating_mul(burst.max(1).into()), limit }
    }

    fn per_second(rate: u32, burst: u32, limit: Refusal) -> Option<Self> {
        (rate > 0).then(|| Self::new(Duration::from_secs(1) / rate, burst, limit))
    }

    fn take(&self, key: impl Hash + Copy, now: u64) -> Result<(), Wait> {
        let [one, other] = self.rows.each_ref().map(|row| row.take(key, now, self));
        one.or_else(|wait| other.map_err(|other| wait.min(other)))
    }
}

impl Row {
    fn new() -> Self {
        Self { hash: RandomState::new(), full_at: (0..CELLS).map(|_| AtomicU64::new(0)).collect() }
    }

    fn take(&self, key: impl Hash, now: u64, buckets: &Buckets) -> Result<(), Wait> {
        let cell = &self.full_at[self.hash.hash_one(key) as usize % CELLS];
        let after = |full_at: u64| full_at.max(now).saturating_add(buckets.step);
        let latest = now.saturating_add(buckets.fill);
        let take = |full_at| Some(after(full_at)).filter(|after| *after <= latest);
        match cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(full_at) => Err(Wait(Duration::from_nanos(after(full_at).saturating_sub(latest)), buckets.limit)),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: config::AccountRates =
        config::AccountRates { per_second: 10, burst: 20, target_per_second: 5, target_burst: 40, bundles_per_hour: 6 };

    fn taken(mut take: impl FnMut() -> Result<(), Wait>) -> u32 {
        (0..1000).map(|_| u32::from(take().is_ok())).sum()
    }

    #[tokio::test(start_paused = true)]
    async fn an_account_has_a_burst_at_first_and_waiting_as_long_as_told_suffices() {
        let rates = Rates::new(&RATES);
        let (busy, quiet) = (UserId::random(), UserId::random());
        assert_eq!(taken(|| rates.request(busy)), 20);
        rates.request(quiet).unwrap();
        for _ in 0..50 {
            let Wait(wait, _) = rates.request(busy).unwrap_err();
            assert!(wait <= Duration::from_millis(100), "{wait:?}");
            tokio::time::advance(wait.max(Duration::from_millis(1))).await;
            rates.request(busy).unwrap();
        }
        tokio::time::advance(HOUR).await;
        assert_eq!(taken(|| rates.request(busy)), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_at_one_account_is_slowed_and_others_still_reach_it() {
        let rates = Rates::new(&RATES);
        let (victim, friend) = (UserId::random(), UserId::random());
        let flooders: Vec<_> = (0..10).map(|_| UserId::random()).collect();
        let flood = || flooders.iter().map(|flooder| taken(|| rates.send(*flooder, victim))).sum::<u32>();
        assert_eq!(flood(), 40 + 10 * TRICKLE_BURST);
        rates.send(friend, victim).unwrap();
        rates.send(flooders[0], friend).unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!((5..=5 + 10).contains(&flood()), "what comes back in a second");
    }

    #[tokio::test(start_paused = true)]
    async fn an_asker_gets_so_many_bundles_of_an_account_in_an_hour() {
        let rates = Rates::new(&RATES);
        let (asker, target) = (UserId::random(), UserId::random());
        assert_eq!(taken(|| rates.bundles(asker, target)), 6);
        assert_eq!(rates.bundles(asker, target), Err(Wait(HOUR / 6, Refusal::BundleLimit)));
        rates.bundles(asker, UserId::random()).unwrap();
        rates.bundles(target, asker).unwrap();
        tokio::time::advance(HOUR / 6).await;
        assert_eq!(taken(|| rates.bundles(asker, target)), 1);
    }

    #[test]
    fn nobody_is_kept_from_his_own_devices() {
        let (rates, own) = (Rates::new(&RATES), UserId::random());
        assert_eq!((taken(|| rates.send(own, own)), taken(|| rates.bundles(own, own))), (1000, 1000));
    }

    #[test]
    fn a_rate_of_zero_is_no_limit_and_a_burst_of_zero_is_one() {
        let off = config::AccountRates { per_second: 0, target_per_second: 0, bundles_per_hour: 0, ..RATES };
        let (rates, one, other) = (Rates::new(&off), UserId::random(), UserId::random());
        assert_eq!(taken(|| rates.request(one)), 1000);
        assert_eq!(taken(|| rates.send(one, other)), 1000);
        assert_eq!(taken(|| rates.bundles(one, other)), 1000);
        let rates = Rates::new(&config::AccountRates { per_second: 1, burst: 0, ..RATES });
        assert_eq!(taken(|| rates.request(one)), 1);
    }

    /// In a map with a bound, enough other accounts would push an empty bucket out, and so fill it.
    #[tokio::test(start_paused = true)]
    async fn many_other_accounts_neither_fill_an_empty_bucket_nor_take_anything_from_others() {
        let rates = Rates::new(&config::AccountRates { per_second: 1, burst: 200, ..RATES });
        let (empty, quiet) = (UserId::random(), UserId::random());
        assert_eq!(taken(|| rates.request(empty)), 200);
        for _ in 0..5 * CELLS {
            rates.request(UserId::random()).unwrap();
        }
        rates.request(empty).unwrap_err();
        rates.request(quiet).unwrap();
    }

    /// A flood from many accounts takes cells from others in one row or the other, hardly ever in both.
    #[test]
    fn a_thousand_flooding_accounts_leave_others_alone() {
        let rates = Rates::new(&RATES);
        for _ in 0..1000 {
            let flooder = UserId::random();
            assert!(taken(|| rates.request(flooder)) <= 40, "at most what two cells have");
        }
        let refused = (0..10_000).filter(|_| rates.request(UserId::random()).is_err()).count();
        assert!(refused <= 50, "{refused} of 10 000");
    }
}
