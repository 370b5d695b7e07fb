//! A client for each provider: how many pushes may be under way, and whether it makes sense to try. One that hangs or
//! refuses us holds up no other one.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Url;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::model::push::PushTarget;
use crate::push::providers::{Cause, Provider, names};
use crate::tasks::jittered;
use crate::telemetry::metrics::PushProvider;

/// So many failures one after another, and the provider is left alone for a while.
const FAILURE_THRESHOLD: u32 = 3;
/// One Web Push service gets this part of the slots, …
const HOST_SHARE: usize = 4;
/// … and all slow ones together this part.
const SHARE_OF_SLOW: usize = 2;
/// A service is slow when a push to it took longer than this, …
const SLOW: Duration = Duration::from_secs(2);
/// … for as long as this afterwards.
const SLOW_FOR: Duration = Duration::from_mins(10);
/// Above this many known services, those without a push under way are forgotten, slow or not.
const REMEMBERED: usize = 1000;
/// The longest pause after repeated failures, unless the provider asks for a longer one.
const MAX_PAUSE: Duration = Duration::from_mins(15);

/// The clients of all providers.
pub(super) struct ProviderClients {
    pub(super) fcm: Arc<ProviderClient>,
    pub(super) apns: Arc<ProviderClient>,
    pub(super) web_push: Arc<ProviderClient>,
}

/// A provider, and the way to it.
pub(super) struct ProviderClient {
    pub(super) name: PushProvider,
    pub(super) provider: Provider,
    slots: Arc<Semaphore>,
    services: Arc<Services>,
    breaker: Mutex<CircuitBreaker>,
}

/// How many pushes are under way to each Web Push service, by its domain: one machine can have many ports and names. One
/// service can't take all slots, and neither can several that answer slowly.
struct Services {
    known: Mutex<HashMap<String, Service>>,
    max_per_host: usize,
    most_slow: usize,
}

#[derive(Default)]
struct Service {
    under_way: usize,
    slow_until: Option<Instant>,
}

/// Room for one push. Dropping it gives the room back.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    service: Option<AtService>,
}

struct AtService {
    domain: String,
    services: Arc<Services>,
}

#[derive(Default)]
struct CircuitBreaker {
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

impl ProviderClients {
    pub(super) fn new(fcm: Provider, apns: Provider, web_push: Provider, concurrency: usize) -> Self {
        let client = |name, provider| Arc::new(ProviderClient::new(name, provider, concurrency));
        Self {
            fcm: client(PushProvider::Fcm, fcm),
            apns: client(PushProvider::Apns, apns),
            web_push: client(PushProvider::WebPush, web_push),
        }
    }

    pub(super) fn of(&self, target: &PushTarget) -> &Arc<ProviderClient> {
        match target {
            PushTarget::Fcm(_) => &self.fcm,
            PushTarget::Apns(_) => &self.apns,
            PushTarget::WebPush(_) => &self.web_push,
        }
    }
}

impl ProviderClient {
    fn new(name: PushProvider, provider: Provider, concurrency: usize) -> Self {
        let (max_per_host, most_slow) = (concurrency.div_ceil(HOST_SHARE), concurrency.div_ceil(SHARE_OF_SLOW));
        let services = Arc::new(Services { known: Mutex::default(), max_per_host, most_slow });
        Self { name, provider, slots: Arc::new(Semaphore::new(concurrency)), services, breaker: Mutex::default() }
    }

    /// Whether pushes are sent at all.
    pub(super) fn is_configured(&self) -> bool {
        !matches!(self.provider, Provider::Log)
    }

    /// A slot for one push, which is free again when the answer is dropped.
    pub(super) fn try_acquire(&self, target: &PushTarget) -> Result<Slot, Blocked> {
        if let Some(until) = self.breaker().until {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                return Err(Blocked::Paused(left));
            }
        }
        let permit = self.slots.clone().try_acquire_owned().map_err(|_| Blocked::Full)?;
        let service = match target {
            PushTarget::WebPush(subscription) => {
                Some(self.services.try_acquire(&subscription.endpoint).ok_or(Blocked::Full)?)
            }
            PushTarget::Fcm(_) | PushTarget::Apns(_) => None,
        };
        Ok(Slot { _permit: permit, service })
    }

