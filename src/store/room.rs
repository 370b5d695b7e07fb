//! Is there room for a message? A node remembers what waits in inboxes, so that only an inbox that seems to be more than half
//! full has to be counted. The limits themselves are in [`bounds`].

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
pub(super) use days::Charges;
use days::{Charge, Days};

mod bounds;
mod days;

/// Inboxes that are remembered. Above that all are forgotten before the next group, and counted again when they get mail.
const REMEMBERED_INBOXES: usize = 100_000;
/// Senders that are remembered in all these inboxes together, some 15 MiB.
const REMEMBERED_SENDERS: usize = 250_000;
/// An inbox that was counted and had no room is not counted again within this time, however much mail comes for it.
const FULL_FOR: Duration = Duration::from_secs(1);
/// When a repeat may find room in a full inbox. The device has to connect and acknowledge mail first.
const INBOX_WAIT: Duration = Duration::from_secs(60);
/// No stored debt of an account is longer than this, unless the clock was wrong.
pub(super) const LONGEST_DEBT: Duration = Duration::from_hours(72);

/// `Ok` if there is room; else the reason and the time after which there may be room.
pub(super) type Verdict = Result<(), (Shortage, Duration)>;

/// An upper bound of the messages and bytes that wait for a device of an account, as the account's row in PostgreSQL has it.
pub(super) type Stamp = (i32, i64);

/// What is known of one inbox. The numbers may be too high, as acks are not subtracted, but not too low.
#[derive(Clone, Debug, Default)]
struct Inbox {
    total: Load,
    /// By sending account; `None` while the inbox is not more than half full.
    senders: Option<HashMap<UserId, Load>>,
    /// When it was counted and had no room.
    full_since: Option<Instant>,
    /// The account's row when the inbox was counted. If the row differs now, another node has queued mail.
    stamp: Stamp,
}

impl Inbox {
    fn of(&self, sender: UserId) -> Load {
        self.senders.as_ref().and_then(|senders| senders.get(&sender)).copied().unwrap_or_default()
    }

    fn was_full_at(&self, now: Instant) -> bool {
        self.full_since.is_some_and(|since| now.saturating_duration_since(since) < FULL_FOR)
    }

    /// True if the inbox has to be counted before these messages are judged.
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
    /// The rows of accounts when this node last read them.
    accounts: HashMap<UserId, Stamp>,
    /// How many senders are in `inboxes`.
    senders: usize,
    days: Days,
}

