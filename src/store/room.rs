//! Is there room for a message? The judgement itself is pure; beside it is what a node remembers of inboxes between two
//! groups, so that only one that seems to be more than half full has to be counted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, UserId};
use crate::model::mail::Shortage;
use crate::store::Limits;
use bounds::Bounds;
pub(super) use bounds::{Candidate, Load};

mod bounds;

/// Inboxes that are remembered. Past that all are forgotten before the next group, and counted again when they get mail.
const REMEMBERED_INBOXES: usize = 100_000;
/// Senders that are remembered in all these inboxes together, some 15 MiB.
const REMEMBERED_SENDERS: usize = 250_000;
/// Sending accounts whose bytes of the day are remembered.
const REMEMBERED_DAYS: usize = 100_000;
/// An inbox that was counted and had no room is not counted again for so long, however much comes for it.
const FULL_FOR: Duration = Duration::from_secs(1);
/// When a repeat may find room in an inbox. Its owner has to come and take mail, so it is no matter of seconds.
const INBOX_WAIT: Duration = Duration::from_secs(60);
/// What an account has queued is written down when it is this part of what it may queue in a day.
const WRITTEN_PARTS: u64 = 64;
const DAY: Duration = Duration::from_hours(24);
/// What is written down of a day doesn't reach further than this, unless the clock was wrong.
pub(super) const LONGEST_DEBT: Duration = Duration::from_hours(72);

/// Whether there is room, or what is lacking and when there may be some.
pub(super) type Verdict = Result<(), (Shortage, Duration)>;

/// How many messages, and bytes, at the most wait in PostgreSQL for a device of an account, as its row says.
pub(super) type Stamp = (i32, i64);

/// What is known of one inbox. It may say too much, as acks are not subtracted, but not too little.
#[derive(Clone, Debug, Default)]
struct Inbox {
    total: Load,
    /// By sending account; `None` while that makes no difference.
    senders: Option<HashMap<UserId, Load>>,
    /// When it was counted and had no room.
    full_since: Option<Instant>,
    /// What the account's row said when this was found out. If it says something else, another node has written.
    stamp: Stamp,
}

impl Inbox {
    fn of(&self, sender: UserId) -> Load {
        self.senders.as_ref().and_then(|senders| senders.get(&sender)).copied().unwrap_or_default()
    }

    fn was_full_at(&self, now: Instant) -> bool {
        self.full_since.is_some_and(|since| now.saturating_duration_since(since) < FULL_FOR)
    }

    /// Whether it has to be counted before these are judged.
    fn is_unsure(&self, bounds: &Bounds, coming: &[Candidate], stamp: Stamp, now: Instant) -> bool {
        let comes = coming.iter().fold(Load::default(), |sum, one| sum.plus(Load::one(one.bytes)));
        if self.stamp == stamp && !bounds.is_over_half(self.total.plus(comes)) {
            return false;
        }
        if self.senders.is_none() {
            return true;
        }
        let (mut total, mut added) = (self.total, HashMap::<UserId, Load>::new());
        let (mut admitted, mut refused) = (false, false);
        for one in coming {
            let of_sender = self.of(one.sender).plus(added.get(&one.sender).copied().unwrap_or_default());
            if bounds.admits(total, of_sender, one.is_own(), one.bytes).is_ok() {
                admitted = true;
                total = total.plus(Load::one(one.bytes));
                let of_sender = added.entry(one.sender).or_default();
                *of_sender = of_sender.plus(Load::one(one.bytes));
            } else {
                refused = true;
            }
        }
        (admitted && self.stamp != stamp) || (refused && !self.was_full_at(now))
    }
}

/// The bytes that one account has queued lately.
#[derive(Clone, Copy, Debug, Default)]
struct Day {
    /// When, at the allowed bytes a day, all that is written down will have been allowed.
    paid_at: Timestamp,
    /// Bytes that this node has not written down yet.
    unwritten: u64,
}

/// What a node remembers. Cloning gives the same.
#[derive(Clone)]
pub(super) struct Rooms {
    bounds: Bounds,
    bytes_per_day: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    inboxes: HashMap<DeviceNo, Inbox>,
    /// What the rows of accounts said when this node last had them.
    accounts: HashMap<UserId, Stamp>,
    /// Those in `inboxes`, or more.
    senders: usize,
    days: HashMap<UserId, Day>,
}

/// What one count of an inbox found: a device, an account that sent to it, and what waits from there.
pub(super) type Counted = (DeviceNo, UserId, Load);