    /// The provider has answered, whatever it said about the one push.
    pub(super) fn record_success(&self) {
        let mut breaker = self.breaker();
        if breaker.pauses > 0 {
            info!(provider = self.name.text(), "the push provider takes pushes again");
        }
        *breaker = CircuitBreaker::default();
    }

    /// The provider has failed. After some failures it is left alone, ever longer, beginning with `step`.
    pub(super) fn record_failure(&self, cause: Cause, retry_after: Option<Duration>, step: Duration) {
        let now = Instant::now();
        let mut breaker = self.breaker();
        if breaker.until.is_some_and(|until| until > now) {
            // One of those that were under way when the pause began.
            return;
        }
        breaker.failures += 1;
        if breaker.failures < FAILURE_THRESHOLD && retry_after.is_none() {
            return;
        }
        let pause = step.saturating_mul(1 << breaker.pauses.min(16)).min(MAX_PAUSE);
        let pause = jittered(pause).max(retry_after.unwrap_or_default());
        if breaker.pauses == 0 {
            let waits = pause.as_secs();
            warn!(provider = self.name.text(), %cause, "a push provider takes no pushes; they wait, at first for {waits} s");
        }
        breaker.pauses += 1;
        breaker.until = Some(now + pause);
    }

    /// No code panics while it holds the state.
    fn breaker(&self) -> MutexGuard<'_, CircuitBreaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// The push took so long, without the waiting before it.
    pub(super) fn took(&self, time: Duration) {
        let Some(at) = self.service.as_ref().filter(|_| time > SLOW) else { return };
        if let Some(service) = at.services.known().get_mut(&at.domain) {
            service.slow_until = Some(Instant::now() + SLOW_FOR);
        }
    }
}

impl Services {
    fn try_acquire(self: &Arc<Self>, endpoint: &str) -> Option<AtService> {
        let (domain, now) = (service(endpoint), Instant::now());
        let mut known = self.known();
        if known.get(&domain).is_some_and(|service| service.is_slow(now)) {
            let slow: usize = known.values().filter(|each| each.is_slow(now)).map(|each| each.under_way).sum();
            if slow >= self.most_slow {
                return None;
            }
        }
        let service = known.entry(domain.clone()).or_default();
        if service.under_way >= self.max_per_host {
            return None;
        }
        service.under_way += 1;
        Some(AtService { domain, services: self.clone() })
    }

    /// No code panics while it holds them.
    fn known(&self) -> MutexGuard<'_, HashMap<String, Service>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service {
    fn is_slow(&self, now: Instant) -> bool {
        self.slow_until.is_some_and(|until| until > now)
    }
}

impl Drop for AtService {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut known = self.services.known();
        if let Some(service) = known.get_mut(&self.domain) {
            service.under_way -= 1;
            if service.under_way == 0 && !service.is_slow(now) {
                known.remove(&self.domain);
            }
        }
        if known.len() > REMEMBERED {
            known.retain(|_, service| service.under_way > 0);
        }
    }
}

impl std::fmt::Debug for AtService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AtService(…)")
    }
}

