//! Prekeys: refill, count, fetch bundles.

use axum::extract::State;
use axum::http::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use crate::api::device_keys::{OneTimePreKeyBody, PqPreKeyBody, PreKeysBody, SignedPreKeyBody, check_pq};
use crate::api::error::ApiError;
use crate::api::extract::{Caller, Client, Json, PathId, PathIds};
use crate::app::App;
use crate::bus::Signal;
use crate::model::ids::{DeviceId, UserId};
use crate::model::keys::{OneTimePreKey, PqPreKey, SignedPreKey};
use crate::store::{Bundle, Refilled};

/// `POST /v1/keys`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefillRequest {
    /// Replaces the stored one. Its id has to be above that of the stored one.
    pub signed_pre_key: SignedPreKeyBody,
    /// Added to the stored ones.
    pub one_time_pre_keys: Vec<OneTimePreKeyBody>,
    /// Replaces the stored one, which stays when this is absent.
    pub pq_last_resort_pre_key: Option<PqPreKeyBody>,
    /// Added to the stored ones.
    pub pq_pre_keys: Option<Vec<PqPreKeyBody>>,
    /// True when these take the place of all stored keys.
    pub replace: Option<bool>,
}

/// `GET /v1/keys`
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyCounts {
    /// Elliptic-curve one-time prekeys.
    pub one_time_pre_key_count: u32,
    /// Post-quantum one-time prekeys.
    pub pq_pre_key_count: u32,
}

/// `GET /v1/keys/{userId}`
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BundleList {
    /// Oldest device first.
    pub bundles: Vec<BundleBody>,
}

/// What it takes to start a session with a device. The order of the members is that of protocol level 0.10.0, and the
/// last one is missing for devices without such keys: clients of that level get what they always got.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BundleBody {
    /// The device.
    pub device_id: String,
    /// Its installation, as it named it.
    pub registration_id: i32,
    /// The account's identity key.
    pub identity_key: String,
    /// The device's signed prekey.
    pub signed_pre_key: SignedPreKeyBody,
    /// A prekey that no other asker gets, or `null`.
    pub one_time_pre_key: Option<OneTimePreKeyBody>,
    /// A Kyber prekey.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pq_pre_key: Option<PqPreKeyBody>,
}

/// Stores new keys of the calling device.
pub async fn refill(
    State(app): State<App>,
    caller: Caller,
    Client(client): Client,
    Json(request): Json<RefillRequest>,
) -> Result<StatusCode, ApiError> {
    let identity = app.store.identity(caller.no).await?.ok_or(ApiError::Unauthorized)?;
    let is_replacing = request.replace.unwrap_or_default();
    let keys = request.into_keys().read(&identity, app.config.prekeys.max)?;
    let keys = check_pq(keys, identity, &app.limits, client).await?;
    app.disk.check_growth()?;
    let counted = app.limits.refill(caller.user)?;
    let refilled = match is_replacing {
        true => app.store.replace_keys(caller.no, &keys).await?,
        false => app.store.refill(caller.no, &keys).await?,
    };
    if refilled != Refilled::Stored {
        counted.refund();
    }
    match refilled {
        Refilled::Stored => Ok(StatusCode::NO_CONTENT),
        Refilled::SignedKeyKnown => Err(ApiError::bad_request(
            "signedPreKey must be a new key: this account has had this one, under another keyId, on another device or as a one-time key",
        )),
        Refilled::LastResortKnown => Err(ApiError::bad_request(
            "pqLastResortPreKey must be a new key: it is stored under another keyId, or is or was a one-time key",
        )),
        Refilled::LastResortMissing if is_replacing => {
            Err(ApiError::bad_request("replace needs a pqLastResortPreKey for a device with Kyber keys"))
        }
        Refilled::SignedIdNotRising => {
            Err(ApiError::bad_request("signedPreKey.keyId must be greater than that of the stored signed prekey"))
        }
        Refilled::LastResortMissing => {
            Err(ApiError::bad_request("pqPreKeys needs a pqLastResortPreKey, stored or beside it"))
        }
        Refilled::DeviceGone => Err(ApiError::Unauthorized),
    }
}