/// A row of a count.
pub(super) fn counted((device, sender, messages, bytes): (DeviceNo, UserId, i64, i64)) -> Counted {
    (device, sender, Load { messages: messages.unsigned_abs(), bytes: bytes.unsigned_abs() })
}

impl Rooms {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { bounds: Bounds::of(limits), bytes_per_day: limits.sender_bytes_per_day, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a device of an account may be more than half full, by what the account's row says.
    pub(super) fn is_over_half(&self, (messages, bytes): Stamp) -> bool {
        let load = Load { messages: messages.unsigned_abs().into(), bytes: bytes.unsigned_abs() };
        self.bounds.is_over_half(load)
    }

    /// Forgets all inboxes when too many are remembered. At the beginning of a group, so that it counts what it needs.
    pub(super) fn bound(&self) {
        let mut state = self.state();
        if state.inboxes.len() > REMEMBERED_INBOXES || state.senders > REMEMBERED_SENDERS {
            state.inboxes.clear();
            state.accounts.clear();
            state.senders = 0;
        }
    }

    /// The devices whose inboxes have to be counted before these can be judged. `before` is what the row of an account said
    /// before they came; nothing is asked about an account for which it is `None`.
    pub(super) fn unsure(
        &self,
        coming: &[Candidate],
        before: impl Fn(UserId) -> Option<Stamp>,
    ) -> Vec<(UserId, DeviceNo)> {
        let now = Instant::now();
        let mut of_devices: HashMap<DeviceNo, Vec<Candidate>> = HashMap::new();
        for one in coming {
            of_devices.entry(one.device).or_default().push(*one);
        }
        let state = self.state();
        let is_unsure = |device: &DeviceNo, coming: &[Candidate]| {
            before(coming[0].user).is_some_and(|stamp| match state.inboxes.get(device) {
                Some(inbox) => inbox.is_unsure(&self.bounds, coming, stamp, now),
                None => true,
            })
        };
        let unsure = of_devices.iter().filter(|(device, coming)| is_unsure(device, coming));
        unsure.map(|(device, coming)| (coming[0].user, *device)).collect()
    }

    /// Takes in how much waits for these devices now.
    pub(super) fn counted(&self, devices: impl IntoIterator<Item = DeviceNo>, found: &[Counted], stamp: Stamp) {
        let mut state = self.state();
        for device in devices {
            let mut inbox = Inbox { stamp, ..Inbox::default() };
            let mut senders = HashMap::new();
            for (_, sender, load) in found.iter().filter(|(counted, ..)| *counted == device) {
                inbox.total = inbox.total.plus(*load);
                senders.insert(*sender, *load);
            }
            state.senders += senders.len();
            inbox.senders = Some(senders);
            state.inboxes.insert(device, inbox);
        }
    }

    /// Judges these one after the other, each with those before it that were admitted. `after` is what the row of an account
    /// says now; one for which it is `None` has room in any case.
    ///
    /// A refusal comes with the time after which there may be room. `None` when an inbox is not remembered any more, since
    /// another group has begun: it has to be counted again, or it would be taken for empty. Nothing is judged then.
    pub(super) fn judge(
        &self,
        coming: &[Candidate],
        now: Timestamp,
        after: impl Fn(UserId) -> Option<Stamp>,
    ) -> Option<Vec<Verdict>> {
        let mut state = self.state();
        let state = &mut *state;
        if coming.iter().any(|one| after(one.user).is_some() && !state.inboxes.contains_key(&one.device)) {
            return None;
        }
        let mut verdicts = Vec::with_capacity(coming.len());
        for one in coming {
            verdicts.push(match after(one.user) {
                None => state.charge(one, self.bytes_per_day, now),
                Some(stamp) => self.judge_inbox(state, one, now, stamp),
            });
        }
        for one in coming {
            if let Some(inbox) = state.inboxes.get_mut(&one.device)
                && !self.bounds.is_over_half(inbox.total)
            {
                inbox.senders = None;
            }
        }
        Some(verdicts)
    }

    fn judge_inbox(&self, state: &mut State, one: &Candidate, now: Timestamp, stamp: Stamp) -> Verdict {
        let inbox = state.inboxes.entry(one.device).or_default();
        inbox.stamp = stamp;
        if let Err(shortage) = self.bounds.admits(inbox.total, inbox.of(one.sender), one.is_own(), one.bytes) {
            inbox.full_since.get_or_insert_with(Instant::now);
            return Err((shortage, INBOX_WAIT));
        }
        state.charge(one, self.bytes_per_day, now)?;
        if let Some(inbox) = state.inboxes.get_mut(&one.device) {
            inbox.total = inbox.total.plus(Load::one(one.bytes));
            if let Some(senders) = &mut inbox.senders {
                let of_sender = senders.entry(one.sender).or_default();
                *of_sender = of_sender.plus(Load::one(one.bytes));
            }
        }
        Ok(())
    }

