//! The protobuf types of the contract, and their conversion from and to the model.

use std::collections::HashSet;

use bytes::Bytes;
use prost::Message as _;
use prost::encoding::{self, DecodeContext, WireType};

use crate::clock::Timestamp;
use crate::model::ids::{DeviceId, IdempotencyKey, MessageId, UserId};
use crate::model::message::{Envelope, Outcome, Recipient, RefusalReason, Sealed, SendRequest, Sender};

mod v1 {
    include!(concat!(env!("OUT_DIR"), "/obscura.v1.rs"));
}

pub use v1::web_socket_frame::Payload;
pub use v1::{
    AckMessage, DeviceList, EnvelopeBatch, InboxNotice, PreKeyStatus, SendMessageRequest, SendMessageResponse,
    WebSocketFrame, send_message_request, send_message_response,
};

/// What is wrong with the body of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSend {
    /// Not this protobuf message.
    #[error("The body is not a SendMessageRequest")]
    NotProtobuf,
    /// Too many recipients, or too many submissions in all.
    #[error("Too many recipients or submissions")]
    TooMany,
    /// A structural rule is broken.
    #[error("{0}")]
    Structure(&'static str),
}

/// Reads and checks the body of a send: everything that can be told without looking at the database, in
/// the order of the contract. `limit` bounds the recipients and, separately, all their submissions.
pub fn send_request(
    body: Bytes,
    sender: Sender,
    key: IdempotencyKey,
    digest: [u8; 16],
    limit: usize,
) -> Result<SendRequest, BadSend> {
    // Counted before anything is decoded: two bytes on the wire can make a recipient, which takes far more in memory.
    let recipients = fields(&body, 1).take(limit + 1);
    let submissions = recipients.clone().flat_map(|recipient| fields(recipient, 2)).take(limit + 1);
    if recipients.count() > limit || submissions.count() > limit {
        return Err(BadSend::TooMany);
    }
    let request = SendMessageRequest::decode(body).map_err(|_| BadSend::NotProtobuf)?;
    let (mut users, mut devices) = (HashSet::new(), HashSet::new());
    let mut recipients = Vec::with_capacity(request.recipients.len());
    for recipient in request.recipients {
        let user = UserId::from_bytes(&recipient.user_id).ok_or(BadSend::Structure("A user_id is not 16 bytes"))?;
        if !users.insert(user) {
            return Err(BadSend::Structure("A user_id is named twice"));
        }
        let mut submissions = Vec::with_capacity(recipient.submissions.len());
        for submission in recipient.submissions {
            let device =
                DeviceId::from_bytes(&submission.device_id).ok_or(BadSend::Structure("A device_id is not 16 bytes"))?;
            if device == sender.device {
                return Err(BadSend::Structure("A device cannot send to itself"));
            }
            if !devices.insert(device) {
                return Err(BadSend::Structure("A device_id is named twice"));
            }
            if submission.message.is_empty() {
                return Err(BadSend::Structure("A message is empty"));
            }
            submissions.push((device, Sealed(submission.message)));
        }
        recipients.push(Recipient { user, submissions, throttled_for: None });
    }
    Ok(SendRequest { sender, key, digest, recipients })
}

/// The fields of a message that have this number and a length, as they stand on the wire. Ends where the message stops
/// being well formed.
fn fields(mut message: &[u8], number: u32) -> impl Iterator<Item = &[u8]> + Clone {
    std::iter::from_fn(move || {
        while !message.is_empty() {
            let (tag, wire_type) = encoding::decode_key(&mut message).ok()?;
            if wire_type != WireType::LengthDelimited {
                encoding::skip_field(wire_type, tag, &mut message, DecodeContext::default()).ok()?;
                continue;
            }
            let length = usize::try_from(encoding::decode_varint(&mut message).ok()?).ok()?;
            let field = message.split_off(..length)?;
            if tag == number {
                return Some(field);
            }
        }
        None
    })
}

/// The answer to a send.
pub fn send_response(outcome: &Outcome) -> SendMessageResponse {
    let id = |id: &DeviceId| Bytes::copy_from_slice(id.as_bytes());
    SendMessageResponse {
        invalid_device_ids: outcome.invalid_devices.iter().map(id).collect(),
        device_mismatches: outcome
            .mismatches
            .iter()
            .map(|(user, missing)| send_message_response::DeviceMismatch {
                user_id: Bytes::copy_from_slice(user.as_bytes()),
                missing_device_ids: missing.iter().map(id).collect(),
            })
            .collect(),
        refused_devices: outcome
            .refused
            .iter()
            .map(|refused| send_message_response::RefusedDevice {
                device_id: id(&refused.device),
                reason: match refused.reason {
                    RefusalReason::Inbox => send_message_response::Reason::InboxFull,
                    RefusalReason::Share => send_message_response::Reason::SenderShare,
                    RefusalReason::Day => send_message_response::Reason::SenderDay,
                    RefusalReason::Target => send_message_response::Reason::TooManySends,
                }
                .into(),
            })
            .collect(),
    }
}

