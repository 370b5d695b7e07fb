//! Signals between two nodes, over a real Valkey.

mod access;
pub mod cluster;
mod crossing;
mod failover;
mod faults;
mod readiness;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use obscura_server::bus::{Bus, Signal, SignalSubscription, Signals};
use obscura_server::config::{Config, Secret};
use obscura_server::model::ids::{Address, DeviceNo, UserId};
use obscura_server::tasks::Tasks;
use obscura_server::telemetry::metrics::Metrics;

use crate::harness::{Valkey, eventually, within};

/// The bus of a node. Dropping it ends its tasks.
struct Node {
    bus: Bus,
    metrics: Metrics,
    tasks: Tasks,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl Node {
    /// With short pauses, whether Valkey is there or not.
    fn open(url: &str) -> Self {
        Self::open_with(url, |_| {})
    }

    fn open_with(url: &str, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::embedded("unused".as_ref()).unwrap();
        config.pubsub.url = Secret::new(url);
        config.pubsub.min_backoff = Duration::from_millis(20);
        config.pubsub.max_backoff = Duration::from_millis(200);
        config.pubsub.stable_after = Duration::from_secs(1);
        change(&mut config);
        let tasks = Tasks::new();
        let metrics = Metrics::unexported();
        let bus = Bus::open(&config.pubsub, &config.notifications, 8, &metrics, &tasks).unwrap();
        Self { bus, metrics, tasks }
    }

    /// Two of them, connected.
    async fn pair(valkey: &Valkey) -> [Self; 2] {
        let nodes = [Self::open(&valkey.url()), Self::open(&valkey.url())];
        for node in &nodes {
            node.connected().await;
        }
        nodes
    }

    /// Waits until everything is quiet: connected, and the look that follows a new connection is over for those who
    /// subscribe from now on.
    async fn connected(&self) {
        self.listen(some_address()).await;
    }

    /// Waits until signals from other nodes can arrive.
    async fn listen(&self, address: Address) -> SignalSubscription {
        let subscription = self.bus.subscribe(address);
        // What a session is told by itself while there is no connection is less.
        everything(&subscription).await;
        subscription
    }

    async fn is_ready(&self) -> bool {
        let check = tokio::time::timeout(Duration::from_secs(1), self.bus.check());
        matches!(check.await, Ok(Ok(())))
    }

    async fn ready(&self) {
        eventually("the node to be connected", async || self.is_ready().await).await;
    }

    async fn not_ready(&self) {
        eventually("the node to notice", async || !self.is_ready().await).await;
    }
}

fn some_address() -> Address {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Address { user: UserId::random(), device: DeviceNo(NEXT.fetch_add(1, Ordering::Relaxed) as i64) }
}

/// Waits for this signal and no other, which only who sent it can have caused.
async fn heard(subscription: &SignalSubscription, signal: Signal) {
    within("a signal", async { while subscription.next().await != Signals::from(signal) {} }).await;
}

/// Waits until the session is told to look at everything, as it is when signals may have been lost.
async fn everything(subscription: &SignalSubscription) {
    let all = [Signal::NewMessages, Signal::KeysLow, Signal::AuthChanged];
    let has_all = |signals: Signals| all.iter().all(|signal| signals.contains(*signal));
    within("a look at everything", async { while !has_all(subscription.next().await) {} }).await;
}

/// An inbox in small: one number, written by one node and read on the other whenever a signal says so.
struct Inbox {
    address: Address,
    written: Arc<AtomicU64>,
    seen: Arc<AtomicU64>,
}

impl Inbox {
    /// With a session that has only just begun.
    fn new(node: &Node) -> (Self, SignalSubscription) {
        let inbox = Self { address: some_address(), written: Arc::default(), seen: Arc::default() };
        let subscription = node.bus.subscribe(inbox.address);
        (inbox, subscription)
    }

    /// With a session whose channel is there.
    async fn read_on(node: &Node) -> Self {
        let (inbox, subscription) = Self::new(node);
        everything(&subscription).await;
        inbox.read(subscription);
        inbox
    }

    /// Reads now, and whenever a signal says so.
    fn read(&self, subscription: SignalSubscription) {
        let (written, seen) = (self.written.clone(), self.seen.clone());
        let look = move || seen.store(written.load(Ordering::SeqCst), Ordering::SeqCst);
        look();
        tokio::spawn(async move {
            loop {
                subscription.next().await;
                look();
            }
        });
    }

    async fn write_on(&self, node: &Node) {
        self.written.fetch_add(1, Ordering::SeqCst);
        node.bus.notify(&[self.address], Signal::NewMessages);
    }

    async fn all_seen(&self) {
        let is_seen = async || self.seen.load(Ordering::SeqCst) == self.written.load(Ordering::SeqCst);
        eventually("everything written to be seen", is_seen).await;
    }
}

/// Names of the channels that somebody subscribes.
async fn channels(valkey: &Valkey) -> Vec<String> {
    let mut channels: Vec<String> =
        redis::cmd("PUBSUB").arg("CHANNELS").query_async(&mut valkey.connection().await).await.unwrap();
    channels.sort();
    channels
}
