//! What a message from another node does here. Nothing in it waits, so the connection's own task does it as the messages
//! come in, and nothing needs to be queued in between.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info};

use crate::bus::local::LocalBus;
use crate::bus::message::{Message, Node};
use crate::bus::peers::Peers;
use crate::bus::resync::Resync;
use crate::telemetry::metrics::{Metrics, SignalWay};

#[derive(Clone)]
pub(super) struct RemoteSignalHandler {
    /// The name of this node. Its own messages come back, and are ignored.
    pub(super) node: Node,
    /// Notified when our own greeting comes back, which shows that the connection delivers.
    pub(super) echo: Arc<Notify>,
    pub(super) local: LocalBus,
    pub(super) resync: Resync,
    pub(super) peers: Arc<Mutex<Peers>>,
    pub(super) metrics: Metrics,
}

impl RemoteSignalHandler {
    pub(super) fn handle(&self, message: &[u8]) {
        match Message::read(message) {
            Some((sender, Message::Hello)) if sender == self.node => self.echo.notify_one(),
            Some((sender, _)) if sender == self.node => {}
            Some((_, Message::Devices(entries))) => {
                self.metrics.signals.add(SignalWay::In, entries.len() as u64);
                entries.into_iter().for_each(|(device, signals)| self.local.notify(device, signals));
            }
            Some((_, Message::TraceLink(device, trace_link))) => self.local.send_trace_link(device, trace_link),
            Some((_, Message::ResyncAll)) => self.resync.request_full(),
            Some((sender, Message::Hello)) => {
                if self.peers().hello(sender, Instant::now()) {
                    info!("a node that was missing is back; every session looks at everything");
                    self.resync.request_full();
                }
            }
            Some((sender, Message::Goodbye)) => self.peers().goodbye(sender),
            None => debug!("a message that this version doesn't understand was ignored"),
        }
    }

    /// No code panics while it holds them.
    pub(super) fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
