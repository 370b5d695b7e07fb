//! How a device is woken: register its push token or Web Push subscription, forget it, and the key that Web Push needs.

use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Json};
use crate::app::App;
use crate::model::push::{PushTarget, Subscription};

/// Bytes that a push token, or an endpoint, may have.
const MAX_TOKEN_BYTES: usize = 4096;
/// Bytes of an uncompressed point of P-256.
const POINT_BYTES: usize = 65;
/// Bytes of a subscriber's secret.
const AUTH_BYTES: usize = 16;

/// `PUT /v1/push-token`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PushTokenRequest {
    /// Whose token it is: `fcm`, `apns` or `webpush`.
    pub provider: Option<String>,
    /// The push provider's name for this device.
    pub token: Option<String>,
    /// For `webpush`, in place of a token.
    pub subscription: Option<SubscriptionBody>,
}

/// A Web Push subscription, as browsers write it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SubscriptionBody {
    /// The URL that pushes are posted to.
    pub endpoint: String,
    /// What pushes are encrypted with.
    pub keys: SubscriptionKeys,
}

/// The keys of a Web Push subscription, in base64url.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SubscriptionKeys {
    /// The public key.
    pub p256dh: String,
    /// The secret.
    pub auth: String,
}

/// `GET /v1/push/vapid-key`
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VapidKeyBody {
    /// For the `applicationServerKey` of a subscription: a point of P-256 in base64url.
    pub public_key: String,
}

/// Registers how the device is woken; the last one wins.
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<PushTokenRequest>,
) -> Result<StatusCode, ApiError> {
    let target = request.check()?;
    if let PushTarget::WebPush(subscription) = &target
        && !app.push.accepts(subscription)
    {
        return Err(ApiError::bad_request(
            "subscription must have an https endpoint on a public address and a valid key",
        ));
    }
    if !app.store.set_push_target(caller.no, caller.token_expires_at, &target).await? {
        return Err(ApiError::Unauthorized);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Forgets how the device is woken.
pub async fn delete(State(app): State<App>, caller: Caller) -> Result<StatusCode, ApiError> {
    app.store.delete_push_target(caller.no).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The public key that Web Push subscriptions are made with.
pub async fn vapid_key(State(app): State<App>, _: Caller) -> Result<axum::Json<VapidKeyBody>, ApiError> {
    Ok(axum::Json(VapidKeyBody { public_key: app.push.vapid_key().to_owned() }))
}

impl PushTokenRequest {
    fn check(self) -> Result<PushTarget, ApiError> {
        let provider = self.provider.as_deref();
        match (provider, self.token, self.subscription) {
            (Some("fcm") | None, Some(token), None) => Ok(PushTarget::Fcm(checked(&token)?.to_owned())),
            (Some("apns"), Some(token), None) => Ok(PushTarget::Apns(checked(&token)?.to_owned())),
            (Some("webpush") | None, None, Some(subscription)) => Ok(PushTarget::WebPush(subscription.check()?)),
            (Some("webpush"), _, None) => Err(ApiError::Unprocessable("missing field `subscription`".to_owned())),
            (Some("fcm" | "apns") | None, None, _) => Err(ApiError::Unprocessable("missing field `token`".to_owned())),
            (Some("fcm" | "apns" | "webpush") | None, Some(_), Some(_)) => {
                Err(ApiError::bad_request("A device has a token or a subscription, not both"))
            }
            (Some(_), ..) => Err(ApiError::bad_request("provider must be fcm, apns or webpush")),
        }
    }
}

impl SubscriptionBody {
    fn check(self) -> Result<Subscription, ApiError> {
        let endpoint = checked(&self.endpoint)?;
        if !self.endpoint.starts_with("https://") || endpoint.len() != self.endpoint.len() {
            return Err(ApiError::bad_request("endpoint must be an https URL"));
        }
        let endpoint = self.endpoint;
        let p256dh = decoded("p256dh", &self.keys.p256dh, POINT_BYTES)?;
        let auth = decoded("auth", &self.keys.auth, AUTH_BYTES)?;
        Ok(Subscription { endpoint, p256dh, auth })
    }
}

/// The token without the white space around it.
fn checked(token: &str) -> Result<&str, ApiError> {
    let token = token.trim();
    if token.is_empty() {
        return Err(ApiError::bad_request("The push token must not be empty"));
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(ApiError::bad_request("The push token must have at most 4096 bytes"));
    }
    if token.contains('\0') {
        return Err(ApiError::bad_request("The push token must not contain a NUL character"));
    }
    Ok(token)
}

/// So many bytes in base64url, with or without padding.
fn decoded(member: &str, text: &str, length: usize) -> Result<Vec<u8>, ApiError> {
    let bytes = URL_SAFE_NO_PAD.decode(text).or_else(|_| URL_SAFE.decode(text)).ok();
    let bytes = bytes.filter(|bytes| bytes.len() == length);
    bytes.ok_or_else(|| ApiError::bad_request(format!("{member} must be {length} bytes in base64url")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_trimmed_and_then_measured() {
        assert_eq!(checked(" \n token\t ").unwrap(), "token");
        let longest = "x".repeat(MAX_TOKEN_BYTES);
        assert_eq!(checked(&format!("  {longest} ")).unwrap(), longest);
        for bad in ["", " \t\n", "a\0b", &format!("{longest}x"), &"ä".repeat(2049)] {
            assert!(matches!(checked(bad), Err(ApiError::BadRequest(_))));
        }
    }

    #[test]
    fn a_key_has_its_length_with_and_without_padding() {
        let auth = |text: &str| decoded("auth", text, AUTH_BYTES).ok();
        assert_eq!(auth("AAECAwQFBgcICQoLDA0ODw"), Some((0..16).collect()));
        assert_eq!(auth("AAECAwQFBgcICQoLDA0ODw=="), auth("AAECAwQFBgcICQoLDA0ODw"));
        assert!(auth("AAECAwQFBgcICQoLDA0O").is_none() && auth("A+/").is_none() && auth("").is_none());
    }
}