/// One result of a count: a device, an account that sent to it, and how much waits from that account.
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

    /// True if the inbox of a device may be more than half full, by the account's row.
    pub(super) fn is_over_half(&self, (messages, bytes): Stamp) -> bool {
        let load = Load { messages: messages.unsigned_abs().into(), bytes: bytes.unsigned_abs() };
        self.bounds.is_over_half(load)
    }

    /// Forgets all inboxes when too many are remembered. Called at the beginning of a group, which then counts what it needs.
    pub(super) fn bound(&self) {
        let mut state = self.state();
        if state.inboxes.len() > REMEMBERED_INBOXES || state.senders > REMEMBERED_SENDERS {
            state.inboxes.clear();
            state.accounts.clear();
            state.senders = 0;
        }
    }

    /// The devices whose inboxes have to be counted before these messages can be judged. `before` gives the row of an account
    /// as it was before this group; accounts for which it is `None` have room.
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

    /// Stores the result of a count of these devices' inboxes.
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
            if let Some(former) = state.inboxes.insert(device, inbox) {
                state.senders -= former.senders.map_or(0, |senders| senders.len());
            }
        }
    }

    /// Judges these messages one after the other; each admitted one counts for those after it. `after` gives the row of an
    /// account as it is now; an account for which it is `None` has room in any case.
    ///
    /// A refusal has the time after which there may be room. The days of the senders are charged with what is admitted. Returns `None`, and judges nothing, when an inbox is not
    /// remembered any more because another group has begun: it has to be counted again, or it would be taken for empty.
    pub(super) fn judge(
        &self,
        coming: &[Candidate],
        now: Timestamp,
        after: impl Fn(UserId) -> Option<Stamp>,
    ) -> Option<(Vec<Verdict>, Charges)> {
        let mut locked = self.state();
        let state = &mut *locked;
        if coming.iter().any(|one| after(one.user).is_some() && !state.inboxes.contains_key(&one.device)) {
            return None;
        }
        let (mut verdicts, mut charges) = (Vec::with_capacity(coming.len()), HashMap::new());
        for one in coming {
            verdicts.push(match after(one.user) {
                None => state.days.charge(&mut charges, one, self.bytes_per_day, now),
                Some(stamp) => self.judge_inbox(state, &mut charges, one, now, stamp),
            });
        }
        for one in coming {
            if let Some(inbox) = state.inboxes.get_mut(&one.device)
                && !self.bounds.is_over_half(inbox.total)
            {
                state.senders -= inbox.senders.take().map_or(0, |senders| senders.len());
            }
        }
        drop(locked);
        Some((verdicts, Charges::new(self, charges)))
    }

    fn judge_inbox(
        &self,
        state: &mut State,
        charges: &mut HashMap<UserId, Charge>,
        one: &Candidate,
        now: Timestamp,
        stamp: Stamp,
    ) -> Verdict {
        let inbox = state.inboxes.entry(one.device).or_default();
        inbox.stamp = stamp;
        if let Err(shortage) = self.bounds.admits(inbox.total, inbox.of(one.sender), one.is_own(), one.bytes) {
            inbox.full_since.get_or_insert_with(Instant::now);
            return Err((shortage, INBOX_WAIT));
        }
        state.days.charge(charges, one, self.bytes_per_day, now)?;
        if let Some(inbox) = state.inboxes.get_mut(&one.device) {
            inbox.total = inbox.total.plus(Load::one(one.bytes));
            if let Some(senders) = &mut inbox.senders {
                let before = senders.len();
                let of_sender = senders.entry(one.sender).or_default();
                *of_sender = of_sender.plus(Load::one(one.bytes));
                state.senders += senders.len() - before;
            }
        }
        Ok(())
    }

    /// The new row of an account whose devices have all been counted: how much waits at most for one of them. `None` when
    /// one of them is not remembered any more, since another group has failed or begun: the row stays as it is, and says
    /// too much.
    pub(super) fn stamped(&self, user: UserId, devices: &[DeviceNo]) -> Option<Stamp> {
        let mut state = self.state();
        let mut most = Load::default();
        for device in devices {
            let total = state.inboxes.get(device)?.total;
            most = Load { messages: most.messages.max(total.messages), bytes: most.bytes.max(total.bytes) };
        }
        let stamp = (i32::try_from(most.messages).unwrap_or(i32::MAX), i64::try_from(most.bytes).unwrap_or(i64::MAX));
        for device in devices {
            if let Some(inbox) = state.inboxes.get_mut(device) {
                inbox.stamp = stamp;
            }
        }
        if let Some(account) = state.accounts.get_mut(&user) {
            *account = stamp;
        }
        Some(stamp)
    }

    /// True if the row of an account is as this node left it, so that its inboxes are known.
    pub(super) fn knows(&self, user: UserId, stamp: Stamp) -> bool {
        self.state().accounts.get(&user) == Some(&stamp)
    }

    /// Stores the rows of accounts as they are now.
    pub(super) fn learn(&self, rows: impl Iterator<Item = (UserId, Stamp)>) {
        let mut state = self.state();
        if state.accounts.len() > REMEMBERED_INBOXES {
            state.accounts.clear();
        }
        state.accounts.extend(rows);
    }

    /// Forgets all inboxes: a transaction that counted some of them has failed.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.inboxes.clear();
        state.senders = 0;
    }
}

#[cfg(test)]
mod tests;
