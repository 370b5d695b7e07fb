//! Is there room for a message? A node remembers what waits in inboxes, so that only an inbox that seems to be more than half
//! full has to be counted. The limits themselves are in [`bounds`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, UserId};
use crate::model::message::RefusalReason;
use crate::store::Limits;
use bounds::Bounds;
pub(super) use bounds::{Candidate, InboxLoad};
pub(super) use daily_quota::Charges;
use daily_quota::{Charge, DailyUsages};
use inbox::{Doubt, Inbox};

mod bounds;
mod daily_quota;
mod inbox;

/// Inboxes that are remembered. Above that all are forgotten before the next group, and counted again when they get mail.
const REMEMBERED_INBOXES: usize = 100_000;
/// Senders that are remembered in all these inboxes together, some 15 MiB. Above that the inboxes with senders are forgotten.
const REMEMBERED_SENDERS: usize = 250_000;
/// When a repeat may find room in a full inbox. The device has to connect and acknowledge mail first.
const INBOX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// No stored debt of an account is longer than this, unless the clock was wrong.
pub(super) const MAX_DEBT: Duration = Duration::from_hours(72);

/// A group on SQLite begins no further count once it has counted this many messages and inboxes: everything waits for the
/// writer.
const COUNTED_IN_SQLITE: u64 = 8_000;
/// The same for a group on PostgreSQL, where other groups wait only for its accounts.
const COUNTED_IN_POSTGRES: u64 = 32_000;
/// So many bytes a row may say too much, at random. By its values the nodes recognise a row that another one has written: if one
/// device is full, mail for another one would not change them.
const MARKS: i64 = 64 << 10;
/// Inboxes in one count, unless they are so large that fewer of them are as much as a group counts.
const COUNTED_AT_ONCE: u64 = 64;

/// `Ok` if there is room; else the reason and the time after which there may be room.
pub(super) type Admission = Result<(), (RefusalReason, Duration)>;

/// An upper bound of the messages and bytes that wait for a device of an account, as the account's row in PostgreSQL has it.
pub(super) type AccountBound = (i32, i64);

/// An account's row before a group and with all that the group has for the account.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AccountRow {
    pub(super) before: AccountBound,
    pub(super) now: AccountBound,
}

/// What a node remembers. Cloning gives the same.
#[derive(Clone)]
pub(super) struct InboxLimiter {
    bounds: Bounds,
    bytes_per_day: u64,
    /// True on SQLite: all messages that leave inboxes do so through this node. See [`InboxLimiter::left`].
    sees_all: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    inboxes: HashMap<DeviceNo, Inbox>,
    /// How many senders are in `inboxes`.
    senders: usize,
    days: DailyUsages,
}

/// One result of a count: a device, an account that sent to it, and how much waits from that account.
pub(super) type Counted = (DeviceNo, UserId, InboxLoad);

/// A row of a count.
pub(super) fn counted((device, sender, messages, bytes): (DeviceNo, UserId, i64, i64)) -> Counted {
    (device, sender, InboxLoad { messages: messages.unsigned_abs(), bytes: bytes.unsigned_abs() })
}

/// How many messages and inboxes a group may still count. The last count may be of more.
pub(super) struct Counting(u64);

impl Counting {
    /// True when the group counts nothing more.
    pub(super) fn is_over(&self) -> bool {
        self.0 == 0
    }

    /// Takes the result of a count of so many inboxes. Returns how many messages were counted.
    pub(super) fn add(&mut self, inboxes: usize, found: &[Counted]) -> u64 {
        let messages = found.iter().map(|(.., load)| load.messages).sum();
        self.0 = self.0.saturating_sub(inboxes as u64 + messages);
        messages
    }
}

/// The inboxes that a group has to count, or should.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unsure {
    /// Too little is known of these to evaluate the messages for them. In the order of the messages.
    pub(super) unknown: Vec<(UserId, DeviceNo)>,
    /// What is remembered of these has no room for a message, and mail may have left them since. In the order in which they
    /// were counted last, so that each has its turn.
    pub(super) stale: Vec<(UserId, DeviceNo)>,
}

