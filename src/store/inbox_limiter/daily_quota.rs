//! The bytes that accounts have queued lately, and what of that is written down.
//!
//! A group charges the days of its senders before its commit. Until then its bytes count as under way, also for other groups.
//! The commit makes them count for good; if it fails, they are taken back.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::ids::UserId;
use crate::model::message::RefusalReason;
use crate::store::inbox_limiter::{Admission, Candidate, InboxLimiter, MAX_DEBT};

/// Sending accounts whose bytes of the day are remembered.
const REMEMBERED_DAYS: usize = 100_000;
/// The bytes that an account has queued are written down at this part of a day's bytes.
const WRITTEN_PARTS: u64 = 64;
const DAY: Duration = Duration::from_hours(24);

/// The bytes that one account has queued lately.
#[derive(Clone, Copy, Debug, Default)]
struct DailyUsage {
    /// The time at which the stored bytes are paid for, at the allowed bytes a day.
    paid_at: Timestamp,
    /// Bytes of committed groups that this node has not written down yet.
    unwritten: u64,
    /// Bytes of groups that are not committed yet, and those that they write down.
    under_way: u64,
}

/// The days of all accounts that are remembered.
#[derive(Default)]
pub(super) struct DailyUsages(HashMap<UserId, DailyUsage>);

/// What a group charges one account.
#[derive(Clone, Copy, Default)]
pub(super) struct Charge {
    bytes: u64,
    /// Bytes of former groups that this one writes down together with its own.
    former: u64,
    /// The account's new `paid_at`, if its bytes are written down.
    paid_at: Option<Timestamp>,
}

/// The charges of a group. They are taken back when this is dropped before [`Charges::commit`].
pub(in crate::store) struct Charges {
    inbox_limiter: InboxLimiter,
    of_accounts: HashMap<UserId, Charge>,
}

impl DailyUsages {
    /// Charges the sender's day with a message.
    pub(super) fn charge(
        &mut self,
        charges: &mut HashMap<UserId, Charge>,
        one: &Candidate,
        bytes_per_day: u64,
        now: Timestamp,
    ) -> Admission {
        if bytes_per_day == 0 {
            return Ok(());
        }
        if self.0.len() > REMEMBERED_DAYS {
            self.0.retain(|_, day| day.paid_at > now || day.under_way > 0);
            if self.0.len() > REMEMBERED_DAYS {
                self.0.clear();
            }
        }
        let day = self.0.entry(one.sender).or_default();
        // A time that a wrong clock has stored must not block the account.
        let is_believed = day.paid_at > now && day.paid_at <= now + MAX_DEBT;
        let (paid_at, latest) = (if is_believed { day.paid_at } else { now }, now + DAY);
        let unpaid = day.unwritten.saturating_add(day.under_way);
        let paid_at = paid_at + cost(unpaid.saturating_add(one.bytes), bytes_per_day);
        if paid_at > latest && (unpaid > 0 || is_believed) {
            return Err((
                RefusalReason::Day,
                Duration::from_millis((paid_at.millis() - latest.millis()).unsigned_abs()),
            ));
        }
        day.under_way = day.under_way.saturating_add(one.bytes);
        charges.entry(one.sender).or_default().bytes += one.bytes;
        Ok(())
    }

    /// The bytes of an account that are not written down.
    #[cfg(test)]
    pub(super) fn unwritten(&self, sender: UserId) -> u64 {
        self.0.get(&sender).map_or(0, |day| day.unwritten)
    }
}

impl Charges {
    pub(super) fn new(inbox_limiter: &InboxLimiter, of_accounts: HashMap<UserId, Charge>) -> Self {
        Self { inbox_limiter: inbox_limiter.clone(), of_accounts }
    }

    /// The charged accounts that have queued enough to be written down, each with the part of a day that it takes, in
    /// milliseconds.
    pub(in crate::store) fn debts(&mut self) -> Vec<(UserId, i64)> {
        let bytes_per_day = self.inbox_limiter.bytes_per_day;
        let enough = (bytes_per_day / WRITTEN_PARTS).max(1);
        let mut state = self.inbox_limiter.state();
        let mut debts = Vec::new();
        for (sender, charge) in &mut self.of_accounts {
            let day = state.days.0.entry(*sender).or_default();
            let bytes = day.unwritten.saturating_add(charge.bytes);
            if bytes >= enough {
                charge.former = std::mem::take(&mut day.unwritten);
                day.under_way = day.under_way.saturating_add(charge.former);
                let cost = i64::try_from(cost(bytes, bytes_per_day).as_millis()).unwrap_or(i64::MAX);
                debts.push((*sender, cost));
            }
        }
        debts.sort_unstable();
        debts
    }

    /// Takes what the transaction has written down of these accounts.
    pub(in crate::store) fn written(&mut self, debts: &[(UserId, Timestamp)]) {
        for (sender, paid_at) in debts {
            if let Some(charge) = self.of_accounts.get_mut(sender) {
                charge.paid_at = Some(*paid_at);
            }
        }
    }

    /// Makes the charges count for good. To be called after the commit.
    pub(in crate::store) fn commit(mut self) {
        self.end(true);
    }

    fn end(&mut self, is_committed: bool) {
        if self.of_accounts.is_empty() {
            return;
        }
        let mut state = self.inbox_limiter.state();
        for (sender, charge) in self.of_accounts.drain() {
            let day = state.days.0.entry(sender).or_default();
            day.under_way = day.under_way.saturating_sub(charge.bytes.saturating_add(charge.former));
            match charge.paid_at {
                Some(paid_at) if is_committed => day.paid_at = paid_at,
                _ => {
                    let queued = if is_committed { charge.bytes } else { 0 };
                    day.unwritten = day.unwritten.saturating_add(queued).saturating_add(charge.former);
                }
            }
        }
    }
}

impl Drop for Charges {
    fn drop(&mut self) {
        self.end(false);
    }
}

/// The part of a day that this many bytes take.
fn cost(bytes: u64, bytes_per_day: u64) -> Duration {
    let millis = (u128::from(bytes) * DAY.as_millis()).div_ceil(u128::from(bytes_per_day));
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)).min(DAY * 2)
}
