//! What one socket has sent and not yet seen acknowledged.

use std::collections::HashMap;

use crate::model::ids::{MessageId, Position};

/// As many as a full inbox holds are remembered, within these. A look-up reads the inbox from its beginning, so it should
/// not be needed where inboxes are large.
const FEWEST_REMEMBERED: usize = 2048;
/// About 3 MiB.
const MOST_REMEMBERED: usize = 65_536;

/// Remembers where the messages lie that this socket has sent, so that an ack needs no look-up. It may forget: an id
/// that it doesn't know is looked up in the inbox.
pub(super) struct Inflight {
    positions: HashMap<MessageId, Position>,
    /// More than this are not remembered; the inbox itself is asked for the rest.
    most: usize,
}

impl Inflight {
    /// Nothing yet, for an inbox of up to so many messages.
    pub(super) fn new(max_inbox_size: u32) -> Self {
        let most = (max_inbox_size as usize).clamp(FEWEST_REMEMBERED, MOST_REMEMBERED);
        Self { positions: HashMap::new(), most }
    }

    pub(super) fn sent(&mut self, id: MessageId, position: Position) {
        if self.positions.len() >= self.most {
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
        let mut inflight = Inflight::new(1000);
        let id = MessageId::random();
        inflight.sent(id, Position(3));
        assert_eq!(inflight.take(id), Some(Position(3)));
        assert_eq!(inflight.take(id), None);
    }

    #[test]
    fn a_client_that_never_acks_holds_no_more_than_the_bound() {
        let mut inflight = Inflight::new(u32::MAX);
        (0..2 * MOST_REMEMBERED as i64).for_each(|n| inflight.sent(MessageId::random(), Position(n)));
        assert!(inflight.positions.len() <= MOST_REMEMBERED);
    }

    #[test]
    fn a_whole_inbox_under_way_is_remembered() {
        let mut inflight = Inflight::new(10_000);
        let ids: Vec<MessageId> = (0..10_000).map(|_| MessageId::random()).collect();
        ids.iter().zip(0..).for_each(|(id, n)| inflight.sent(*id, Position(n)));
        assert!(ids.iter().zip(0..).all(|(id, n)| inflight.take(*id) == Some(Position(n))));
    }
}