    /// How much waits at the most for one of these devices, which are all of an account's and have been counted: what the
    /// account's row is to say from now on.
    pub(super) fn stamped(&self, user: UserId, devices: &[DeviceNo]) -> Stamp {
        let mut state = self.state();
        let totals = devices.iter().filter_map(|device| state.inboxes.get(device)).map(|inbox| inbox.total);
        let most = totals.fold(Load::default(), |most, total| Load {
            messages: most.messages.max(total.messages),
            bytes: most.bytes.max(total.bytes),
        });
        let stamp = (i32::try_from(most.messages).unwrap_or(i32::MAX), i64::try_from(most.bytes).unwrap_or(i64::MAX));
        for device in devices {
            if let Some(inbox) = state.inboxes.get_mut(device) {
                inbox.stamp = stamp;
            }
        }
        if let Some(account) = state.accounts.get_mut(&user) {
            *account = stamp;
        }
        stamp
    }

    /// Whether what the row of an account says is what this node left there, so that its inboxes are known.
    pub(super) fn knows(&self, user: UserId, stamp: Stamp) -> bool {
        self.state().accounts.get(&user) == Some(&stamp)
    }

    /// Takes in what the rows of accounts say now.
    pub(super) fn learn(&self, rows: impl Iterator<Item = (UserId, Stamp)>) {
        let mut state = self.state();
        if state.accounts.len() > REMEMBERED_INBOXES {
            state.accounts.clear();
        }
        state.accounts.extend(rows);
    }

    /// Forgets all inboxes: a transaction that counted some did not end well.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.inboxes.clear();
        state.senders = 0;
    }

    /// The accounts of these senders that have queued enough to be written down, each with what that takes of a day in
    /// milliseconds. They count as written.
    pub(super) fn unwritten(&self, senders: impl Iterator<Item = UserId>) -> Vec<(UserId, i64)> {
        if self.bytes_per_day == 0 {
            return Vec::new();
        }
        let enough = (self.bytes_per_day / WRITTEN_PARTS).max(1);
        let mut state = self.state();
        let mut found = Vec::new();
        for sender in senders {
            let Some(day) = state.days.get_mut(&sender).filter(|day| day.unwritten >= enough) else { continue };
            let cost = i64::try_from(cost(day.unwritten, self.bytes_per_day).as_millis()).unwrap_or(i64::MAX);
            day.unwritten = 0;
            found.push((sender, cost));
        }
        found.sort_unstable();
        found
    }

    /// Takes in what is written down of an account.
    pub(super) fn written(&self, debts: &[(UserId, Timestamp)]) {
        let mut state = self.state();
        for (sender, paid_at) in debts {
            state.days.entry(*sender).or_default().paid_at = *paid_at;
        }
    }
}

impl State {
    /// Charges the sender's day with a message.
    fn charge(&mut self, one: &Candidate, bytes_per_day: u64, now: Timestamp) -> Verdict {
        if bytes_per_day == 0 {
            return Ok(());
        }
        if self.days.len() > REMEMBERED_DAYS {
            self.days.retain(|_, day| day.paid_at > now);
            if self.days.len() > REMEMBERED_DAYS {
                self.days.clear();
            }
        }
        let day = self.days.entry(one.sender).or_default();
        // What a wrong clock has written down blocks nobody.
        let is_believed = day.paid_at > now && day.paid_at <= now + LONGEST_DEBT;
        let (paid_at, latest) = (if is_believed { day.paid_at } else { now }, now + DAY);
        let unwritten = day.unwritten.saturating_add(one.bytes);
        let paid_at = paid_at + cost(unwritten, bytes_per_day);
        if paid_at > latest && (day.unwritten > 0 || is_believed) {
            return Err((Shortage::Day, Duration::from_millis((paid_at.millis() - latest.millis()).unsigned_abs())));
        }
        day.unwritten = unwritten;
        Ok(())
    }
}

/// What part of a day so many bytes take of their account.
fn cost(bytes: u64, bytes_per_day: u64) -> Duration {
    let millis = (u128::from(bytes) * DAY.as_millis()).div_ceil(u128::from(bytes_per_day));
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)).min(DAY * 2)
}

#[cfg(test)]
mod tests;
