//! "Look again", told to every session of this node: at everything, after signals may have been lost; and at its inbox,
//! regularly, while signals of other nodes can't arrive. Spread over some seconds, so that the sessions don't all ask the
//! database at once.

use std::sync::Arc;
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::bus::Signals;
use crate::bus::local::LocalBus;
use crate::tasks::{Tasks, jittered};
use crate::telemetry::metrics::Metrics;

/// A round takes about this long, however many sessions there are; with few it is shorter.
const ROUND_TIME: Duration = Duration::from_secs(3);
/// A round is made of at most so many steps.
const MAX_STEPS: u32 = 100;
/// So many sessions at once are no burden.
const MIN_STEP_SIZE: usize = 16;
/// Rest between two rounds, so that a stream of interruptions doesn't become a stream of reads.
const PAUSE_BETWEEN_ROUNDS: Duration = Duration::from_secs(1);
/// While signals of other nodes can't arrive, each session looks once in about this time, with jitter, so that several nodes
/// don't look in step.
const DISCONNECTED_PERIOD: Duration = Duration::from_secs(12);

#[derive(Clone)]
pub(super) struct Resync {
    local: LocalBus,
    requested: Arc<Notify>,
    /// Whether signals of other nodes can't arrive at the moment.
    is_disconnected: Arc<watch::Sender<bool>>,
    metrics: Metrics,
}

impl Resync {
    /// The broker connection counts as away until it is connected.
    pub(super) fn new(local: LocalBus, metrics: Metrics) -> Self {
        Self { local, requested: Arc::default(), is_disconnected: Arc::new(watch::Sender::new(true)), metrics }
    }

    /// Asks for a round. During a round it asks for one more, since some were woken before.
    pub(super) fn request_full(&self) {
        self.requested.notify_one();
    }

    /// While `is_disconnected`, every session looks at its inbox and its device auth once in 10 to 14 s.
    pub(super) fn set_disconnected(&self, is_disconnected: bool) {
        self.is_disconnected.send_replace(is_disconnected);
    }

    pub(super) async fn run(self, tasks: Tasks) {
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                () = self.full_round() => {}
            }
        }
    }

    async fn full_round(&self) {
        tokio::select! {
            biased;
            () = self.requested.notified() => {}
            // Dropped in the middle when the broker connection is back, because then every session looks at everything.
            () = self.periodic_round() => return,
        }
        self.metrics.bus_resyncs.increment(());
        let mut devices = self.local.devices();
        devices.shuffle(&mut rand::rng());
        let step = devices.len().div_ceil(MAX_STEPS as usize).max(MIN_STEP_SIZE);
        for some in devices.chunks(step) {
            some.iter().for_each(|device| self.local.notify(*device, Signals::ALL));
            sleep(jittered(ROUND_TIME / MAX_STEPS)).await;
        }
        sleep(PAUSE_BETWEEN_ROUNDS).await;
    }

    /// Waits until the broker connection is away, and has each session look once.
    async fn periodic_round(&self) {
        // It can't fail: the sender is ours.
        let _ = self.is_disconnected.subscribe().wait_for(|is_disconnected| *is_disconnected).await;
        let (begin, period) = (Instant::now(), jittered(DISCONNECTED_PERIOD));
        // In the same order each time, or a session that was first in one round could be last in the next.
        let mut devices = self.local.devices();
        devices.sort_unstable();
        let step = devices.len().div_ceil(MAX_STEPS as usize).max(MIN_STEP_SIZE);
        for (n, some) in (0..).zip(devices.chunks(step)) {
            sleep_until(begin + period * n / MAX_STEPS).await;
            some.iter().for_each(|device| self.local.notify(*device, Signals::PERIODIC));
        }
        sleep_until(begin + period).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::Instant;

    use super::*;
    use crate::model::ids::DeviceNo;

    fn connected(local: LocalBus) -> Resync {
        let resync = Resync::new(local, Metrics::unexported());
        resync.set_disconnected(false);
        resync
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_woken_over_some_seconds_and_each_once() {
        let local = LocalBus::new(8);
        let crowd: Vec<_> = (0..10_000).map(|device| local.subscribe(DeviceNo(device))).collect();
        let (resync, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", resync.clone().run(tasks.clone()));
        let start = Instant::now();
        resync.request_full();
        let mut at = Vec::new();
        for subscriber in &crowd {
            assert_eq!(subscriber.next().await, Signals::ALL);
            at.push(start.elapsed());
        }
        let last = at.iter().max().unwrap();
        assert!((ROUND_TIME.mul_f64(0.8)..ROUND_TIME.mul_f64(1.2)).contains(last), "the last was woken after {last:?}");
        tokio::time::sleep(ROUND_TIME * 3).await;
        assert!(crowd.iter().all(|subscriber| subscriber.next().now_or_never().is_none()));
        tasks.stop();
        tasks.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn few_are_woken_at_once_and_again_when_asked_during_the_round() {
        let local = LocalBus::new(8);
        let subscriber = local.subscribe(DeviceNo(1));
        let (resync, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", resync.clone().run(tasks.clone()));
        let start = Instant::now();
        resync.request_full();
        subscriber.next().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        resync.request_full();
        resync.request_full();
        subscriber.next().await;
        assert!(start.elapsed() >= PAUSE_BETWEEN_ROUNDS);
        tokio::time::sleep(ROUND_TIME * 3).await;
        assert!(subscriber.next().now_or_never().is_none());
        tasks.stop();
        tasks.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn while_disconnected_each_session_resyncs_every_ten_to_fifteen_seconds_and_few_at_a_time() {
        const CROWD: i64 = 15_000;
        let local = LocalBus::new(8);
        let crowd: Vec<_> = (0..CROWD).map(|device| local.subscribe(DeviceNo(device))).collect();
        let (resync, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", resync.clone().run(tasks.clone()));
        let start = Instant::now();
        resync.set_disconnected(true);
        let mut looked = vec![start; crowd.len()];
        let mut at_once = 0;
        while start.elapsed() < Duration::from_mins(1) {
            tokio::time::advance(Duration::from_millis(20)).await;
            tokio::task::yield_now().await;
            let mut woken = 0;
            for (last, subscriber) in looked.iter_mut().zip(&crowd) {
                let Some(signals) = subscriber.next().now_or_never() else { continue };
                assert_eq!(signals, Signals::PERIODIC);
                assert!(last.elapsed() < Duration::from_secs(15), "one looked after {:?}", last.elapsed());
                (*last, woken) = (Instant::now(), woken + 1);
            }
            at_once = at_once.max(woken);
        }
        assert!(looked.iter().all(|last| last.elapsed() < Duration::from_secs(15)));
        assert!(at_once <= 300, "{at_once} looked within 20 ms");
        resync.set_disconnected(false);
        resync.request_full();
        for subscriber in &crowd {
            while subscriber.next().await != Signals::ALL {}
        }
        tokio::time::sleep(DISCONNECTED_PERIOD * 2).await;
        assert!(crowd.iter().all(|subscriber| subscriber.next().now_or_never().is_none()), "it is over");
        tasks.stop();
        tasks.ended().await;
    }
}
