//! Which other nodes there are. A node that dies may take signals with it that it had not sent yet, and no other node
//! knows of them: so each says hello now and then, and when one falls silent without a goodbye, the others look at
//! everything. The same when it is back, as after a cluster was torn apart: what it said meanwhile was not heard.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::bus::message::Node;

/// A node that has not said hello for so long is missing. Some greetings may be late or lost.
const MISSING_AFTER: Duration = Duration::from_secs(10);
/// A node that is missing for so long does not come back.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// No deployment has more nodes. Those beyond are not watched.
const MAX_PEERS: usize = 1024;

#[derive(Default)]
pub(super) struct Peers(HashMap<Node, Peer>);

struct Peer {
    heard: Instant,
    is_missing: bool,
}

impl Peers {
    /// A node is there. True when it was missing before.
    pub(super) fn hello(&mut self, node: Node, now: Instant) -> bool {
        if self.0.len() >= MAX_PEERS && !self.0.contains_key(&node) {
            return false;
        }
        let before = self.0.insert(node, Peer { heard: now, is_missing: false });
        before.is_some_and(|peer| peer.is_missing)
    }

    /// A node has said everything it had to say.
    pub(super) fn goodbye(&mut self, node: Node) {
        self.0.remove(&node);
    }

    /// Marks those that have fallen silent as missing. True when there are any since the last call.
    pub(super) fn mark_missing(&mut self, now: Instant) -> bool {
        self.0.retain(|_, peer| now.duration_since(peer.heard) < FORGOTTEN_AFTER);
        let silent = |peer: &&mut Peer| !peer.is_missing && now.duration_since(peer.heard) >= MISSING_AFTER;
        self.0.values_mut().filter(silent).map(|peer| peer.is_missing = true).count() > 0
    }

    /// No node could be heard up to now, so no silence meant anything.
    pub(super) fn reset(&mut self, now: Instant) {
        self.0.values_mut().filter(|peer| !peer.is_missing).for_each(|peer| peer.heard = now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_secs(4);

    #[test]
    fn a_node_that_falls_silent_is_noticed_once_and_once_more_when_it_is_back() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let (node, other) = (Node::random(), Node::random());
        assert!(!peers.hello(node, start));
        assert!(!peers.hello(other, start));
        let found = [1, 2, 3, 4, 5].map(|step| {
            peers.hello(other, start + step * STEP);
            peers.mark_missing(start + step * STEP)
        });
        assert_eq!(found, [false, false, true, false, false]);
        assert!(peers.hello(node, start + 6 * STEP));
        assert!(!peers.hello(node, start + 7 * STEP));
    }

    #[test]
    fn a_goodbye_is_no_loss() {
        let (mut peers, start, node) = (Peers::default(), Instant::now(), Node::random());
        peers.hello(node, start);
        peers.goodbye(node);
        assert!(!peers.mark_missing(start + MISSING_AFTER));
    }

    #[test]
    fn silence_while_the_node_was_disconnected_means_nothing() {
        let (mut peers, start, node) = (Peers::default(), Instant::now(), Node::random());
        peers.hello(node, start);
        peers.reset(start + 3 * STEP);
        assert!(!peers.mark_missing(start + 3 * STEP));
        assert!(peers.mark_missing(start + 6 * STEP));
    }

    #[test]
    fn peers_are_forgotten_and_their_number_is_bounded() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        (0..2 * MAX_PEERS).for_each(|_| assert!(!peers.hello(Node::random(), start)));
        assert_eq!(peers.0.len(), MAX_PEERS);
        peers.mark_missing(start + MISSING_AFTER);
        peers.mark_missing(start + FORGOTTEN_AFTER);
        assert!(peers.0.is_empty());
    }
}
