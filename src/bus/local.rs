//! The subscribers of this process. A subscriber's state is one byte, so nothing can overflow. While traces are kept there is
//! a slot for a few of them beside it.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::task::AtomicWaker;

use crate::bus::{Signal, Signals};
use crate::model::ids::DeviceNo;
use crate::telemetry::traces::TraceLink;

/// The map is cut into this many parts, each with a lock of its own.
const SHARDS: usize = 16;
/// Traces that a subscriber hears of between two looks. Further ones end without a delivery.
const MAX_TRACE_LINKS: usize = 4;

type Shard = HashMap<DeviceNo, Vec<Arc<Subscriber>>>;

#[derive(Default)]
struct Subscriber {
    signals: AtomicU8,
    waker: AtomicWaker,
    trace_links: Mutex<Vec<TraceLink>>,
}

impl Subscriber {
    fn notify(&self, signals: Signals) {
        self.signals.fetch_or(signals.0, Ordering::AcqRel);
        self.waker.wake();
    }
}

#[derive(Clone)]
pub(super) struct LocalBus {
    shards: Arc<[Mutex<Shard>; SHARDS]>,
    sockets_per_device: usize,
}

impl LocalBus {
    pub(super) fn new(sockets_per_device: usize) -> Self {
        Self { shards: Arc::default(), sockets_per_device }
    }

    pub(super) fn subscribe(&self, device: DeviceNo) -> LocalSubscription {
        let subscriber = Arc::<Subscriber>::default();
        let mut shard = self.shard(device);
        let subscribers = shard.entry(device).or_insert_with(|| Vec::with_capacity(1));
        if subscribers.len() >= self.sockets_per_device {
            subscribers.remove(0).notify(Signal::Superseded.into());
        }
        subscribers.push(subscriber.clone());
        drop(shard);
        LocalSubscription { device, subscriber, bus: self.clone() }
    }

    pub(super) fn notify(&self, device: DeviceNo, signals: Signals) {
        for subscriber in self.shard(device).get(&device).into_iter().flatten() {
            subscriber.notify(signals);
        }
    }

    pub(super) fn send_trace_link(&self, device: DeviceNo, trace_link: TraceLink) {
        for subscriber in self.shard(device).get(&device).into_iter().flatten() {
            let mut trace_links = lock(&subscriber.trace_links);
            if trace_links.len() < MAX_TRACE_LINKS {
                trace_links.push(trace_link);
            }
        }
    }

    /// Every device with a session here.
    pub(super) fn devices(&self) -> Vec<DeviceNo> {
        self.shards.iter().flat_map(|shard| lock(shard).keys().copied().collect::<Vec<_>>()).collect()
    }

    pub(super) fn device_count(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn unsubscribe(&self, device: DeviceNo, subscriber: &Arc<Subscriber>) {
        let mut shard = self.shard(device);
        let Some(subscribers) = shard.get_mut(&device) else { return };
        subscribers.retain(|other| !Arc::ptr_eq(other, subscriber));
        if subscribers.is_empty() {
            shard.remove(&device);
        }
    }

    fn shard(&self, device: DeviceNo) -> MutexGuard<'_, Shard> {
        lock(&self.shards[device.0.unsigned_abs() as usize % SHARDS])
    }
}

/// No code panics while it holds one of these, and each is whole after each statement.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signals to one session of a device. Dropping it ends the subscription.
pub(super) struct LocalSubscription {
    device: DeviceNo,
    subscriber: Arc<Subscriber>,
    bus: LocalBus,
}

impl LocalSubscription {
    pub(super) async fn next(&self) -> Signals {
        poll_fn(|context| {
            self.subscriber.waker.register(context.waker());
            match self.subscriber.signals.swap(0, Ordering::AcqRel) {
                0 => Poll::Pending,
                signals => Poll::Ready(Signals(signals)),
            }
        })
        .await
    }

    pub(super) fn take_trace_links(&self) -> Vec<TraceLink> {
        std::mem::take(&mut lock(&self.subscriber.trace_links))
    }
}

impl Drop for LocalSubscription {
    fn drop(&mut self) {
        self.bus.unsubscribe(self.device, &self.subscriber);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const DEVICE: DeviceNo = DeviceNo(7);

    #[test]
    fn signals_between_two_reads_are_merged_into_one() {
        let bus = LocalBus::new(8);
        let subscription = bus.subscribe(DEVICE);
        bus.notify(DEVICE, Signal::NewMessages.into());
        bus.notify(DEVICE, Signal::NewMessages.into());
        bus.notify(DEVICE, Signal::KeysLow.into());
        let signals = subscription.next().now_or_never().unwrap();
        assert!(
            signals.contains(Signal::NewMessages)
                && signals.contains(Signal::KeysLow)
                && !signals.contains(Signal::AuthChanged)
        );
        assert!(subscription.next().now_or_never().is_none());
    }

    #[test]
    fn a_signal_reaches_every_session_of_the_device_and_no_other() {
        let bus = LocalBus::new(8);
        let (first, second, other) = (bus.subscribe(DEVICE), bus.subscribe(DEVICE), bus.subscribe(DeviceNo(8)));
        bus.notify(DEVICE, Signal::NewMessages.into());
        assert!(first.next().now_or_never().is_some());
        assert!(second.next().now_or_never().is_some());
        assert!(other.next().now_or_never().is_none());
    }

    #[test]
    fn nothing_is_kept_for_a_device_without_sessions() {
        let bus = LocalBus::new(8);
        let (first, second) = (bus.subscribe(DEVICE), bus.subscribe(DEVICE));
        drop(first);
        bus.notify(DEVICE, Signal::NewMessages.into());
        assert!(second.next().now_or_never().is_some());
        drop(second);
        assert_eq!(bus.device_count(), 0);
    }

    #[test]
    fn one_socket_too_many_supersedes_the_oldest() {
        let bus = LocalBus::new(2);
        let sockets = [bus.subscribe(DEVICE), bus.subscribe(DEVICE), bus.subscribe(DEVICE)];
        assert!(sockets[0].next().now_or_never().is_some_and(|signals| signals.contains(Signal::Superseded)));
        assert!(sockets[1].next().now_or_never().is_none());
        bus.notify(DEVICE, Signal::NewMessages.into());
        assert!(sockets[0].next().now_or_never().is_none());
        assert!(sockets[2].next().now_or_never().is_some());
    }

    #[test]
    fn a_session_hears_of_a_few_traces_and_of_each_once() {
        let bus = LocalBus::new(8);
        let subscription = bus.subscribe(DEVICE);
        let trace_link = |number: u8| TraceLink::from_bytes(&[number; TraceLink::BYTES]).unwrap();
        (1..=10).for_each(|number| bus.send_trace_link(DEVICE, trace_link(number)));
        assert_eq!(subscription.take_trace_links(), [1, 2, 3, 4].map(trace_link));
        assert_eq!(subscription.take_trace_links(), []);
    }

    #[tokio::test]
    async fn a_signal_wakes_a_session_that_is_already_waiting() {
        let bus = LocalBus::new(8);
        let subscription = bus.subscribe(DEVICE);
        let mut waiting = Box::pin(subscription.next());
        assert!(futures_util::poll!(&mut waiting).is_pending());
        bus.notify(DEVICE, Signal::NewMessages.into());
        assert!(waiting.await.contains(Signal::NewMessages));
    }
}
