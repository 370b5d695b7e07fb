//! How often: token buckets in a fixed amount of memory.
//!
//! Each scope of a rate is a table with two rows of cells. A subject has one cell in each row, chosen by its secret hash,
//! and a request needs a token in one of them. A subject that shares a cell with a busy one still has its other cell.
//! Nothing is ever forgotten, so an empty bucket can't be refilled by using up many others, and there is nothing to
//! clean up. The buckets are this node's: with several nodes a subject has more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::subject::{Key, LimitSubject, Scope};
use crate::telemetry::metrics::Refusal;

/// Cells of a row: half a MiB.
const CELLS: usize = 1 << 16;

/// Refused by this limit. The same request is allowed after this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RateLimited(pub Duration, pub Refusal);

/// The size of a bucket and how fast it fills.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// From one token to the next.
    step: Duration,
    /// Tokens in a full bucket, at least one.
    burst: u32,
}

impl Quota {
    /// `rate` in a second, and `burst` at once. A burst of zero counts as one. `None`, which is no limit, for a rate of 0.
    pub fn per_second(rate: u32, burst: u32) -> Option<Self> {
        Self::within(Duration::from_secs(1), rate, burst)
    }

    /// `count` in an hour, also all at once. `None` for 0.
    pub fn per_hour(count: u32) -> Option<Self> {
        Self::within(Duration::from_hours(1), count, count)
    }

    /// `rate` in an hour, and `burst` at once. A burst of zero counts as one. `None` for a rate of 0.
    pub fn per_hour_with_burst(rate: u32, burst: u32) -> Option<Self> {
        Self::within(Duration::from_hours(1), rate, burst)
    }

    /// `count` in a day, also all at once. `None` for 0.
    pub fn per_day(count: u32) -> Option<Self> {
        Self::within(Duration::from_hours(24), count, count)
    }

    fn within(period: Duration, count: u32, burst: u32) -> Option<Self> {
        (count > 0).then(|| Self { step: period / count, burst: burst.max(1) })
    }
}

/// A limit of how often, with a quota for each scope.
pub struct RateLimit {
    opened: Instant,
    limit: Refusal,
    /// From narrow to wide.
    tables: Vec<(Scope, Table)>,
}

impl RateLimit {
    /// No limit yet. What it refuses is counted as `limit`.
    pub fn new(limit: Refusal) -> Self {
        Self { opened: Instant::now(), limit, tables: Vec::new() }
    }

    /// Adds full buckets for a scope that is wider than those it has. `None` adds no limit.
    pub fn with(mut self, scope: Scope, quota: Option<Quota>) -> Self {
        debug_assert!(self.tables.last().is_none_or(|(last, _)| *last < scope), "from narrow to wide");
        self.tables.extend(quota.map(|quota| (scope, Table::new(scope, quota))));
        self
    }

    /// Takes a token in every scope of this subject, or none at all.
    pub fn take(&self, subject: LimitSubject) -> Result<(), RateLimited> {
        let now = nanos(self.opened.elapsed());
        let refuse = |wait| RateLimited(Duration::from_nanos(wait), self.limit);
        let tables = || self.tables.iter().filter_map(|(scope, table)| Some((table, subject.key(*scope)?)));
        // First the wider scopes are checked without taking a token. Otherwise a request that is refused by one scope would
        // already have taken a token in another.
        for (table, key) in tables().skip(1) {
            table.wait(key, now).map_err(refuse)?;
        }
        tables().try_for_each(|(table, key)| table.take(key, now).map_err(refuse))
    }

    /// Gives a token back in every scope of this subject, for a request that does not count after all.
    pub fn release(&self, subject: LimitSubject) {
        for (scope, table) in &self.tables {
            subject.key(*scope).iter().for_each(|key| table.release(*key));
        }
    }
}

/// The buckets of one scope.
struct Table {
    /// When the bucket of a cell is full again, in nanoseconds; any time in the past is full.
    rows: [Box<[AtomicU64]>; 2],
    /// From one token to the next, in nanoseconds.
    step: u64,
    /// From an empty bucket to a full one.
    fill: u64,
}

impl Table {
    fn new(scope: Scope, quota: Quota) -> Self {
        let cells = if scope == Scope::All { 1 } else { CELLS };
        let step = nanos(quota.step);
        Self { rows: [row(cells), row(cells)], step, fill: step.saturating_mul(quota.burst.into()) }
    }

    /// The subject's cell in each row. The two halves of the hash are independent of each other.
    fn cells(&self, Key(hash): Key) -> [&AtomicU64; 2] {
        let [one, other] = &self.rows;
        [&one[hash as usize % one.len()], &other[(hash >> 32) as usize % other.len()]]
    }

    /// Takes a token, or returns how long there is none, in nanoseconds.
    fn take(&self, key: Key, now: u64) -> Result<(), u64> {
        let take = |cell: &AtomicU64| {
            let take = |full_at| self.after(full_at, now).ok();
            cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .map_or_else(|full_at| self.after(full_at, now).map(drop), |_| Ok(()))
        };
        // From both cells, or a subject that shares neither of them would have two bursts.
        let [one, other] = self.cells(key).map(take);
        one.or_else(|wait| other.map_err(|other| wait.min(other)))
    }

    /// A cell that another subject has emptied meanwhile also gets a token, which does no harm.
    fn release(&self, key: Key) {
        for cell in self.cells(key) {
            let back = |full_at: u64| Some(full_at.saturating_sub(self.step));
            // It always succeeds.
            let _ = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
        }
    }

    /// The same without taking one.
    fn wait(&self, key: Key, now: u64) -> Result<(), u64> {
        let [one, other] = self.cells(key).map(|cell| self.after(cell.load(Ordering::Relaxed), now).map(drop));
        one.or_else(|wait| other.map_err(|other| wait.min(other)))
    }

    /// When a bucket that is full at `full_at` is full after one more token; an error is the wait for that token.
    fn after(&self, full_at: u64, now: u64) -> Result<u64, u64> {
        let after = full_at.max(now).saturating_add(self.step);
        let latest = now.saturating_add(self.fill);
        if after <= latest { Ok(after) } else { Err(after - latest) }
    }
}

/// Full buckets. Zeros that are turned into cells in place stay untouched in an optimized build, so that the system gives only
/// the pages that are used later.
fn row(cells: usize) -> Box<[AtomicU64]> {
    vec![0; cells].into_iter().map(AtomicU64::new).collect()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