impl InboxLimiter {
    pub(super) fn new(limits: &Limits, sees_all: bool) -> Self {
        let (bounds, bytes_per_day) = (Bounds::of(limits), limits.sender_bytes_per_day);
        Self { bounds, bytes_per_day, sees_all, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much one group counts.
    pub(super) fn counting(&self) -> Counting {
        Counting(if self.sees_all { COUNTED_IN_SQLITE } else { COUNTED_IN_POSTGRES })
    }

    /// How many inboxes one count takes.
    pub(super) fn counted_at_once(&self) -> usize {
        let inboxes = self.counting().0 / self.bounds.most_messages().max(1);
        usize::try_from(inboxes.clamp(1, COUNTED_AT_ONCE)).unwrap_or(1)
    }

    /// True if the inbox of a device may be more than half full, by the account's row.
    pub(super) fn is_over_half(&self, (messages, bytes): AccountBound) -> bool {
        let load = InboxLoad { messages: messages.unsigned_abs().into(), bytes: bytes.unsigned_abs() };
        self.bounds.is_over_half(load)
    }

    /// Forgets inboxes when too much is remembered. Called at the beginning of a group, which then counts what it needs.
    pub(super) fn evict(&self) {
        let mut state = self.state();
        if state.inboxes.len() > REMEMBERED_INBOXES {
            state.inboxes.clear();
            state.senders = 0;
        } else if state.senders > REMEMBERED_SENDERS {
            state.inboxes.retain(|_, inbox| inbox.count.is_none());
            state.senders = 0;
        }
    }

    /// The devices whose inboxes have to be counted before these messages can be evaluated, or should be. `before` gives the
    /// row of an account as it was before this group; accounts for which it is `None` have room.
    pub(super) fn uncertain(&self, incoming: &[Candidate], before: impl Fn(UserId) -> Option<AccountBound>) -> Unsure {
        let now = Instant::now();
        let (mut places, mut of_devices) = (HashMap::new(), Vec::<Vec<Candidate>>::new());
        for one in incoming {
            let place = *places.entry(one.device).or_insert(of_devices.len());
            match of_devices.get_mut(place) {
                Some(of_device) => of_device.push(*one),
                None => of_devices.push(vec![*one]),
            }
        }
        let (mut uncertain, mut stale) = (Unsure::default(), Vec::new());
        let state = self.state();
        for incoming in &of_devices {
            let Candidate { user, device, .. } = incoming[0];
            let Some(account_bound) = before(user) else { continue };
            let doubt = match state.inboxes.get(&device) {
                Some(inbox) => inbox.doubt(&self.bounds, incoming, account_bound, (self.sees_all, now)),
                None => Some(Doubt::Unknown),
            };
            match doubt {
                Some(Doubt::Unknown) => uncertain.unknown.push((user, device)),
                Some(Doubt::Stale { counted_at }) => stale.push((counted_at, user, device)),
                None => {}
            }
        }
        stale.sort_by_key(|(counted_at, ..)| *counted_at);
        uncertain.stale = stale.into_iter().map(|(_, user, device)| (user, device)).collect();
        uncertain
    }

    /// Stores the result of a count of these devices' inboxes, each with its account's row as it was before the group.
    pub(super) fn counted(&self, devices: impl IntoIterator<Item = (DeviceNo, AccountBound)>, found: &[Counted]) {
        let now = Instant::now();
        let mut of_devices: HashMap<DeviceNo, HashMap<UserId, InboxLoad>> = HashMap::new();
        for (device, sender, load) in found {
            of_devices.entry(*device).or_default().insert(*sender, *load);
        }
        let mut state = self.state();
        for (device, account_bound) in devices {
            let senders = of_devices.remove(&device).unwrap_or_default();
            let former = state.inboxes.remove(&device);
            state.senders -= former.as_ref().map_or(0, Inbox::senders);
            state.senders += senders.len();
            state.inboxes.insert(device, Inbox::counted(senders, former, account_bound, now));
        }
    }

    /// Notes that messages have left these inboxes, or are about to, so many of each.
    pub(super) fn left(&self, messages: impl IntoIterator<Item = (DeviceNo, u64)>) {
        let mut state = self.state();
        for (device, messages) in messages {
            if let Some(inbox) = state.inboxes.get_mut(&device) {
                inbox.left(messages);
            }
        }
    }

    /// Evaluates these messages one after the other; each admitted one counts for those after it. `row` gives the row of an
    /// account; an account for which it is `None` has room in any case.
    ///
    /// A refusal has the time after which there may be room. The days of the senders are charged with what is admitted.
    /// Returns `None`, and evaluates nothing, when an inbox is not remembered any more because another group has begun: it has
    /// to be counted again, or it would be taken for empty.
    pub(super) fn admit(
        &self,
        incoming: &[Candidate],
        now: Timestamp,
        row: impl Fn(UserId) -> Option<AccountRow>,
    ) -> Option<(Vec<Admission>, Charges)> {
        let mut locked = self.state();
        let state = &mut *locked;
        if incoming.iter().any(|one| row(one.user).is_some() && !state.inboxes.contains_key(&one.device)) {
            return None;
        }
        let (mut admissions, mut charges) = (Vec::with_capacity(incoming.len()), HashMap::new());
        for one in incoming {
            admissions.push(match row(one.user) {
                None => state.days.charge(&mut charges, one, self.bytes_per_day, now),
                Some(row) => self.admit_to_inbox(state, &mut charges, one, now, row),
            });
        }
        for one in incoming {
            if let Some(inbox) = state.inboxes.get_mut(&one.device) {
                state.senders -= inbox.forget_senders(&self.bounds);
            }
        }
        drop(locked);
        Some((admissions, Charges::new(self, charges)))
    }

    fn admit_to_inbox(
        &self,
        state: &mut State,
        charges: &mut HashMap<UserId, Charge>,
        one: &Candidate,
        now: Timestamp,
        row: AccountRow,
    ) -> Admission {
        let inbox = state.inboxes.entry(one.device).or_default();
        // Otherwise another node has queued mail that was not counted here, which is to be noticed next time as well.
        if inbox.account_bound == row.before {
            inbox.account_bound = row.now;
        }
        if let Err(reason) = self.bounds.admits(inbox.total, inbox.of(one.sender), one.is_own(), one.bytes) {
            return Err((reason, INBOX_RETRY_AFTER));
        }
        state.days.charge(charges, one, self.bytes_per_day, now)?;
        if let Some(inbox) = state.inboxes.get_mut(&one.device) {
            state.senders += inbox.add(one);
        }
        Ok(())
    }

    /// The new row of an account whose devices have all been counted: how much waits at most for one of them. `None` when
    /// one of them is not remembered any more, since another group has failed or begun: the row stays as it is, and says
    /// too much.
    pub(super) fn new_account_bound(&self, devices: &[DeviceNo]) -> Option<AccountBound> {
        let mut state = self.state();
        let mut most = InboxLoad::default();
        for device in devices {
            let total = state.inboxes.get(device)?.total;
            most = InboxLoad { messages: most.messages.max(total.messages), bytes: most.bytes.max(total.bytes) };
        }
        let bytes = i64::try_from(most.bytes).unwrap_or(i64::MAX).saturating_add(rand::random_range(0..MARKS));
        let account_bound = (i32::try_from(most.messages).unwrap_or(i32::MAX), bytes);
        for device in devices {
            if let Some(inbox) = state.inboxes.get_mut(device) {
                inbox.account_bound = account_bound;
            }
        }
        Some(account_bound)
    }

    /// Says that the row of an account for which a group queued nothing is again as it was before the group.
    pub(super) fn restored(&self, devices: impl IntoIterator<Item = DeviceNo>, row: AccountRow) {
        let mut state = self.state();
        for device in devices {
            if let Some(inbox) = state.inboxes.get_mut(&device)
                && inbox.account_bound == row.now
            {
                inbox.account_bound = row.before;
            }
        }
    }

    /// Forgets the inboxes of a group that was not committed: it may have counted them without the messages that it was
    /// about to delete.
    pub(super) fn clear(&self, devices: &[DeviceNo]) {
        let mut state = self.state();
        for device in devices {
            if let Some(inbox) = state.inboxes.remove(device) {
                state.senders -= inbox.senders();
            }
        }
    }
}

#[cfg(test)]
mod tests;
