//! What travels between nodes: who says it, and which devices should look at what again. No content.
//!
//! One byte of format, 16 of the sending node, then for each device its number (8 bytes, big end first) and a byte of
//! signals. What is said to all nodes has formats of its own and nothing behind the node.
//!
//! While traces are kept, a device's number and the numbers of a trace may go before its signal, as a message of
//! their own: a node that doesn't understand it passes over it, and no signal depends on it.

use crate::bus::Signals;
use crate::model::ids::DeviceNo;
use crate::telemetry::traces::TraceLink;

/// "These devices".
const DEVICES: u8 = 1;
/// "All sessions, read everything again".
const RESYNC_ALL: u8 = 2;
/// "I am here".
const HELLO: u8 = 3;
/// "I have said everything".
const GOODBYE: u8 = 4;
/// "The next signal to this device is a part of this trace".
const TRACE_LINK: u8 = 5;
const NODE_BYTES: usize = 16;
const ENTRY_BYTES: usize = 9;

/// A node's name, random for each start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node([u8; NODE_BYTES]);

impl Node {
    pub(super) fn random() -> Self {
        Self(rand::random())
    }
}

/// Devices of one account, with what each should look at.
pub(super) type Entries = Vec<(DeviceNo, Signals)>;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    Devices(Entries),
    ResyncAll,
    Hello,
    Goodbye,
    TraceLink(DeviceNo, TraceLink),
}

impl Message {
    pub(super) fn devices(sender: Node, entries: &[(DeviceNo, Signals)]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(1 + NODE_BYTES + entries.len() * ENTRY_BYTES);
        bytes.push(DEVICES);
        bytes.extend(sender.0);
        for (device, signals) in entries {
            bytes.extend(device.0.to_be_bytes());
            bytes.push(signals.remote().0);
        }
        bytes
    }

    pub(super) fn trace_link(sender: Node, device: DeviceNo, trace_link: TraceLink) -> Vec<u8> {
        [&[TRACE_LINK][..], &sender.0, &device.0.to_be_bytes(), &trace_link.to_bytes()].concat()
    }

    pub(super) fn resync_all(sender: Node) -> Vec<u8> {
        to_all(RESYNC_ALL, sender)
    }

    pub(super) fn hello(sender: Node) -> Vec<u8> {
        to_all(HELLO, sender)
    }

    pub(super) fn goodbye(sender: Node) -> Vec<u8> {
        to_all(GOODBYE, sender)
    }

    /// The message and its sender, or `None` for what this version doesn't understand.
    pub(super) fn read(bytes: &[u8]) -> Option<(Node, Self)> {
        let (format, rest) = bytes.split_first()?;
        let (sender, rest) = rest.split_first_chunk::<NODE_BYTES>()?;
        let message = match *format {
            DEVICES => Self::Devices(entries(rest)?),
            RESYNC_ALL if rest.is_empty() => Self::ResyncAll,
            HELLO if rest.is_empty() => Self::Hello,
            GOODBYE if rest.is_empty() => Self::Goodbye,
            TRACE_LINK => trace_link(rest)?,
            _ => return None,
        };
        Some((Node(*sender), message))
    }
}

fn to_all(format: u8, sender: Node) -> Vec<u8> {
    [&[format][..], &sender.0].concat()
}

fn entries(bytes: &[u8]) -> Option<Entries> {
    let chunks = bytes.chunks_exact(ENTRY_BYTES);
    if !chunks.remainder().is_empty() {
        return None;
    }
    let entry = |chunk: &[u8]| {
        let (device, signals) = chunk.split_first_chunk::<8>()?;
        Some((DeviceNo(i64::from_be_bytes(*device)), Signals(*signals.first()?).remote()))
    };
    chunks.map(entry).collect()
}

fn trace_link(bytes: &[u8]) -> Option<Message> {
    let (device, trace_link) = bytes.split_first_chunk::<8>()?;
    Some(Message::TraceLink(DeviceNo(i64::from_be_bytes(*device)), TraceLink::from_bytes(trace_link.try_into().ok()?)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::Signal;

    #[test]
    fn a_message_names_its_sender_and_the_signals_of_each_device() {
        let node = Node::random();
        let entries = vec![(DeviceNo(7), Signal::NewMessages.into()), (DeviceNo(i64::MAX), Signals::ALL)];
        let bytes = Message::devices(node, &entries);
        assert_eq!(bytes.len(), 1 + 16 + 2 * 9);
        assert_eq!(Message::read(&bytes), Some((node, Message::Devices(entries))));
        assert_eq!(Message::read(&Message::resync_all(node)), Some((node, Message::ResyncAll)));
        assert_eq!(Message::read(&Message::hello(node)), Some((node, Message::Hello)));
        assert_eq!(Message::read(&Message::goodbye(node)), Some((node, Message::Goodbye)));
    }

    #[test]
    fn a_trace_goes_in_a_message_of_its_own() {
        let node = Node::random();
        let trace_link = TraceLink::from_bytes(&[7; TraceLink::BYTES]).unwrap();
        let bytes = Message::trace_link(node, DeviceNo(7), trace_link);
        assert_eq!(Message::read(&bytes), Some((node, Message::TraceLink(DeviceNo(7), trace_link))));
        assert_eq!(bytes.len(), 1 + 16 + 8 + 24);
        assert!((0..bytes.len()).all(|length| Message::read(&bytes[..length]).is_none()));
        let nothing = [&bytes[..25], &[0; TraceLink::BYTES]].concat();
        assert_eq!(Message::read(&nothing), None);
    }

    #[test]
    fn no_other_node_can_end_a_session_for_being_one_too_many() {
        let node = Node::random();
        let mut bytes = Message::devices(node, &[(DeviceNo(1), Signal::Superseded.into())]);
        *bytes.last_mut().unwrap() = 0xff;
        let Some((_, Message::Devices(entries))) = Message::read(&bytes) else { panic!("a message") };
        assert_eq!(entries, [(DeviceNo(1), Signals::ALL)]);
    }

    #[test]
    fn what_is_cut_or_of_another_format_is_not_understood() {
        let bytes = Message::devices(Node::random(), &[(DeviceNo(7), Signal::NewMessages.into())]);
        assert!(
            (0..bytes.len()).filter(|length| *length != 17).all(|length| Message::read(&bytes[..length]).is_none())
        );
        let mut later = bytes;
        later[0] = 9;
        assert_eq!(Message::read(&later), None);
        assert_eq!(Message::read(&[&Message::resync_all(Node::random())[..], &[0]].concat()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Message::read(&bytes);
        }
    }
}