/// How many one-time prekeys the calling device has left.
pub async fn counts(State(app): State<App>, caller: Caller) -> Result<axum::Json<KeyCounts>, ApiError> {
    let counts = app.store.prekey_counts(caller.no).await?.ok_or(ApiError::Unauthorized)?;
    Ok(axum::Json(KeyCounts { one_time_pre_key_count: counts.ec, pq_pre_key_count: counts.pq }))
}

/// A bundle for each device of a user.
pub async fn bundles(
    State(app): State<App>,
    caller: Caller,
    method: Method,
    PathId(user): PathId<UserId>,
) -> Result<axum::Json<BundleList>, ApiError> {
    app.limits.bundles(caller.user, user)?;
    let bundles = app.tasks.clone().run_to_end(asked_for(app, method, caller.user, (user, None))).await?;
    Ok(axum::Json(BundleList { bundles }))
}

/// The bundle of one device of a user.
pub async fn bundle(
    State(app): State<App>,
    caller: Caller,
    method: Method,
    PathIds(user, device): PathIds<UserId, DeviceId>,
) -> Result<axum::Json<BundleBody>, ApiError> {
    app.limits.bundles(caller.user, user)?;
    let mut bundles = app.tasks.clone().run_to_end(asked_for(app, method, caller.user, (user, Some(device)))).await?;
    bundles.pop().map(axum::Json).ok_or(ApiError::NotFound)
}

/// A GET hands the bundles out. A HEAD changes nothing, and gets the headers of bundles without one-time prekeys.
async fn asked_for(
    app: App,
    method: Method,
    asker: UserId,
    (user, device): (UserId, Option<DeviceId>),
) -> Result<Vec<BundleBody>, ApiError> {
    if method != Method::HEAD {
        return hand_out(app, asker, user, device).await;
    }
    let threshold = app.config.prekeys.refill_threshold;
    let lasting = app.store.lasting_bundles(user, device, threshold).await?.ok_or(ApiError::NotFound)?;
    Ok(lasting.bundles.into_iter().map(BundleBody::from).collect())
}

/// Takes the bundles out, and tells the devices that have few keys left. When the target's one-time prekeys have been asked
/// for too often, by all accounts together, none is spent.
async fn hand_out(
    app: App,
    asker: UserId,
    user: UserId,
    device: Option<DeviceId>,
) -> Result<Vec<BundleBody>, ApiError> {
    let threshold = app.config.prekeys.refill_threshold;
    let handed_out = match app.limits.may_spend_one_time_prekeys(asker, user) {
        true => app.store.bundles(user, device, threshold).await?,
        false => app.store.lasting_bundles(user, device, threshold).await?,
    };
    let handed_out = handed_out.ok_or(ApiError::NotFound)?;
    app.bus.notify(&handed_out.low, Signal::KeysLow);
    app.push.keys_low(&handed_out.low);
    Ok(handed_out.bundles.into_iter().map(BundleBody::from).collect())
}

impl RefillRequest {
    fn into_keys(self) -> PreKeysBody {
        PreKeysBody {
            signed: self.signed_pre_key,
            one_time: self.one_time_pre_keys,
            pq_last_resort: self.pq_last_resort_pre_key,
            pq_one_time: self.pq_pre_keys,
        }
    }
}

impl From<Bundle> for BundleBody {
    fn from(bundle: Bundle) -> Self {
        Self {
            device_id: bundle.device.to_string(),
            registration_id: bundle.registration_id.0,
            identity_key: bundle.identity.to_base64(),
            signed_pre_key: signed(&bundle.signed),
            one_time_pre_key: bundle.one_time.as_ref().map(one_time),
            pq_pre_key: bundle.pq.as_ref().map(pq),
        }
    }
}

fn signed(key: &SignedPreKey) -> SignedPreKeyBody {
    SignedPreKeyBody { key_id: key.id.0, public_key: key.public_key.to_base64(), signature: key.signature.to_base64() }
}

fn one_time(key: &OneTimePreKey) -> OneTimePreKeyBody {
    OneTimePreKeyBody { key_id: key.id.0, public_key: key.public_key.to_base64() }
}

fn pq(key: &PqPreKey) -> PqPreKeyBody {
    PqPreKeyBody { key_id: key.id.get(), public_key: key.public_key.to_base64(), signature: key.signature.to_base64() }
}
