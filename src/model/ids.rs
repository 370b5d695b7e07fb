//! Identifiers. Each has a type of its own, so that two can't be swapped.

use std::fmt;

use sqlx::types::Uuid;
use uuid::ContextV7;

use crate::clock::Timestamp;

macro_rules! uuid_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Displays as hyphenated lower case; its `Debug` form hides the value, so that no log line leaks it.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
        #[sqlx(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// The lowest one, which nothing has.
            pub const NIL: Self = Self(Uuid::nil());

            /// A fresh random id (UUIDv4): it tells nothing about when or where it was made.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Reads the 16 bytes of the wire form; `None` for any other length.
            pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
                Uuid::from_slice(bytes).ok().map(Self)
            }

            /// Reads any usual spelling: hyphenated, 32 digits, braces or `urn:uuid:`, in either case.
            pub fn parse(text: &str) -> Option<Self> {
                Uuid::try_parse(text).ok().map(Self)
            }

            /// The 16 bytes in network order.
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(…)"))
            }
        }
    };
}

uuid_type!(
    /// An account.
    UserId
);
uuid_type!(
    /// A device of an account, as clients know it.
    DeviceId
);
uuid_type!(
    /// A queued message. Clients use it to drop repeats and to acknowledge.
    MessageId
);
uuid_type!(
    /// A stored attachment. A client that knows it (and has an account) may read the attachment.
    AttachmentId
);
uuid_type!(
    /// The client's name for one attempt at something; a repeat with the same key has no second effect.
    IdempotencyKey
);

impl MessageId {
    /// A fresh id (UUIDv7) for a message received at `now`. Ids made with one `sequence` ascend.
    pub fn next(now: Timestamp, sequence: &ContextV7) -> Self {
        let since_epoch = now.since_epoch();
        let time = uuid::Timestamp::from_unix(sequence, since_epoch.as_secs(), since_epoch.subsec_nanos());
        Self(Uuid::new_v7(time))
    }
}

/// A device's number in this database: small, ever-increasing, never used again, never shown to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct DeviceNo(pub i64);

/// A message's place in its inbox. Places become visible to readers in ascending order, so a reader that has seen
/// one place never has to look below it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct Position(pub i64);

/// Where a signal goes: a device, and the account it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The account.
    pub user: UserId,
    /// The device.
    pub device: DeviceNo,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_in_any_usual_spelling_and_written_in_one() {
        let written = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        for spelling in [
            written,
            "67E55044-10B1-426F-9247-BB680E5FE0C8",
            "67e5504410b1426f9247bb680e5fe0c8",
            "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
            "urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8",
        ] {
            assert_eq!(UserId::parse(spelling).map(|id| id.to_string()).as_deref(), Some(written));
        }
        assert_eq!(UserId::parse("67e55044"), None);
        assert_eq!(UserId::from_bytes(&[0; 15]), None);
    }

    #[test]
    fn message_ids_ascend_within_a_millisecond_and_when_the_clock_steps_back() {
        let sequence = ContextV7::new();
        let ids: Vec<_> = [5, 5, 5, 4, 6].map(|now| MessageId::next(Timestamp::from_millis(now), &sequence)).into();
        assert!(ids.is_sorted_by(|one, next| one < next));
    }

    #[test]
    fn the_debug_form_hides_the_id() {
        assert_eq!(format!("{:?}", DeviceId::random()), "DeviceId(…)");
    }
}
