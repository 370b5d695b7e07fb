//! The Apple Push Notification service, over HTTP/2 with a signed token:
//! <https://developer.apple.com/documentation/usernotifications/sending-notification-requests-to-apns>.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::config::{Config, Secret};
use crate::push::PushError;
use crate::push::providers::{Cause, PushResult, http};

/// Apple wants a token to be used for at least 20 and at most 60 minutes.
const TOKEN_LIFETIME: Duration = Duration::from_mins(45);
const PAYLOAD: &str = r#"{"aps":{"content-available":1},"action":"check"}"#;

/// The Apple Push Notification service.
pub struct Apns {
    client: Client,
    endpoint: String,
    topic: String,
    team: String,
    header: Header,
    key: EncodingKey,
    ttl: Duration,
    clock: Clock,
    token: Mutex<Option<(Secret, Instant)>>,
}

impl Apns {
    /// `None` without a key.
    pub(super) fn open(config: &Config, clock: &Clock) -> Result<Option<Self>, PushError> {
        let apns = &config.apns;
        let (file, id, team, topic) = match (&apns.key_file, &apns.key_id, &apns.team_id, &apns.topic) {
            (Some(file), Some(id), Some(team), Some(topic)) => (file, id, team, topic),
            (None, None, None, None) => return Ok(None),
            _ => return Err(PushError::Apns),
        };
        let wrong = |what: String| PushError::File { option: "--apns-key-file", path: file.clone(), what };
        let pem = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
        let key = EncodingKey::from_ec_pem(&pem).map_err(|_| wrong("it is not a signing key (.p8)".to_owned()))?;
        // Apple speaks nothing but HTTP/2. A ping now and then keeps its connection, or finds it dead.
        let client = http::client(config.web_push.ca_file.as_deref())?
            .http2_prior_knowledge()
            .http2_keep_alive_interval(Duration::from_mins(1))
            .http2_keep_alive_timeout(Duration::from_secs(10));
        Ok(Some(Self {
            client: client.build().map_err(PushError::Client)?,
            endpoint: apns.endpoint.trim_end_matches('/').to_owned(),
            topic: topic.clone(),
            team: team.clone(),
            header: Header { kid: Some(id.clone()), typ: None, ..Header::new(Algorithm::ES256) },
            key,
            ttl: config.fcm.ttl,
            clock: clock.clone(),
            token: Mutex::new(None),
        }))
    }

    /// Wakes the device with this token.
    pub(super) async fn push(&self, token: &str) -> PushResult {
        // It becomes part of a path. Apple's tokens are hexadecimal; another one can't be one of them.
        if !token.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return PushResult::InvalidTarget;
        }
        let Some(bearer) = self.bearer() else {
            return PushResult::Unavailable { cause: Cause::Credentials, retry_after: None };
        };
        let expires_at = (self.clock.wall() + self.ttl).seconds();
        let request = self
            .client
            .post(format!("{}/3/device/{token}", self.endpoint))
            .header(AUTHORIZATION, bearer.expose())
            .header("apns-push-type", "background")
            .header("apns-priority", "5")
            .header("apns-collapse-id", "obscura_check")
            .header("apns-topic", &self.topic)
            .header("apns-expiration", expires_at)
            .header(CONTENT_TYPE, "application/json")
            .body(PAYLOAD);
        let Ok(response) = request.send().await else {
            return PushResult::Unavailable { cause: Cause::NoAnswer, retry_after: None };
        };
        let (status, wait) = (response.status(), http::retry_after(response.headers(), self.clock.wall()));
        if status.is_success() {
            return PushResult::Accepted;
        }
        let body = http::body(response).await;
        if status == StatusCode::FORBIDDEN {
            self.kept().take();
        }
        classify(status, &body, wait)
    }

    fn bearer(&self) -> Option<Secret> {
        let mut kept = self.kept();
        if let Some((token, _)) = kept.as_ref().filter(|(_, until)| *until > Instant::now()) {
            return Some(token.clone());
        }
        let claims = json!({ "iss": self.team, "iat": self.clock.wall().seconds() });
        let token = jsonwebtoken::encode(&self.header, &claims, &self.key).ok()?;
        let token = Secret::new(format!("bearer {token}"));
        *kept = Some((token.clone(), Instant::now() + TOKEN_LIFETIME));
        Some(token)
    }

    /// No code panics while it holds the token.
    fn kept(&self) -> std::sync::MutexGuard<'_, Option<(Secret, Instant)>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Only a 410 ends a token. `BadDeviceToken` doesn't, because it is also what a server is told that was pointed at the
/// wrong one of Apple's two environments, and `DeviceTokenNotForTopic` is what a wrong `--apns-topic` brings.
fn classify(status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> PushResult {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    match (status.as_u16(), answer["reason"].as_str()) {
        (410, Some("Unregistered" | "ExpiredToken")) => PushResult::TokenGone,
        (403, _) => PushResult::Unavailable { cause: Cause::Credentials, retry_after },
        (429, Some("TooManyProviderTokenUpdates")) | (500.., _) => {
            PushResult::Unavailable { cause: Cause::Busy, retry_after }
        }
        _ => PushResult::Refused { status: Some(status.as_u16()), retry_after },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_410_with_its_reason_ends_a_token() {
        let classified = |status: u16, reason: &str| {
            let body = json!({ "reason": reason }).to_string();
            classify(StatusCode::from_u16(status).unwrap(), body.as_bytes(), None)
        };
        assert_eq!(classified(410, "Unregistered"), PushResult::TokenGone);
        for (status, reason) in [
            (400, "BadDeviceToken"),
            (400, "DeviceTokenNotForTopic"),
            (403, "InvalidProviderToken"),
            (404, "BadPath"),
            (404, "Unregistered"),
            (410, ""),
            (503, "Shutdown"),
        ] {
            assert_ne!(classified(status, reason), PushResult::TokenGone, "{status} {reason}");
        }
    }
}
