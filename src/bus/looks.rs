//! "Look at everything again", told to every session of this node after signals may have been lost: spread over some
//! seconds, so that they don't all ask the database at once.

use std::sync::Arc;
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::sync::Notify;

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

#[derive(Clone)]
pub(super) struct Looks {
    local: LocalBus,
    wanted: Arc<Notify>,
    metrics: Metrics,
}

impl Looks {
    pub(super) fn new(local: LocalBus, metrics: Metrics) -> Self {
        Self { local, wanted: Arc::default(), metrics }
    }

    /// Asks for a round. During a round it asks for one more, since some were woken before.
    pub(super) fn everything(&self) {
        self.wanted.notify_one();
    }

    pub(super) async fn run(self, tasks: Tasks) {
        loop {
            tokio::select! {
                () = tasks.stopping() => return,
                () = self.round() => {}
            }
        }
    }

    async fn round(&self) {
        self.wanted.notified().await;
        self.metrics.bus_looks.one(());
        let mut devices = self.local.devices();
        devices.shuffle(&mut rand::rng());
        let step = devices.len().div_ceil(STEPS as usize).max(FEW);
        for some in devices.chunks(step) {
            some.iter().for_each(|device| self.local.wake(*device, Signals::EVERYTHING));
            tokio::time::sleep(jittered(SPREAD / STEPS)).await;
        }
        tokio::time::sleep(REST).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::Instant;

    use super::*;
    use crate::model::ids::DeviceNo;

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_woken_over_some_seconds_and_each_once() {
        let local = LocalBus::new(8);
        let crowd: Vec<_> = (0..10_000).map(|device| local.subscribe(DeviceNo(device))).collect();
        let (looks, tasks) = (Looks::new(local, Metrics::unread()), Tasks::new());
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
        let (looks, tasks) = (Looks::new(local, Metrics::unread()), Tasks::new());
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
}
