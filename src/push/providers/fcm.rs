//! Firebase Cloud Messaging, HTTP v1: <https://firebase.google.com/docs/reference/fcm/rest/v1/projects.messages>.

use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::config::{Config, Secret};
use crate::push::PushError;
use crate::push::providers::{Cause, PushResult, http};

const SCOPE: &str = "https://www.googleapis.com/auth/firebase.messaging";
const GRANT: &str = "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=";
/// A token is replaced so long before it expires.
const MARGIN: Duration = Duration::from_mins(5);
/// How long what we sign is good for.
const ASSERTION_SECONDS: i64 = 3600;

/// Firebase Cloud Messaging.
pub struct Fcm {
    client: Client,
    url: String,
    account: Account,
    key: EncodingKey,
    /// What all pushes share but the token.
    message: Value,
    clock: Clock,
    /// Held while a new one is being fetched, so that all who need it wait for the same one; the call is bounded in time.
    token: Mutex<Option<Token>>,
}

/// What of the service account's file is needed.
#[derive(Deserialize)]
struct Account {
    client_email: String,
    private_key: String,
    #[serde(default = "google")]
    token_uri: String,
    project_id: Option<String>,
}

struct Token {
    text: Secret,
    until: Instant,
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: u64,
}

fn google() -> String {
    "https://oauth2.googleapis.com/token".to_owned()
}

impl Fcm {
    /// `None` without credentials.
    pub(super) fn open(config: &Config, clock: &Clock) -> Result<Option<Self>, PushError> {
        let Some(file) = &config.fcm.credentials_file else { return Ok(None) };
        let wrong = |what: String| PushError::File { option: "--fcm-credentials-file", path: file.clone(), what };
        let text = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
        // The library's own sentence is left out, because it might repeat the key.
        let account: Account = serde_json::from_slice(&text)
            .map_err(|_| wrong("it is not the JSON file of a service account".to_owned()))?;
        let key = EncodingKey::from_rsa_pem(account.private_key.as_bytes())
            .map_err(|_| wrong("its private key can't be read".to_owned()))?;
        let project = config.fcm.project_id.clone().or_else(|| account.project_id.clone());
        let project = project.ok_or_else(|| wrong("it names no project; give --fcm-project-id".to_owned()))?;
        let client = http::client(config.web_push.ca_file.as_deref())?.build().map_err(PushError::Client)?;
        let endpoint = config.fcm.endpoint.trim_end_matches('/');
        Ok(Some(Self {
            client,
            url: format!("{endpoint}/v1/projects/{project}/messages:send"),
            account,
            key,
            message: message(config.fcm.ttl),
            clock: clock.clone(),
            token: Mutex::new(None),
        }))
    }

    /// Wakes the device with this token.
    pub(super) async fn push(&self, token: &str) -> PushResult {
        let bearer = match self.bearer().await {
            Ok(bearer) => bearer,
            Err(unavailable) => return unavailable,
        };
        let mut message = self.message.clone();
        message["message"]["token"] = Value::from(token);
        let request = self.client.post(&self.url).header(AUTHORIZATION, bearer.expose()).json(&message);
        let Ok(response) = request.send().await else {
            return PushResult::Unavailable { cause: Cause::NoAnswer, retry_after: None };
        };
        let (status, wait) = (response.status(), http::retry_after(response.headers(), self.clock.wall()));
        if status.is_success() {
            return PushResult::Accepted;
        }
        let pushed = classify(status, &http::body(response).await, wait);
        if status == StatusCode::UNAUTHORIZED {
            self.token.lock().await.take();
        }
        pushed
    }

    /// The access token that the pushes carry. It is kept until shortly before it expires.
    async fn bearer(&self) -> Result<Secret, PushResult> {
        let mut kept = self.token.lock().await;
        if let Some(token) = kept.as_ref().filter(|token| token.until > Instant::now()) {
            return Ok(token.text.clone());
        }
        let granted = self.fetch().await?;
        let lifetime = Duration::from_secs(granted.expires_in);
        let until = Instant::now() + lifetime.saturating_sub(MARGIN).max(lifetime / 2).min(Duration::from_hours(1));
        let text = Secret::new(format!("Bearer {}", granted.access_token));
        *kept = Some(Token { text: text.clone(), until });
        Ok(text)
    }

