//! Messages on their way in and on their way out.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Timestamp;
use crate::model::ids::{Address, DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};

/// No sealed message is larger, since a whole send isn't.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// Bytes that the server stores and forwards and never looks into.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed(pub Bytes);

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.0.len())
    }
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The account, as recipients see it.
    pub user: UserId,
    /// The device, as recipients see it.
    pub device: DeviceId,
    /// The device's number.
    pub no: DeviceNo,
}

/// One send: what one request wants delivered. Its shape has been checked; whether it names every device has not.
#[derive(Clone, Debug)]
pub struct SendRequest {
    /// Who sends.
    pub sender: Sender,
    /// A repeat with this key, from this device, gets the first outcome again.
    pub key: IdempotencyKey,
    /// The start of the SHA-256 of the request body; tells a true repeat from another request under an old key.
    pub digest: [u8; 16],
    /// The accounts written to, each at most once, in the order of the request.
    pub recipients: Vec<Recipient>,
}

impl SendRequest {
    /// The accounts written to, each once.
    pub fn accounts(&self) -> impl Iterator<Item = UserId> {
        self.recipients.iter().map(|recipient| recipient.user)
    }

    /// How many bytes of sealed messages this send carries.
    pub fn size(&self) -> usize {
        self.recipients.iter().flat_map(|recipient| &recipient.submissions).map(|(_, sealed)| sealed.0.len()).sum()
    }
}

/// The part of a send that is for one account.
#[derive(Clone, Debug)]
pub struct Recipient {
    /// The account.
    pub user: UserId,
    /// A sealed message for each targeted device, in the order of the request.
    pub submissions: Vec<(DeviceId, Sealed)>,
    /// Set when the account gets too many sends at the moment, with the wait. Nothing is queued for it then.
    pub throttled_for: Option<Duration>,
}

/// Why there was no room for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The inbox has as many messages, or as many bytes, as it may hold.
    Inbox,
    /// The inbox is more than half full, and the sending account has its share of it.
    Share,
    /// The sending account has queued as many bytes as it may in a day.
    Day,
    /// The account that is written to gets too many sends at the moment.
    Target,
}

/// A message that was not queued for lack of room. A repeat of the send under its key queues it when there is room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The account written to.
    pub user: UserId,
    /// Its device.
    pub device: DeviceId,
    /// What was lacking when that was last looked at.
    pub reason: RefusalReason,
}

/// The result of a send. All lists are empty exactly when everything was queued.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Targets that aren't devices of their recipient (any more), in the order of the request. Not queued.
    pub invalid_devices: Vec<DeviceId>,
    /// Recipients for whom nothing was queued, or nothing more by a repeat, because devices of theirs were left out, with
    /// those devices in ascending order of their bytes.
    pub mismatches: Vec<(UserId, Vec<DeviceId>)>,
    /// Devices for which there was no room, in the order of the request.
    pub refused: Vec<Refused>,
}

/// What the store answers to a send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendResult {
    /// What became of it, now or when the key was first used.
    pub outcome: Outcome,
    /// The devices that have new mail.
    pub receivers: Vec<Address>,
    /// Set when the key had been used before. Only messages that had been refused were queued now.
    pub replay: Option<Replay>,
    /// When a repeat may find room for what was refused.
    pub retry_after: Option<Duration>,
}

/// A send whose key had been used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay {
    /// The same request again.
    SameBody,
    /// Another request under the same key. The first outcome stands all the same.
    OtherBody,
}

/// A queued message on its way to its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Its place in the inbox.
    pub position: Position,
    /// Its id.
    pub id: MessageId,
    /// The account that sent it.
    pub sender_user: UserId,
    /// The device that sent it. It may be gone by now.
    pub sender_device: DeviceId,
    /// When it was queued.
    pub received_at: Timestamp,
    /// What it says, sealed.
    pub body: Sealed,
}