/// A gateway frame with these messages.
pub fn envelope_batch(envelopes: Vec<Envelope>) -> Bytes {
    let envelopes = envelopes
        .into_iter()
        .map(|envelope| v1::Envelope {
            id: Bytes::copy_from_slice(envelope.id.as_bytes()),
            sender_user_id: Bytes::copy_from_slice(envelope.sender_user.as_bytes()),
            sender_device_id: Bytes::copy_from_slice(envelope.sender_device.as_bytes()),
            timestamp: envelope.received_at.millis().unsigned_abs(),
            message: envelope.body.0,
        })
        .collect();
    frame(Payload::EnvelopeBatch(EnvelopeBatch { envelopes }))
}

/// A gateway frame that tells how many one-time prekeys are left.
pub fn prekey_status(ec: u32, pq: u32, threshold: u32) -> Bytes {
    let count = |count: u32| i32::try_from(count).unwrap_or(i32::MAX);
    frame(Payload::PreKeyStatus(PreKeyStatus {
        one_time_pre_key_count: count(ec),
        min_threshold: count(threshold),
        pq_pre_key_count: count(pq),
    }))
}

/// A gateway frame that tells how many messages expired or were refused, to be acknowledged by this id.
pub fn inbox_notice(id: MessageId, since: Timestamp, expired: u64, refused: u64) -> Bytes {
    frame(Payload::InboxNotice(InboxNotice {
        id: Bytes::copy_from_slice(id.as_bytes()),
        since: since.millis().unsigned_abs(),
        expired_count: expired,
        refused_count: refused,
    }))
}

/// A gateway frame that says which devices the account has.
pub fn device_list(devices: &[DeviceId]) -> Bytes {
    let device_ids = devices.iter().map(|device| Bytes::copy_from_slice(device.as_bytes())).collect();
    frame(Payload::DeviceList(DeviceList { device_ids }))
}

fn frame(payload: Payload) -> Bytes {
    WebSocketFrame { payload: Some(payload) }.encode_to_vec().into()
}

/// The ids that a frame of a client acknowledges. Anything else that a client may send is passed over: frames that
/// don't decode, other payloads, ids that aren't 16 bytes.
pub fn acknowledged(frame: Bytes) -> Vec<MessageId> {
    match WebSocketFrame::decode(frame) {
        Ok(WebSocketFrame { payload: Some(Payload::Ack(ack)) }) => {
            ack.message_ids.iter().filter_map(|id| MessageId::from_bytes(id)).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::DeviceNo;

    fn read(body: Vec<u8>) -> Result<SendRequest, BadSend> {
        let sender = Sender { user: UserId::random(), device: DeviceId::random(), no: DeviceNo(1) };
        send_request(body.into(), sender, IdempotencyKey::random(), [0; 16], 3)
    }

    fn request(submissions: &[usize]) -> Vec<u8> {
        let id = || Bytes::copy_from_slice(UserId::random().as_bytes());
        let submission = |_| send_message_request::Submission { device_id: id(), message: Bytes::from_static(b"x") };
        let recipients = submissions.iter().map(|count| send_message_request::Recipient {
            user_id: id(),
            submissions: (0..*count).map(submission).collect(),
        });
        SendMessageRequest { recipients: recipients.collect() }.encode_to_vec()
    }

    #[test]
    fn recipients_and_submissions_have_the_same_limit_each() {
        for allowed in [&[][..], &[0, 0, 0], &[3], &[1, 1, 1], &[2, 0, 1]] {
            assert!(read(request(allowed)).is_ok(), "{allowed:?}");
        }
        for excessive in [&[0, 0, 0, 0][..], &[4], &[2, 2], &[0, 0, 0, 3]] {
            assert_eq!(read(request(excessive)).unwrap_err(), BadSend::TooMany, "{excessive:?}");
        }
        assert_eq!(read([0x0a, 0x00].repeat(1 << 20)).unwrap_err(), BadSend::TooMany);
    }

    #[test]
    fn unknown_fields_are_passed_over_and_broken_ones_refused() {
        let mut body = request(&[1]);
        body.extend([0x7a, 2, 1, 2, 0x78, 5, 0x75, 1, 2, 3, 4]); // field 15: bytes, a varint, 32 bits
        assert!(read(body.clone()).is_ok());
        body.push(0x0a);
        assert_eq!(read(body).unwrap_err(), BadSend::NotProtobuf);
    }
}
