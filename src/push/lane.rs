//! A lane for each provider: how many pushes may be under way, and whether it makes sense to try. One that hangs or
//! refuses us holds up nobody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::model::push::PushTarget;
use crate::push::providers::{Cause, Provider};
use crate::tasks::jittered;
use crate::telemetry::metrics::PushProvider;

/// So many failures one after another, and the provider is left alone for a while.
const FAILURES: u32 = 3;
/// One Web Push service gets this part of the slots.
const SHARE: usize = 4;
/// The longest such while, unless the provider asks for more.
const LONGEST_PAUSE: Duration = Duration::from_mins(15);

/// The lanes of all providers.
pub(super) struct Lanes {
    pub(super) fcm: Arc<Lane>,
    pub(super) apns: Arc<Lane>,
    pub(super) web_push: Arc<Lane>,
}

/// A provider, and the way to it.
pub(super) struct Lane {
    pub(super) name: PushProvider,
    pub(super) provider: Provider,
    slots: Arc<Semaphore>,
    hosts: Arc<Hosts>,
    health: Mutex<Health>,
}

/// How many pushes are under way to each Web Push service. A single one can't take all slots.
struct Hosts {
    under_way: Mutex<HashMap<String, usize>>,
    most: usize,
}

/// Room for one push. Dropping it gives the room back.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    _host: Option<AtHost>,
}

struct AtHost {
    host: String,
    hosts: Arc<Hosts>,
}

#[derive(Default)]
struct Health {
    /// Since the last push that was answered.
    failures: u32,
    /// Pauses one after another.
    pauses: u32,
    until: Option<Instant>,
}

/// Why a push can't start now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// All slots are taken.
    Full,
    /// The provider is left alone for so long.
    Paused(Duration),
}

impl Lanes {
    pub(super) fn new(fcm: Provider, apns: Provider, web_push: Provider, concurrency: usize) -> Self {
        let lane = |name, provider| Arc::new(Lane::new(name, provider, concurrency));
        Self {
            fcm: lane(PushProvider::Fcm, fcm),
            apns: lane(PushProvider::Apns, apns),
            web_push: lane(PushProvider::WebPush, web_push),
        }
    }

    pub(super) fn of(&self, target: &PushTarget) -> &Arc<Lane> {
        match target {
            PushTarget::Fcm(_) => &self.fcm,
            PushTarget::Apns(_) => &self.apns,
            PushTarget::WebPush(_) => &self.web_push,
        }
    }
}

impl Lane {
    fn new(name: PushProvider, provider: Provider, concurrency: usize) -> Self {
        let hosts = Arc::new(Hosts { under_way: Mutex::default(), most: concurrency.div_ceil(SHARE) });
        Self { name, provider, slots: Arc::new(Semaphore::new(concurrency)), hosts, health: Mutex::default() }
    }

    /// Whether somebody is told of the pushes.
    pub(super) fn is_real(&self) -> bool {
        !matches!(self.provider, Provider::Log)
    }

