//! How much an inbox holds, and whether one more message fits into it.

use crate::model::ids::{DeviceNo, UserId};
use crate::model::message::RefusalReason;
use crate::store::Limits;

/// Messages and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::store) struct InboxLoad {
    pub(in crate::store) messages: u64,
    pub(in crate::store) bytes: u64,
}

impl InboxLoad {
    pub(super) fn plus(self, other: Self) -> Self {
        Self { messages: self.messages.saturating_add(other.messages), bytes: self.bytes.saturating_add(other.bytes) }
    }

    pub(super) fn one(bytes: u64) -> Self {
        Self { messages: 1, bytes }
    }
}

/// The limits of an inbox.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Bounds {
    max: InboxLoad,
    share: InboxLoad,
}

impl Bounds {
    pub(in crate::store) fn of(limits: &Limits) -> Self {
        let bytes = if limits.inbox_max_bytes == 0 { u64::MAX } else { limits.inbox_max_bytes };
        let max = InboxLoad { messages: u64::from(limits.max_inbox_size), bytes };
        let part =
            |whole: u64| whole / 100 * limits.sender_share_percent + whole % 100 * limits.sender_share_percent / 100;
        Self { max, share: InboxLoad { messages: part(max.messages), bytes: part(max.bytes) } }
    }

    /// Messages that an inbox may hold.
    pub(super) fn most_messages(&self) -> u64 {
        self.max.messages
    }

    /// True if an inbox with this load is more than half full. Only then do the shares of senders count.
    pub(in crate::store) fn is_over_half(&self, load: InboxLoad) -> bool {
        load.messages > self.max.messages / 2 || load.bytes > self.max.bytes / 2
    }

    pub(super) fn admits(
        &self,
        load: InboxLoad,
        of_sender: InboxLoad,
        is_own: bool,
        bytes: u64,
    ) -> Result<(), RefusalReason> {
        let exceeds = |load: InboxLoad, max: InboxLoad| {
            load.messages >= max.messages || load.bytes.saturating_add(bytes) > max.bytes
        };
        if exceeds(load, self.max) {
            return Err(RefusalReason::Inbox);
        }
        // A sender of whom nothing waits may queue one message, also one that is larger than its share.
        let counts = !is_own && of_sender.messages > 0 && self.is_over_half(load);
        if counts && exceeds(of_sender, self.share) { Err(RefusalReason::Share) } else { Ok(()) }
    }
}

/// A message that asks for room.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Candidate {
    pub(in crate::store) user: UserId,
    pub(in crate::store) device: DeviceNo,
    pub(in crate::store) sender: UserId,
    pub(in crate::store) bytes: u64,
}

impl Candidate {
    pub(super) fn is_own(&self) -> bool {
        self.user == self.sender
    }
}
