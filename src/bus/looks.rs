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
const SPREAD: Duration = Duration::from_secs(3);
/// A round is made of at most so many steps.
const STEPS: u32 = 100;
/// So many sessions at once are no burden.
const FEW: usize = 16;
/// Rest between two rounds, so that a stream of interruptions doesn't become a stream of reads.
const REST: Duration = Duration::from_secs(1);
/// While signals of other nodes can't arrive, each session looks once in about this time, with jitter, so that several nodes
/// don't look in step.
const WHILE_AWAY: Duration = Duration::from_secs(12);

#[derive(Clone)]
pub(super) struct Looks {
    local: LocalBus,
    wanted: Arc<Notify>,
    /// Whether signals of other nodes can't arrive at the moment.
    is_away: Arc<watch::Sender<bool>>,
    metrics: Metrics,
}

impl Looks {
    /// The wire counts as away until it is connected.
    pub(super) fn new(local: LocalBus, metrics: Metrics) -> Self {
        Self { local, wanted: Arc::default(), is_away: Arc::new(watch::Sender::new(true)), metrics }
    }

    /// Asks for a round. During a round it asks for one more, since some were woken before.
    pub(super) fn everything(&self) {
        self.wanted.notify_one();
    }

    /// While `is_away`, every session looks at its inbox and its standing once in 10 to 14 s.
    pub(super) fn set_away(&self, is_away: bool) {
        self.is_away.send_replace(is_away);
    }

    pub(super) async fn run(self, tasks: Tasks) {
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                () = self.round() => {}
            }
        }
    }

    async fn round(&self) {
        tokio::select! {
            biased;
            () = self.wanted.notified() => {}
            // Dropped in the middle when the wire is back, because then every session looks at everything.
            () = self.regular_round() => return,
        }
        self.metrics.bus_looks.one(());
        let mut devices = self.local.devices();
        devices.shuffle(&mut rand::rng());
        let step = devices.len().div_ceil(STEPS as usize).max(FEW);
        for some in devices.chunks(step) {
            some.iter().for_each(|device| self.local.wake(*device, Signals::EVERYTHING));
            sleep(jittered(SPREAD / STEPS)).await;
        }
        sleep(REST).await;
    }

    /// Waits until the wire is away, and has each session look once.
    async fn regular_round(&self) {
        // It can't fail: the sender is ours.
        let _ = self.is_away.subscribe().wait_for(|is_away| *is_away).await;
        let (begin, period) = (Instant::now(), jittered(WHILE_AWAY));
        // In the same order each time, or a session that was first in one round could be last in the next.
        let mut devices = self.local.devices();
        devices.sort_unstable();
        let step = devices.len().div_ceil(STEPS as usize).max(FEW);
        for (n, some) in (0..).zip(devices.chunks(step)) {
            sleep_until(begin + period * n / STEPS).await;
            some.iter().for_each(|device| self.local.wake(*device, Signals::REGULAR));
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

    fn connected(local: LocalBus) -> Looks {
        let looks = Looks::new(local, Metrics::unread());
        looks.set_away(false);
        looks
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_woken_over_some_seconds_and_each_once() {
        let local = LocalBus::new(8);
        let crowd: Vec<_> = (0..10_000).map(|device| local.subscribe(DeviceNo(device))).collect();
        let (looks, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", looks.clone().run(tasks.clone()));
        let start = Instant::now();
        looks.everything();
        let mut at = Vec::new();
        for sleeper in &crowd {
            assert_eq!(sleeper.next().await, Signals::EVERYTHING);
            at.push(start.elapsed());
        }
        let last = at.iter().max().unwrap();
        assert!((SPREAD.mul_f64(0.8)..SPREAD.mul_f64(1.2)).contains(last), "the last was woken after {last:?}");
        tokio::time::sleep(SPREAD * 3).await;
        assert!(crowd.iter().all(|sleeper| sleeper.next().now_or_never().is_none()));
        tasks.stop();
        tasks.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn few_are_woken_at_once_and_again_when_asked_during_the_round() {
        let local = LocalBus::new(8);
        let sleeper = local.subscribe(DeviceNo(1));
        let (looks, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", looks.clone().run(tasks.clone()));
        let start = Instant::now();
        looks.everything();
        sleeper.next().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        looks.everything();
        looks.everything();
        sleeper.next().await;
        assert!(start.elapsed() >= REST);
        tokio::time::sleep(SPREAD * 3).await;
        assert!(sleeper.next().now_or_never().is_none());
        tasks.stop();
        tasks.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_wire_is_away_each_of_a_crowd_looks_every_ten_to_fifteen_seconds_and_few_at_a_time() {
        const CROWD: i64 = 15_000;
        let local = LocalBus::new(8);
        let crowd: Vec<_> = (0..CROWD).map(|device| local.subscribe(DeviceNo(device))).collect();
        let (looks, tasks) = (connected(local), Tasks::new());
        tasks.spawn("looks", looks.clone().run(tasks.clone()));
        let start = Instant::now();
        looks.set_away(true);
        let mut looked = vec![start; crowd.len()];
        let mut at_once = 0;
        while start.elapsed() < Duration::from_mins(1) {
            tokio::time::advance(Duration::from_millis(20)).await;
            tokio::task::yield_now().await;
            let mut woken = 0;
            for (last, sleeper) in looked.iter_mut().zip(&crowd) {
                let Some(signals) = sleeper.next().now_or_never() else { continue };
                assert_eq!(signals, Signals::REGULAR);
                assert!(last.elapsed() < Duration::from_secs(15), "one looked after {:?}", last.elapsed());
                (*last, woken) = (Instant::now(), woken + 1);
            }
            at_once = at_once.max(woken);
        }
        assert!(looked.iter().all(|last| last.elapsed() < Duration::from_secs(15)));
        assert!(at_once <= 300, "{at_once} looked within 20 ms");
        looks.set_away(false);
        looks.everything();
        for sleeper in &crowd {
            while sleeper.next().await != Signals::EVERYTHING {}
        }
        tokio::time::sleep(WHILE_AWAY * 2).await;
        assert!(crowd.iter().all(|sleeper| sleeper.next().now_or_never().is_none()), "it is over");
        tasks.stop();
        tasks.ended().await;
    }
}
