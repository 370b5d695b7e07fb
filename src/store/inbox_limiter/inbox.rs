//! What is remembered of one inbox, and when that is not enough.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::ids::UserId;
use crate::store::inbox_limiter::bounds::{Bounds, Candidate, InboxLoad};
use crate::store::inbox_limiter::{AccountBound, INBOX_RETRY_AFTER};

/// The pause after a first count that found no room. It doubles with each further one, up to `LONGEST_PAUSE`.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// A refused sender is told to come again after this time.
pub(super) const LONGEST_PAUSE: Duration = INBOX_RETRY_AFTER;
/// Once this part of the messages has left an inbox, it is counted again without a pause. The count then costs no more for
/// each message that has left than a few times what its ack did.
const PART: u64 = 16;

/// What is known of one inbox. The numbers may be too high, as acks are not subtracted, but not too low.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub(super) total: InboxLoad,
    /// `None` when the inbox was not more than half full.
    pub(super) count: Option<Box<Count>>,
    /// The account's row when the inbox was counted. If the row differs now, another node has queued mail.
    pub(super) account_bound: AccountBound,
}

/// The last count of an inbox.
#[derive(Debug)]
pub(super) struct Count {
    /// By sending account, with what was admitted since.
    senders: HashMap<UserId, InboxLoad>,
    at: Instant,
    /// The inbox is not counted again within this time because of refused messages alone.
    pause: Duration,
    /// Messages that this node has seen leave since then.
    left: u64,
}

/// Why an inbox should be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Too little is known of it.
    Unknown,
    /// By what is known a message is refused, but mail may have left the inbox since.
    Stale { counted_at: Instant },
}

impl Count {
    /// True if there may be room where there was none.
    fn is_stale(&self, total: InboxLoad, (sees_all, now): (bool, Instant)) -> bool {
        let is_due = now.saturating_duration_since(self.at) >= self.pause;
        let has_much_left = self.left > 0 && self.left.saturating_mul(PART) >= total.messages;
        has_much_left || (is_due && (self.left > 0 || !sees_all))
    }
}

impl Inbox {
    /// An inbox that was counted just now.
    pub(super) fn counted(
        senders: HashMap<UserId, InboxLoad>,
        former: Option<Self>,
        account_bound: AccountBound,
        now: Instant,
    ) -> Self {
        let total = senders.values().fold(InboxLoad::default(), |sum, load| sum.plus(*load));
        let pause = match former {
            Some(Self { total: before, count: Some(former), .. }) => {
                let left = before.messages.saturating_sub(total.messages);
                let is_much = left > 0 && left.saturating_mul(PART) >= before.messages;
                if is_much { FIRST_PAUSE } else { (former.pause * 2).min(LONGEST_PAUSE) }
            }
            _ => FIRST_PAUSE,
        };
        Self { total, count: Some(Box::new(Count { senders, at: now, pause, left: 0 })), account_bound }
    }

    /// What waits from one account, if the inbox was counted.
    pub(super) fn of(&self, sender: UserId) -> InboxLoad {
        self.count.as_ref().and_then(|count| count.senders.get(&sender)).copied().unwrap_or_default()
    }

    /// How many senders are remembered of it.
    pub(super) fn senders(&self) -> usize {
        self.count.as_ref().map_or(0, |count| count.senders.len())
    }

    /// Adds an admitted message. Returns how many senders more are remembered.
    pub(super) fn add(&mut self, one: &Candidate) -> usize {
        self.total = self.total.plus(InboxLoad::one(one.bytes));
        let Some(count) = &mut self.count else { return 0 };
        let before = count.senders.len();
        let of_sender = count.senders.entry(one.sender).or_default();
        *of_sender = of_sender.plus(InboxLoad::one(one.bytes));
        count.senders.len() - before
    }

    /// Notes that so many messages have left.
    pub(super) fn left(&mut self, messages: u64) {
        if let Some(count) = &mut self.count {
            count.left = count.left.saturating_add(messages);
        }
    }

    /// Forgets the senders of an inbox that has room. Returns how many.
    ///
    /// Not at the half, which is where they are needed: an inbox that stays there, because what comes is refused for other
    /// reasons, would be counted for each message.
    pub(super) fn forget_senders(&mut self, bounds: &Bounds) -> usize {
        if bounds.is_over_half(self.total.plus(self.total)) {
            return 0;
        }
        self.count.take().map_or(0, |count| count.senders.len())
    }

    /// Whether the inbox has to be counted before these messages are evaluated, or should be.
    pub(super) fn doubt(
        &self,
        bounds: &Bounds,
        incoming: &[Candidate],
        account_bound: AccountBound,
        when: (bool, Instant),
    ) -> Option<Doubt> {
        let comes = incoming.iter().fold(InboxLoad::default(), |sum, one| sum.plus(InboxLoad::one(one.bytes)));
        if self.account_bound == account_bound && !bounds.is_over_half(self.total.plus(comes)) {
            return None;
        }
        let Some(count) = &self.count else { return Some(Doubt::Unknown) };
        let (mut total, mut added) = (self.total, HashMap::<UserId, InboxLoad>::new());
        let (mut admitted, mut refused) = (false, false);
        for one in incoming {
            let of_sender = self.of(one.sender).plus(added.get(&one.sender).copied().unwrap_or_default());
            if bounds.admits(total, of_sender, one.is_own(), one.bytes).is_ok() {
                admitted = true;
                total = total.plus(InboxLoad::one(one.bytes));
                let of_sender = added.entry(one.sender).or_default();
                *of_sender = of_sender.plus(InboxLoad::one(one.bytes));
            } else {
                refused = true;
            }
        }
        if admitted && self.account_bound != account_bound {
            return Some(Doubt::Unknown);
        }
        (refused && count.is_stale(self.total, when)).then_some(Doubt::Stale { counted_at: count.at })
    }
}
