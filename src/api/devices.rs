//! Devices of an account: link, list, delete.

use std::panic::resume_unwind;

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{debug, warn};

use crate::api::device_keys::{
    DeviceKeys, DeviceKeysBody, OneTimePreKeyBody, PqPreKeyBody, PreKeysBody, SignedPreKeyBody,
};
use crate::api::error::ApiError;
use crate::api::extract::{Caller, Client, Json, PathId};
use crate::api::sessions::{AuthResponse, NewSession};
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::bus::Signal;
use crate::model::ids::{Address, DeviceId, DeviceNo, UserId};
use crate::model::keys::{KeyError, Signature};
use crate::model::link_proof::LinkProof;
use crate::store::{DeviceRow, LinkBody, Linked, NewDevice, NewLink, Removed};

/// `POST /v1/devices`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkDeviceRequest {
    /// The id of an approved link session.
    pub link_session_id: String,
    /// What the owner calls the device.
    pub name: Option<String>,
    /// The account's identity key.
    pub identity_key: String,
    /// The device's installation, as it names it.
    pub registration_id: i32,
    /// The device's signed prekey.
    pub signed_pre_key: SignedPreKeyBody,
    /// Its one-time prekeys.
    pub one_time_pre_keys: Vec<OneTimePreKeyBody>,
    /// Its last-resort Kyber prekey.
    pub pq_last_resort_pre_key: Option<PqPreKeyBody>,
    /// Its one-time Kyber prekeys.
    pub pq_pre_keys: Option<Vec<PqPreKeyBody>>,
    /// The proof that it holds the identity key: see [`LinkProof`]. 64 bytes in base64.
    pub identity_signature: Option<String>,
}

/// `GET /v1/devices`
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceList {
    /// Oldest first.
    pub devices: Vec<Device>,
}

/// A device in the list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Its id.
    pub device_id: String,
    /// What the owner calls it.
    pub name: Option<String>,
    /// Whether it is the account's primary device.
    pub is_primary: bool,
}

/// Makes a device with an approved link session, and logs it in.
pub async fn link(
    State(app): State<App>,
    Client(client): Client,
    Json(request): Json<LinkDeviceRequest>,
) -> Result<(StatusCode, axum::Json<AuthResponse>), ApiError> {
    let hash = OpaqueSecret::hash_of(&request.link_session_id);
    let proof = request.identity_signature.clone();
    let keys = request.into_keys().read(app.config.prekeys.max)?;
    // Before the many signatures, which an invented id must not cost us.
    if !matches!(app.store.link_body(&hash, app.clock.now()).await?, LinkBody::Approved(_)) {
        return Err(link_invalid());
    }
    let keys = keys.check_pq(&app.limits, client).await?;
    let (keys, is_proven) = check_proof(hash, keys, proof).await?;
    if !is_proven && app.config.auth.require_link_proof {
        return Err(proof_missing());
    }
    app.disk.check_growth()?;
    let (now, latest) = (app.clock.now(), app.clock.latest());
    let session = NewSession::begin(&app.tokens, latest);
    let (id, identity) = (DeviceId::random(), keys.identity);
    let device = NewDevice { id, name: keys.name, registration_id: keys.registration_id, prekeys: keys.prekeys };
    match app.store.link_device(&NewLink { hash, identity, is_proven, device, session: session.grant }, now).await? {
        Linked::Device { user, .. } => {
            app.tasks.spawn_tracked(notify_devices(app.clone(), user));
            let answer = session.answer(&app.tokens, &app.tokens.claims(user, id, latest, 0));
            Ok((StatusCode::CREATED, axum::Json(answer)))
        }
        Linked::SessionInvalid => Err(link_invalid()),
        Linked::LimitReached { max } => {
            Err(ApiError::forbidden(format!("Device limit reached. Maximum allowed is {max}.")))
        }
        Linked::IdentityDiffers => Err(ApiError::forbidden("Identity key does not match the account identity")),
        Linked::ProofMissing => Err(proof_missing()),
    }
}

fn link_invalid() -> ApiError {
    ApiError::forbidden("Invalid link session")
}

fn proof_missing() -> ApiError {
    ApiError::forbidden("A proof of the identity key is required")
}