/// The domain of an endpoint (the last two labels), or the network of its IP address (/24, /48). Empty if it has neither.
fn service(endpoint: &str) -> String {
    let url = Url::parse(endpoint).ok();
    if let Some(name) = url.as_ref().and_then(Url::domain) {
        return names::domain(name).to_owned();
    }
    let host = url.as_ref().and_then(Url::host_str).unwrap_or_default();
    match host.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => Ipv4Addr::from_bits(ip.to_bits() & !0xff).to_string(),
        Ok(IpAddr::V6(ip)) => Ipv6Addr::from_bits(ip.to_bits() & !(u128::MAX >> 48)).to_string(),
        Err(_) => String::new(),
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

    fn client() -> ProviderClient {
        ProviderClient::new(PushProvider::Fcm, Provider::Log, 2)
    }

    fn pause(client: &ProviderClient) -> Duration {
        match client.try_acquire(&phone()) {
            Err(Blocked::Paused(pause)) => pause,
            entered => panic!("{:?}", entered.map(|_| "a slot")),
        }
    }

    #[tokio::test]
    async fn a_provider_client_has_a_fixed_number_of_slots() {
        let client = client();
        let slots = [client.try_acquire(&phone()).unwrap(), client.try_acquire(&phone()).unwrap()];
        assert_eq!(client.try_acquire(&phone()).unwrap_err(), Blocked::Full);
        drop(slots);
        assert!(client.try_acquire(&phone()).is_ok());
    }

    #[tokio::test]
    async fn one_web_push_service_gets_no_more_than_its_part() {
        let client = ProviderClient::new(PushProvider::Fcm, Provider::Log, 8);
        let slots =
            ["https://one.a.example/1", "https://a.example:8443/2"].map(|to| client.try_acquire(&browser(to)).unwrap());
        for endpoint in ["https://a.example/3", "https://a.example:8444/3", "https://two.a.example/3"] {
            assert_eq!(client.try_acquire(&browser(endpoint)).unwrap_err(), Blocked::Full, "{endpoint}");
        }
        assert!(client.try_acquire(&browser("https://b.example/1")).is_ok());
        assert!(
            client.try_acquire(&browser("https://192.0.2.1/1")).is_ok()
                && client.try_acquire(&browser("https://[::1]/1")).is_ok()
        );
        drop(slots);
        for network in ["https://192.0.2.", "https://[2001:db8:0:"] {
            let host = |n: u32| format!("{network}{n}{}/1", if network.contains('[') { "::1]" } else { "" });
            let _slots = [1, 2].map(|n| client.try_acquire(&browser(&host(n))).unwrap());
            assert_eq!(client.try_acquire(&browser(&host(3))).unwrap_err(), Blocked::Full, "{network}");
        }
        assert!(client.try_acquire(&browser("https://a.example/3")).is_ok() && client.services.known().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_web_push_services_together_get_half_of_the_slots() {
        let client = ProviderClient::new(PushProvider::WebPush, Provider::Log, 8);
        let all = || (0..16).filter_map(|n| client.try_acquire(&browser(&format!("https://{}.example/", n % 8))).ok());
        let slots: Vec<_> = all().collect();
        assert_eq!(slots.len(), 8, "the server doesn't know yet that they are slow");
        slots.iter().for_each(|slot| slot.took(SLOW + Duration::from_secs(1)));
        drop(slots);
        let slots: Vec<_> = all().collect();
        assert_eq!(slots.len(), 4);
        assert!(client.try_acquire(&browser("https://quick.example/")).is_ok());
        drop(slots);
        tokio::time::advance(SLOW_FOR).await;
        assert_eq!(all().collect::<Vec<_>>().len(), 8, "not slow for ever");
        assert!(client.services.known().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_keeps_failing_is_left_alone_ever_longer_up_to_a_limit() {
        let client = client();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            while client.try_acquire(&phone()).is_ok() {
                client.record_failure(Cause::Busy, None, STEP);
            }
            let pause = pause(&client);
            pauses.push(pause);
            // Those that were under way change nothing.
            (0..100).for_each(|_| client.record_failure(Cause::Busy, None, STEP));
            tokio::time::advance(pause).await;
        }
        assert!(pauses[0] <= STEP.mul_f64(1.1) && pauses[1] > pauses[0] && pauses[11] <= MAX_PAUSE.mul_f64(1.1));
        client.record_success();
        client.record_failure(Cause::Busy, None, STEP);
        assert!(client.try_acquire(&phone()).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_asks_to_wait_is_left_alone_at_once() {
        let client = client();
        client.record_failure(Cause::Busy, Some(Duration::from_hours(1)), STEP);
        assert_eq!(pause(&client), Duration::from_hours(1));
    }
}
