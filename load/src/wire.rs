//! The protobuf contract, and the one message that is built so often that it is built by hand.

use crate::people::Device;

/// What `build.rs` makes of the contract.
mod contract {
    include!(concat!(env!("OUT_DIR"), "/obscura.v1.rs"));
}

pub use contract::web_socket_frame::Payload;
pub use contract::{AckMessage, SendMessageRequest, SendMessageResponse, WebSocketFrame};

/// Bytes at the start of each message that say what it is. See [`Label`].
pub const LABEL: usize = 32;

const USER_ID: u8 = 1 << 3 | 2;
const DEVICE_ID: u8 = 1 << 3 | 2;
const RECIPIENT: u8 = 1 << 3 | 2;
const SUBMISSION: u8 = 2 << 3 | 2;
const MESSAGE: u8 = 2 << 3 | 2;
/// A tag, a length, an id.
const ID_FIELD: usize = 18;

/// Who sent a message, which one it is between these two devices, when it was to be sent, and the attachment that it
/// speaks of (all zeros: none). Sealed messages look random; these do behind their label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Label {
    pub sender: u32,
    pub number: u32,
    /// Microseconds since the beginning of the measurement.
    pub intended: u64,
    pub attachment: [u8; 16],
}

impl Label {
    pub fn bytes(&self) -> [u8; LABEL] {
        let mut bytes = [0; LABEL];
        bytes[..4].copy_from_slice(&self.sender.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.intended.to_be_bytes());
        bytes[16..].copy_from_slice(&self.attachment);
        bytes
    }

    pub fn of(message: &[u8]) -> Option<Self> {
        Some(Self {
            sender: u32::from_be_bytes(*message.first_chunk()?),
            number: u32::from_be_bytes(*message.get(4..)?.first_chunk()?),
            intended: u64::from_be_bytes(*message.get(8..)?.first_chunk()?),
            attachment: *message.get(16..)?.first_chunk()?,
        })
    }
}

/// A message for one device. Messages to devices of one user stand next to each other.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMessage<'a> {
    pub user: &'a [u8; 16],
    pub device: &'a [u8; 16],
    pub label: Label,
}

impl<'a> DeviceMessage<'a> {
    pub fn to(device: &'a Device, label: Label) -> Self {
        Self { user: &device.user, device: &device.id, label }
    }
}

/// How long the body of such a send is.
pub fn request_length(device_messages: &[DeviceMessage<'_>], filling: &[u8]) -> usize {
    let recipients = device_messages.chunk_by(|one, other| one.user == other.user);
    recipients.map(|recipient| field(recipient_length(recipient.len(), filling))).sum()
}

/// Appends a `SendMessageRequest`; every message is its label and then the filling.
pub fn put_request(request: &mut Vec<u8>, device_messages: &[DeviceMessage<'_>], filling: &[u8]) {
    let message = LABEL + filling.len();
    for recipient in device_messages.chunk_by(|one, other| one.user == other.user) {
        put_length(request, RECIPIENT, recipient_length(recipient.len(), filling));
        put_id(request, USER_ID, recipient[0].user);
        for device_message in recipient {
            put_length(request, SUBMISSION, ID_FIELD + field(message));
            put_id(request, DEVICE_ID, device_message.device);
            put_length(request, MESSAGE, message);
            request.extend_from_slice(&device_message.label.bytes());
            request.extend_from_slice(filling);
        }
    }
}

fn recipient_length(devices: usize, filling: &[u8]) -> usize {
    ID_FIELD + devices * field(ID_FIELD + field(LABEL + filling.len()))
}

/// The length of a field with a tag of one byte.
fn field(length: usize) -> usize {
    1 + prost::length_delimiter_len(length) + length
}

fn put_length(bytes: &mut Vec<u8>, tag: u8, length: usize) {
    bytes.push(tag);
    prost::encoding::encode_varint(length as u64, bytes);
}

fn put_id(bytes: &mut Vec<u8>, tag: u8, id: &[u8; 16]) {
    bytes.extend_from_slice(&[tag, 16]);
    bytes.extend_from_slice(id);
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::contract::send_message_request::{Recipient, Submission};
    use super::*;

    #[test]
    fn what_is_built_by_hand_is_what_the_contract_says() {
        let label = |number| Label { sender: 7, number, intended: 1 << 40, attachment: [9; 16] };
        let (one, two) = ([1; 16], [2; 16]);
        let device_messages = [
            DeviceMessage { user: &one, device: &[3; 16], label: label(0) },
            DeviceMessage { user: &one, device: &[4; 16], label: label(1) },
            DeviceMessage { user: &two, device: &[5; 16], label: label(2) },
        ];
        for size in [0, 90, 5000] {
            let filling = vec![0xa5; size];
            let mut bytes = Vec::new();
            put_request(&mut bytes, &device_messages, &filling);
            assert_eq!(bytes.len(), request_length(&device_messages, &filling));
            let message = |number| [&label(number).bytes()[..], &filling].concat();
            let submission =
                |device: u8, number| Submission { device_id: vec![device; 16].into(), message: message(number).into() };
            let recipients = vec![
                Recipient { user_id: vec![1; 16].into(), submissions: vec![submission(3, 0), submission(4, 1)] },
                Recipient { user_id: vec![2; 16].into(), submissions: vec![submission(5, 2)] },
            ];
            assert_eq!(SendMessageRequest::decode(&bytes[..]).unwrap(), SendMessageRequest { recipients });
        }
        assert_eq!(Label::of(&label(5).bytes()), Some(label(5)));
        assert_eq!(Label::of(&[0; 31]), None);
    }
}
