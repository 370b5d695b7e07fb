//! Accounts: register and reset.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;

use crate::api::device_keys::{
    DeviceKeys, DeviceKeysBody, OneTimePreKeyBody, PqPreKeyBody, PreKeysBody, SignedPreKeyBody,
};
use crate::api::devices::dismiss;
use crate::api::error::ApiError;
use crate::api::extract::{Client, Json};
use crate::api::sessions::{AuthResponse, Claim, MAX_PASSWORD_BYTES, NewSession, authenticate};
use crate::app::App;
use crate::model::ids::{DeviceId, UserId};
use crate::store::{NewAccount, NewDevice, Registered};

/// `POST /v1/users` and `POST /v1/users/reset`: an account, and the device that is to be its primary one.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccountRequest {
    /// The account's name: 3 to 50 ASCII letters, digits and underscores. Case doesn't matter.
    pub username: String,
    /// Its password: 12 to 1024 bytes.
    pub password: String,
    /// For a reset: a live refresh token of a device of the account. With it, wrong passwords that others try don't slow
    /// this request.
    pub refresh_token: Option<String>,
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
}

/// Makes an account with its primary device.
pub async fn register(
    State(app): State<App>,
    Client(client): Client,
    Json(request): Json<AccountRequest>,
) -> Result<(StatusCode, axum::Json<AuthResponse>), ApiError> {
    let (username, password, _, keys) = request.into_parts();
    let username = checked_username(&username)?;
    check_password(&password)?;
    let keys = keys.read(app.config.prekeys.max)?;
    // A name that is taken now will be taken after the costly checks, too.
    if app.store.credentials(&username).await?.is_some() {
        return Err(username_taken());
    }
    let keys = keys.check_pq(&app.limits, client).await?;
    app.disk.check_growth()?;
    app.account_limits.sign_up(client)?;
    let password_hash = app.passwords.hash(password, client).await?;
    let now = app.clock.latest();
    let session = NewSession::begin(&app.tokens, now);
    let (user, identity) = (UserId::random(), keys.identity);
    let device = new_device(keys);
    let device_id = device.id;
    let account = NewAccount { user, username, password_hash, identity, device, session: session.grant };
    match app.store.register(&account).await? {
        Registered::UsernameTaken => Err(username_taken()),
        Registered::Account(_) => {
            let answer = session.answer(&app.tokens, &app.tokens.claims(user, device_id, now, 0));
            Ok((StatusCode::CREATED, axum::Json(answer)))
        }
    }
}

/// Starts an account over with a new identity and one new device.
pub async fn reset(
    State(app): State<App>,
    Client(client): Client,
    Json(request): Json<AccountRequest>,
) -> Result<axum::Json<AuthResponse>, ApiError> {
    let (username, password, proof, keys) = request.into_parts();
    let keys = keys.read(app.config.prekeys.max)?;
    let proof = proof.as_deref().map(|token| (token, None));
    let user = authenticate(&app, client, Claim { username: &username, password, proof }).await?;
    let keys = keys.check_pq(&app.limits, client).await?;
    app.tasks
        .clone()
        .run_to_end(async move {
            let now = app.clock.latest();
            let session = NewSession::begin(&app.tokens, now);
            let identity = keys.identity;
            let device = new_device(keys);
            let devices = app.store.addresses(&[user]).await?;
            let reset = app.store.reset(user, &identity, &device, &session.grant).await;
            // Also when it failed: it may have happened all the same.
            dismiss(&app, reset.as_ref().map_or(&devices, |reset| &reset.removed)).await;
            reset?;
            Ok(axum::Json(session.answer(&app.tokens, &app.tokens.claims(user, device.id, now, 0))))
        })
        .await
}

impl AccountRequest {
    fn into_parts(self) -> (String, String, Option<String>, DeviceKeysBody) {
        let keys = DeviceKeysBody {
            name: self.name,
            identity_key: self.identity_key,
            registration_id: self.registration_id,
            prekeys: PreKeysBody {
                signed: self.signed_pre_key,
                one_time: self.one_time_pre_keys,
                pq_last_resort: self.pq_last_resort_pre_key,
                pq_one_time: self.pq_pre_keys,
            },
        };
        (self.username, self.password, self.refresh_token, keys)
    }
}

fn new_device(keys: DeviceKeys) -> NewDevice {
    NewDevice { id: DeviceId::random(), name: keys.name, registration_id: keys.registration_id, prekeys: keys.prekeys }
}

/// The name in lower case, if it may be one.
fn checked_username(username: &str) -> Result<String, ApiError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if (3..=50).contains(&username.len()) && username.chars().all(is_allowed) {
        Ok(username.to_ascii_lowercase())
    } else {
        Err(ApiError::bad_request("Username must be 3 to 50 ASCII letters, digits or underscores"))
    }
}

fn check_password(password: &str) -> Result<(), ApiError> {
    match password.len() {
        ..12 => Err(ApiError::bad_request("Password must be at least 12 characters")),
        12..=MAX_PASSWORD_BYTES => Ok(()),
        _ => Err(ApiError::bad_request("Password must be at most 1024 bytes")),
    }
}

fn username_taken() -> ApiError {
    ApiError::Conflict("Username is already taken".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_username_is_3_to_50_letters_digits_and_underscores_in_lower_case() {
        for (given, stored) in [("Alice_01", "alice_01"), ("___", "___"), ("a1b", "a1b")] {
            assert_eq!(checked_username(given).unwrap(), stored);
        }
        assert_eq!(checked_username(&"X".repeat(50)).unwrap(), "x".repeat(50));
        for bad in ["", " ", "   ", "ab", " abc", "abc ", "a-b", "a.b", "älice", "a\0b", "abc\n", "\u{212a}elvin"] {
            assert!(checked_username(bad).is_err(), "{bad:?}");
        }
        assert!(checked_username(&"x".repeat(51)).is_err());
    }

    #[test]
    fn a_password_has_12_to_1024_bytes() {
        let message = |length| match check_password(&"x".repeat(length)) {
            Err(ApiError::BadRequest(message)) => message.into_owned(),
            _ => String::new(),
        };
        assert!(message(0).contains("at least 12 characters"));
        assert!(message(11).contains("at least 12 characters"));
        assert_eq!(message(12), "");
        assert_eq!(message(1024), "");
        assert!(message(1025).contains("at most 1024 bytes"));
        assert!(check_password("ääääää").is_ok(), "bytes count");
    }
}