    async fn fetch(&self) -> Result<Granted, PushResult> {
        let unavailable = |cause, retry_after| PushResult::Unavailable { cause, retry_after };
        let now = self.clock.wall().seconds();
        let claims = json!({
            "iss": self.account.client_email,
            "scope": SCOPE,
            "aud": self.account.token_uri,
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
        });
        let assertion = jsonwebtoken::encode(&Header::new(Algorithm::RS256), &claims, &self.key)
            .map_err(|_| unavailable(Cause::Credentials, None))?;
        let request = self
            .client
            .post(&self.account.token_uri)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            // A JWT has no character that a form would have to escape.
            .body(format!("{GRANT}{assertion}"));
        let response = request.send().await.map_err(|_| unavailable(Cause::NoAnswer, None))?;
        let (status, wait) = (response.status(), http::retry_after(response.headers(), self.clock.wall()));
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(unavailable(Cause::Busy, wait));
        }
        let body = http::body(response).await;
        if !status.is_success() {
            return Err(unavailable(Cause::Credentials, wait));
        }
        serde_json::from_slice(&body).map_err(|_| unavailable(Cause::Busy, wait))
    }
}

/// What the phone sees: that it is time to connect, and nothing else.
fn message(ttl: Duration) -> Value {
    json!({ "message": {
        "token": "",
        "data": { "action": "check" },
        "android": { "collapseKey": "obscura_check", "priority": "HIGH", "ttl": format!("{}s", ttl.as_secs()) },
        "apns": {
            "headers": {
                "apns-push-type": "background",
                "apns-priority": "5",
                "apns-collapse-id": "obscura_check",
            },
            "payload": { "aps": { "content-available": 1 } },
        },
    } })
}

/// Only the two answers that are about the token alone end it: `UNREGISTERED`, and a complaint that names the field
/// `message.token`. Every other refusal may be the fault of our settings.
fn classify(status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> PushResult {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let details = answer["error"]["details"].as_array().map(Vec::as_slice).unwrap_or_default();
    let code = details.iter().find_map(|detail| detail["errorCode"].as_str());
    let blames_the_token = || {
        let fields = details.iter().filter_map(|detail| detail["fieldViolations"].as_array()).flatten();
        fields.into_iter().any(|violation| violation["field"] == "message.token")
    };
    match (status.as_u16(), code) {
        (404, Some("UNREGISTERED")) => PushResult::TokenGone,
        (400, _) if blames_the_token() => PushResult::TokenGone,
        (401 | 403 | 404, None) => PushResult::Unavailable { cause: Cause::Credentials, retry_after },
        (500.., _) => PushResult::Unavailable { cause: Cause::Busy, retry_after },
        // What has a code of FCM's own is about this token, be it the quota of its device or a sender that is not ours.
        (429, None) => PushResult::Unavailable { cause: Cause::Busy, retry_after },
        _ => PushResult::Refused { status: Some(status.as_u16()), retry_after },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(status: u16, body: &Value) -> PushResult {
        classify(StatusCode::from_u16(status).unwrap(), body.to_string().as_bytes(), None)
    }

    fn with_code(code: &str) -> Value {
        json!({"error": {"details": [
            {"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": code}]}})
    }

    #[test]
    fn only_what_is_about_the_token_alone_ends_it() {
        let field = |name: &str| {
            json!({"error": {"details": [{"@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [{"field": name, "description": "no"}]}]}})
        };
        assert_eq!(classified(404, &with_code("UNREGISTERED")), PushResult::TokenGone);
        assert_eq!(classified(400, &field("message.token")), PushResult::TokenGone);
        for (status, body) in [
            (400, field("message.android.ttl")),
            (400, with_code("INVALID_ARGUMENT")),
            (403, with_code("SENDER_ID_MISMATCH")),
            (403, json!({"error": {"status": "PERMISSION_DENIED"}})),
            (404, json!({"error": {"status": "NOT_FOUND"}})),
            (404, json!("no JSON object")),
            (401, with_code("THIRD_PARTY_AUTH_ERROR")),
            (200, with_code("UNREGISTERED")),
            (410, json!({})),
        ] {
            assert_ne!(classified(status, &body), PushResult::TokenGone, "{status} {body}");
        }
    }

    #[test]
    fn a_fault_of_ours_or_theirs_is_told_from_one_of_a_single_device() {
        let down = |cause| PushResult::Unavailable { cause, retry_after: None };
        assert_eq!(classified(403, &json!({})), down(Cause::Credentials));
        assert_eq!(classified(503, &with_code("UNAVAILABLE")), down(Cause::Busy));
        assert_eq!(
            classified(429, &with_code("QUOTA_EXCEEDED")),
            PushResult::Refused { status: Some(429), retry_after: None }
        );
        assert_eq!(
            classified(403, &with_code("SENDER_ID_MISMATCH")),
            PushResult::Refused { status: Some(403), retry_after: None }
        );
    }
}
