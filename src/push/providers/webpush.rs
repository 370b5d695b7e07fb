//! Web Push (RFC 8030), by which browsers are woken, and phones through a UnifiedPush distributor.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use reqwest::{Client, StatusCode};

use crate::clock::Clock;
use crate::config::Config;
use crate::model::push::Subscription;
use crate::push::PushError;
use crate::push::providers::endpoints::Allowed;
use crate::push::providers::names::Names;
use crate::push::providers::vapid::VapidKey;
use crate::push::providers::{PushResult, http, sealing};

/// The same for every push, so its length tells nothing.
const TEXT: &[u8] = br#"{"action":"check"}"#;

/// Web Push.
pub struct WebPush {
    client: Client,
    allowed: Allowed,
    key: VapidKey,
    contact: Option<String>,
    ttl: Duration,
    clock: Clock,
}

impl WebPush {
    pub(super) fn open(config: &Config, clock: &Clock, key: VapidKey) -> Result<Self, PushError> {
        let allowed = Allowed::new(config.web_push.allowed_networks.clone(), Names::of_the_system());
        let client = http::client(config.web_push.ca_file.as_deref())?
            .https_only(true)
            .pool_max_idle_per_host(2)
            .dns_resolver(Arc::new(allowed.clone()));
        Ok(Self {
            client: client.build().map_err(PushError::Client)?,
            allowed,
            key,
            contact: config.web_push.contact.clone(),
            ttl: config.fcm.ttl,
            clock: clock.clone(),
        })
    }

    /// The public half of the key that pushes are signed with.
    pub fn public_key(&self) -> &str {
        self.key.public()
    }

    /// Whether pushes could be sent there. What its name leads to is seen only then.
    pub fn accepts(&self, subscription: &Subscription) -> bool {
        self.allowed.endpoint(&subscription.endpoint).is_some() && sealing::can_seal(subscription)
    }

    /// Wakes the subscriber. Nothing that one endpoint does says anything about others.
    pub(super) async fn push(&self, subscription: &Subscription) -> PushResult {
        let refused = PushResult::Refused { status: None, retry_after: None };
        let Some(endpoint) = self.allowed.endpoint(&subscription.endpoint) else { return refused };
        let Ok(sealed) = sealing::seal(TEXT, subscription) else { return refused };
        let contact = self.contact.as_deref();
        let Some(authorization) = self.key.authorization(&endpoint.origin, contact, self.clock.wall()) else {
            return refused;
        };
        let request = self
            .client
            .post(endpoint.url)
            .header(AUTHORIZATION, authorization)
            .header("ttl", self.ttl.as_secs())
            .header("urgency", "high")
            .header("topic", "obscura_check")
            .header(CONTENT_ENCODING, "aes128gcm")
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(sealed);
        // The body of the answer is never read.
        let Ok(response) = request.send().await else { return refused };
        let retry_after = http::retry_after(response.headers(), self.clock.wall());
        match response.status() {
            status if status.is_success() => PushResult::Accepted,
            // What a push service says of a subscription that has ended. The URL belongs to one device alone.
            StatusCode::GONE => PushResult::TokenGone,
            // The same, or a proxy that doesn't find the service.
            StatusCode::NOT_FOUND => PushResult::Missing,
            status => PushResult::Refused { status: Some(status.as_u16()), retry_after },
        }
    }
}
