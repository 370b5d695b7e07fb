//! Logs refused pushes: one line for each push service and status, with a hint. Single refused pushes don't pause their
//! provider, so without this a wrong setting would leave no trace in the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};

use crate::model::push::PushTarget;

/// The same line is logged again after this time.
const AGAIN: Duration = Duration::from_hours(24);
/// The least time between two lines: clients choose the hosts of Web Push.
const BETWEEN_LINES: Duration = Duration::from_secs(10);
/// Services and statuses that are remembered. Further ones are logged at `debug`.
const MOST: usize = 256;

/// What was logged, and when.
#[derive(Default)]
pub(super) struct Refusals {
    logged: HashMap<(String, u16), Instant>,
    last_line: Option<Instant>,
    /// Whether Web Push services get a contact.
    has_contact: bool,
}

impl Refusals {
    pub(super) fn new(has_contact: bool) -> Self {
        Self { has_contact, ..Self::default() }
    }

    /// A push to `target` was refused with this status. Returns true if that was logged above `debug`.
    pub(super) fn log(&mut self, target: &PushTarget, status: u16) -> bool {
        let now = Instant::now();
        let service = service(target);
        self.logged.retain(|_, at| now.duration_since(*at) < AGAIN);
        let is_known = self.logged.contains_key(&(service.clone(), status));
        let is_too_soon = self.last_line.is_some_and(|last| now.duration_since(last) < BETWEEN_LINES);
        if is_known || is_too_soon || self.logged.len() >= MOST {
            debug!(status, "a push was refused");
            return false;
        }
        let hint = self.hint(target, status);
        warn!(%service, status, hint, "a push service refuses a push; it is tried again");
        self.logged.insert((service, status), now);
        self.last_line = Some(now);
        true
    }

    fn hint(&self, target: &PushTarget, status: u16) -> &'static str {
        match (target, status) {
            (PushTarget::WebPush(_), 401 | 403) if !self.has_contact => {
                "some services, Apple's among them, want to know whom to ask: set --webpush-contact"
            }
            (PushTarget::WebPush(_), 401 | 403) => "it doesn't accept our key, or the contact of --webpush-contact",
            (PushTarget::WebPush(_), 404) => {
                "the subscription has ended, or a proxy doesn't find the service; it is deleted if that lasts for half a day"
            }
            (PushTarget::Apns(_), 400) => {
                "check --apns-topic, and whether --apns-endpoint is the environment that the app was built for"
            }
            (PushTarget::Fcm(_), 400 | 403) => {
                "check whether --fcm-project-id is the project that the app was built for"
            }
            (_, 429) => "it takes no more pushes for this device at the moment",
            _ => "",
        }
    }
}

/// Which service it is, without anything that names a device: the provider, or the host of a Web Push endpoint.
fn service(target: &PushTarget) -> String {
    match target {
        PushTarget::Fcm(_) => "fcm".to_owned(),
        PushTarget::Apns(_) => "apns".to_owned(),
        PushTarget::WebPush(subscription) => host(&subscription.endpoint),
    }
}

fn host(endpoint: &str) -> String {
    let authority = endpoint.split('/').nth(2).unwrap_or_default();
    if authority.starts_with('[') {
        return "an IP address".to_owned();
    }
    let host = authority.split(':').next().unwrap_or_default();
    if host.parse::<IpAddr>().is_ok() { "an IP address".to_owned() } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::push::Subscription;

    fn browser(endpoint: &str) -> PushTarget {
        PushTarget::WebPush(Subscription { endpoint: endpoint.to_owned(), p256dh: Vec::new(), auth: Vec::new() })
    }

    #[tokio::test(start_paused = true)]
    async fn each_service_and_status_is_told_of_once_and_not_too_many_at_once() {
        let mut refusals = Refusals::new(false);
        assert!(refusals.log(&browser("https://push.example/one"), 403));
        tokio::time::advance(BETWEEN_LINES).await;
        assert!(!refusals.log(&browser("https://push.example/other"), 403), "it was said");
        assert!(refusals.log(&browser("https://push.example/one"), 404));
        assert!(!refusals.log(&browser("https://other.example/one"), 404), "too soon");
        tokio::time::advance(BETWEEN_LINES).await;
        assert!(refusals.log(&browser("https://other.example/one"), 404));
        tokio::time::advance(AGAIN).await;
        assert!(refusals.log(&browser("https://push.example/one"), 403));
        for n in 0..2 * MOST {
            tokio::time::advance(BETWEEN_LINES).await;
            refusals.log(&browser(&format!("https://{n}.example/")), 403);
        }
        assert!(refusals.logged.len() <= MOST);
    }

    #[test]
    fn the_host_is_named_and_nothing_else_of_an_endpoint() {
        assert_eq!(host("https://push.example:8443/a/secret?b"), "push.example");
        assert_eq!(host("https://203.0.113.9/a"), "an IP address");
        assert_eq!(host("https://[2001:db8::1]:443/a"), "an IP address");
    }

    #[test]
    fn who_lets_services_know_whom_to_ask_is_not_told_to() {
        let apple = browser("https://web.push.apple.com/x");
        assert!(Refusals::new(false).hint(&apple, 403).contains("set --webpush-contact"));
        assert!(!Refusals::new(true).hint(&apple, 403).contains("set --webpush-contact"));
    }
}
