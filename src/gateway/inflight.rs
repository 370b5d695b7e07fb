//! What one socket has sent and not yet seen acknowledged.

use std::collections::HashMap;

use crate::model::ids::{MessageId, Position};

/// More than this are not remembered; the inbox itself is asked for the rest.
const REMEMBERED: usize = 2048;

/// Remembers where the messages lie that this socket has sent, so that an ack needs no look-up. It may forget: an id
/// that it doesn't know is looked up in the inbox.
#[derive(Default)]
pub(super) struct Inflight {
    positions: HashMap<MessageId, Position>,
}

impl Inflight {
    pub(super) fn sent(&mut self, id: MessageId, position: Position) {
        if self.positions.len() >= REMEMBERED {
            self.positions.clear();
        }
        self.positions.insert(id, position);
    }

    pub(super) fn take(&mut self, id: MessageId) -> Option<Position> {
        let position = self.positions.remove(&id);
        if self.positions.is_empty() {
            // Gives the memory of a burst back: most sockets are idle most of the time.
            self.positions = HashMap::new();
        }
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_known_once() {
        let mut inflight = Inflight::default();
        let id = MessageId::random();
        inflight.sent(id, Position(3));
        assert_eq!(inflight.take(id), Some(Position(3)));
        assert_eq!(inflight.take(id), None);
    }

    #[test]
    fn a_client_that_never_acks_holds_no_more_than_the_bound() {
        let mut inflight = Inflight::default();
        (0..3 * REMEMBERED as i64).for_each(|n| inflight.sent(MessageId::random(), Position(n)));
        assert!(inflight.positions.len() <= REMEMBERED);
    }
}