    /// A slot for one push, which is free again when the answer is dropped.
    pub(super) fn enter(&self, target: &PushTarget) -> Result<Slot, Blocked> {
        if let Some(until) = self.health().until {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                return Err(Blocked::Paused(left));
            }
        }
        let permit = self.slots.clone().try_acquire_owned().map_err(|_| Blocked::Full)?;
        let host = match target {
            PushTarget::WebPush(subscription) => Some(self.hosts.enter(&subscription.endpoint).ok_or(Blocked::Full)?),
            PushTarget::Fcm(_) | PushTarget::Apns(_) => None,
        };
        Ok(Slot { _permit: permit, _host: host })
    }

    /// The provider has answered, whatever it said about the one push.
    pub(super) fn is_well(&self) {
        let mut health = self.health();
        if health.pauses > 0 {
            info!(provider = self.name.text(), "the push provider takes pushes again");
        }
        *health = Health::default();
    }

    /// The provider has failed. After some failures it is left alone, ever longer, beginning with `step`.
    pub(super) fn has_failed(&self, cause: Cause, retry_after: Option<Duration>, step: Duration) {
        let now = Instant::now();
        let mut health = self.health();
        if health.until.is_some_and(|until| until > now) {
            // One of those that were under way when the pause began.
            return;
        }
        health.failures += 1;
        if health.failures < FAILURES && retry_after.is_none() {
            return;
        }
        let pause = step.saturating_mul(1 << health.pauses.min(16)).min(LONGEST_PAUSE);
        let pause = jittered(pause).max(retry_after.unwrap_or_default());
        if health.pauses == 0 {
            let waits = pause.as_secs();
            warn!(provider = self.name.text(), %cause, "a push provider takes no pushes; they wait, at first for {waits} s");
        }
        health.pauses += 1;
        health.until = Some(now + pause);
    }

    /// No code panics while it holds the state.
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosts {
    fn enter(self: &Arc<Self>, endpoint: &str) -> Option<AtHost> {
        // `https://host:port`, the path left out.
        let host: String = endpoint.split('/').take(3).collect::<Vec<_>>().join("/");
        let mut under_way = self.under_way();
        let count = under_way.entry(host.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(AtHost { host, hosts: self.clone() })
    }

    /// No code panics while it holds them.
    fn under_way(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AtHost {
    fn drop(&mut self) {
        let mut under_way = self.hosts.under_way();
        if let Some(count) = under_way.get_mut(&self.host) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.host);
            }
        }
    }
}

impl std::fmt::Debug for AtHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AtHost(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::push::Subscription;

    const STEP: Duration = Duration::from_secs(30);

    fn phone() -> PushTarget {
        PushTarget::Fcm(String::new())
    }

    fn browser(endpoint: &str) -> PushTarget {
        PushTarget::WebPush(Subscription { endpoint: endpoint.to_owned(), p256dh: Vec::new(), auth: Vec::new() })
    }

    fn lane() -> Lane {
        Lane::new(PushProvider::Fcm, Provider::Log, 2)
    }

    fn pause(lane: &Lane) -> Duration {
        match lane.enter(&phone()) {
            Err(Blocked::Paused(pause)) => pause,
            entered => panic!("{:?}", entered.map(|_| "a slot")),
        }
    }

    #[tokio::test]
    async fn a_lane_has_so_many_slots() {
        let lane = lane();
        let slots = [lane.enter(&phone()).unwrap(), lane.enter(&phone()).unwrap()];
        assert_eq!(lane.enter(&phone()).unwrap_err(), Blocked::Full);
        drop(slots);
        assert!(lane.enter(&phone()).is_ok());
    }

    #[tokio::test]
    async fn one_web_push_service_gets_no_more_than_its_part() {
        let lane = Lane::new(PushProvider::Fcm, Provider::Log, 8);
        let slots = ["https://a/1", "https://a/2"].map(|endpoint| lane.enter(&browser(endpoint)).unwrap());
        assert_eq!(lane.enter(&browser("https://a/3")).unwrap_err(), Blocked::Full);
        assert!(lane.enter(&browser("https://b/1")).is_ok() && lane.enter(&browser("https://a:8443/1")).is_ok());
        drop(slots);
        assert!(lane.enter(&browser("https://a/3")).is_ok() && lane.hosts.under_way().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_keeps_failing_is_left_alone_ever_longer_up_to_a_limit() {
        let lane = lane();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            while lane.enter(&phone()).is_ok() {
                lane.has_failed(Cause::Busy, None, STEP);
            }
            let pause = pause(&lane);
            pauses.push(pause);
            // Those that were under way change nothing.
            (0..100).for_each(|_| lane.has_failed(Cause::Busy, None, STEP));
            tokio::time::advance(pause).await;
        }
        assert!(pauses[0] <= STEP.mul_f64(1.1) && pauses[1] > pauses[0] && pauses[11] <= LONGEST_PAUSE.mul_f64(1.1));
        lane.is_well();
        lane.has_failed(Cause::Busy, None, STEP);
        assert!(lane.enter(&phone()).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_asks_to_wait_is_left_alone_at_once() {
        let lane = lane();
        lane.has_failed(Cause::Busy, Some(Duration::from_hours(1)), STEP);
        assert_eq!(pause(&lane), Duration::from_hours(1));
    }
}