/// Checks the proof, if there is one, off the async threads: it covers all keys. True when there is one.
async fn check_proof(
    link_hash: [u8; 32],
    keys: DeviceKeys,
    proof: Option<String>,
) -> Result<(DeviceKeys, bool), ApiError> {
    let Some(proof) = proof else { return Ok((keys, false)) };
    let signature =
        Signature::from_base64(&proof).map_err(|error| ApiError::bad_request(format!("identitySignature: {error}")))?;
    let checking = spawn_blocking(move || {
        let DeviceKeys { identity, registration_id, prekeys, .. } = &keys;
        let proof = LinkProof { link_hash: &link_hash, identity, registration_id: *registration_id, prekeys };
        let is_signed = proof.is_signed(&signature);
        (keys, is_signed)
    });
    match checking.await.unwrap_or_else(|error| resume_unwind(error.into_panic())) {
        (keys, true) => Ok((keys, true)),
        (_, false) => Err(ApiError::bad_request(KeyError::Signature { member: "identitySignature" }.to_string())),
    }
}

/// The devices of the caller's account.
pub async fn list(State(app): State<App>, caller: Caller) -> Result<axum::Json<DeviceList>, ApiError> {
    let devices = app.store.devices(caller.user).await?;
    Ok(axum::Json(DeviceList { devices: devices.into_iter().map(Device::from).collect() }))
}

/// Removes a linked device of the caller's account.
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    PathId(target): PathId<DeviceId>,
) -> Result<StatusCode, ApiError> {
    if !caller.is_primary && caller.device != target {
        return Err(ApiError::forbidden("Only the primary device can delete other devices"));
    }
    app.tasks.clone().run_to_end(remove(app, caller, target)).await
}

async fn remove(app: App, caller: Caller, target: DeviceId) -> Result<StatusCode, ApiError> {
    let device_auth = app.store.device_auth(target).await?.filter(|device_auth| device_auth.user == caller.user);
    let addresses: Vec<_> = device_auth.iter().map(|found| Address { user: caller.user, device: found.no }).collect();
    let removed = app.store.remove_device(caller.user, target).await;
    if removed.is_err() {
        // It may have happened all the same. A session that is notified reads again, and nothing is lost if it has not.
        dismiss(&app, &addresses).await;
    }
    match removed? {
        Removed::Device(device) => {
            dismiss(&app, &[Address { user: caller.user, device }]).await;
            app.tasks.spawn_tracked(notify_devices(app.clone(), caller.user));
            Ok(StatusCode::NO_CONTENT)
        }
        Removed::Unknown => Err(ApiError::NotFound),
        Removed::Primary => Err(ApiError::forbidden("The primary device cannot be deleted; reset the account instead")),
    }
}

/// Lets the sockets of the account's devices look at the list of its devices, which has changed. If that fails, they find out
/// with their next regular look.
async fn notify_devices(app: App, user: UserId) {
    match app.store.addresses(&[user]).await {
        Ok(devices) => app.bus.notify(&devices, Signal::AuthChanged),
        Err(error) => debug!(%error, "the devices of an account could not be told of a change of their list"),
    }
}

/// Tells the sockets of devices that were just removed, and sees to it that their mail is deleted.
pub async fn dismiss(app: &App, removed: &[Address]) {
    app.bus.notify(removed, Signal::AuthChanged);
    let gone = removed.iter().map(|address| address.device).collect();
    app.tasks.spawn_tracked(clear_inboxes(app.clone(), gone));
}

/// Deletes step by step what did not fit into the transaction that removed the devices. What shutdown leaves expires.
async fn clear_inboxes(app: App, gone: Vec<DeviceNo>) {
    while !app.tasks.is_stopping() {
        match app.store.clear_inboxes(&gone).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return warn!(%error, "mail of removed devices could not be deleted; it will expire"),
        }
    }
}

impl LinkDeviceRequest {
    fn into_keys(self) -> DeviceKeysBody {
        DeviceKeysBody {
            name: self.name,
            identity_key: self.identity_key,
            registration_id: self.registration_id,
            prekeys: PreKeysBody {
                signed: self.signed_pre_key,
                one_time: self.one_time_pre_keys,
                pq_last_resort: self.pq_last_resort_pre_key,
                pq_one_time: self.pq_pre_keys,
            },
        }
    }
}

impl From<DeviceRow> for Device {
    fn from(row: DeviceRow) -> Self {
        Self { device_id: row.id.to_string(), name: row.name, is_primary: row.is_primary }
    }
}
