//! The sleepers of this process. A sleeper's mailbox is one byte, so nothing can overflow. While traces are kept there is
//! a slot for a few of them beside it.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::task::AtomicWaker;

use crate::bus::{Signal, Signals};
use crate::model::ids::DeviceNo;
use crate::telemetry::traces::Trail;

/// The map is cut into this many parts, each with a lock of its own.
const SHARDS: usize = 16;
/// Traces that a sleeper hears of between two looks. Further ones end without a delivery.
const TRAILS: usize = 4;

type Shard = HashMap<DeviceNo, Vec<Arc<Sleeper>>>;

#[derive(Default)]
struct Sleeper {
    signals: AtomicU8,
    waker: AtomicWaker,
    trails: Mutex<Vec<Trail>>,
}

impl Sleeper {
    fn wake(&self, signals: Signals) {
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

    pub(super) fn subscribe(&self, device: DeviceNo) -> Sleeping {
        let sleeper = Arc::<Sleeper>::default();
        let mut shard = self.shard(device);
        let sleepers = shard.entry(device).or_insert_with(|| Vec::with_capacity(1));
        if sleepers.len() >= self.sockets_per_device {
            sleepers.remove(0).wake(Signal::Superseded.into());
        }
        sleepers.push(sleeper.clone());
        drop(shard);
        Sleeping { device, sleeper, bus: self.clone() }
    }

    pub(super) fn wake(&self, device: DeviceNo, signals: Signals) {
        for sleeper in self.shard(device).get(&device).into_iter().flatten() {
            sleeper.wake(signals);
        }
    }

    pub(super) fn lay_trail(&self, device: DeviceNo, trail: Trail) {
        for sleeper in self.shard(device).get(&device).into_iter().flatten() {
            let mut trails = lock(&sleeper.trails);
            if trails.len() < TRAILS {
                trails.push(trail);
            }
        }
    }

    /// Every device with a session here.
    pub(super) fn devices(&self) -> Vec<DeviceNo> {
        self.shards.iter().flat_map(|shard| lock(shard).keys().copied().collect::<Vec<_>>()).collect()
    }

    pub(super) fn listening(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn unsubscribe(&self, device: DeviceNo, sleeper: &Arc<Sleeper>) {
        let mut shard = self.shard(device);
        let Some(sleepers) = shard.get_mut(&device) else { return };
        sleepers.retain(|other| !Arc::ptr_eq(other, sleeper));
        if sleepers.is_empty() {
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
pub(super) struct Sleeping {
    device: DeviceNo,
    sleeper: Arc<Sleeper>,
    bus: LocalBus,
}

impl Sleeping {
    pub(super) async fn next(&self) -> Signals {
        poll_fn(|context| {
            self.sleeper.waker.register(context.waker());
            match self.sleeper.signals.swap(0, Ordering::AcqRel) {
                0 => Poll::Pending,
                signals => Poll::Ready(Signals(signals)),
            }
        })
        .await
    }

    pub(super) fn trails(&self) -> Vec<Trail> {
        std::mem::take(&mut lock(&self.sleeper.trails))
    }
}

impl Drop for Sleeping {
    fn drop(&mut self) {
        self.bus.unsubscribe(self.device, &self.sleeper);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const DEVICE: DeviceNo = DeviceNo(7);

    #[test]
    fn signals_before_the_look_are_merged_into_one_answer() {
        let bus = LocalBus::new(8);
        let wakeups = bus.subscribe(DEVICE);
        bus.wake(DEVICE, Signal::NewMessages.into());
        bus.wake(DEVICE, Signal::NewMessages.into());
        bus.wake(DEVICE, Signal::KeysLow.into());
        let signals = wakeups.next().now_or_never().unwrap();
        assert!(signals.has(Signal::NewMessages) && signals.has(Signal::KeysLow) && !signals.has(Signal::AuthChanged));
        assert!(wakeups.next().now_or_never().is_none());
    }

    #[test]
    fn a_signal_reaches_every_session_of_the_device_and_no_other() {
        let bus = LocalBus::new(8);
        let (first, second, other) = (bus.subscribe(DEVICE), bus.subscribe(DEVICE), bus.subscribe(DeviceNo(8)));
        bus.wake(DEVICE, Signal::NewMessages.into());
        assert!(first.next().now_or_never().is_some());
        assert!(second.next().now_or_never().is_some());
        assert!(other.next().now_or_never().is_none());
    }

    #[test]
    fn nothing_is_kept_for_a_device_without_sessions() {
        let bus = LocalBus::new(8);
        let (first, second) = (bus.subscribe(DEVICE), bus.subscribe(DEVICE));
        drop(first);
        bus.wake(DEVICE, Signal::NewMessages.into());
        assert!(second.next().now_or_never().is_some());
        drop(second);
        assert_eq!(bus.listening(), 0);
    }

    #[test]
    fn one_socket_too_many_supersedes_the_oldest() {
        let bus = LocalBus::new(2);
        let sockets = [bus.subscribe(DEVICE), bus.subscribe(DEVICE), bus.subscribe(DEVICE)];
        assert!(sockets[0].next().now_or_never().is_some_and(|signals| signals.has(Signal::Superseded)));
        assert!(sockets[1].next().now_or_never().is_none());
        bus.wake(DEVICE, Signal::NewMessages.into());
        assert!(sockets[0].next().now_or_never().is_none());
        assert!(sockets[2].next().now_or_never().is_some());
    }

    #[test]
    fn a_session_hears_of_a_few_traces_and_of_each_once() {
        let bus = LocalBus::new(8);
        let wakeups = bus.subscribe(DEVICE);
        let trail = |number: u8| Trail::from_bytes(&[number; Trail::BYTES]).unwrap();
        (1..=10).for_each(|number| bus.lay_trail(DEVICE, trail(number)));
        assert_eq!(wakeups.trails(), [1, 2, 3, 4].map(trail));
        assert_eq!(wakeups.trails(), []);
    }

    #[tokio::test]
    async fn a_signal_wakes_a_session_that_is_already_waiting() {
        let bus = LocalBus::new(8);
        let wakeups = bus.subscribe(DEVICE);
        let mut waiting = Box::pin(wakeups.next());
        assert!(futures_util::poll!(&mut waiting).is_pending());
        bus.wake(DEVICE, Signal::NewMessages.into());
        assert!(waiting.await.has(Signal::NewMessages));
    }
}
