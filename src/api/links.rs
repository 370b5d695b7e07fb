//! Link sessions: how the new device and the primary one find each other. Open, approve, read.

use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
use crate::api::extract::{Caller, FromPath, Json, PathId, RawBody};
use crate::api::sessions::authenticate;
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::store::{Approved, LinkBody};

/// How long a link session can be used.
const LIFETIME: Duration = Duration::from_mins(10);
/// Bytes that the primary device may leave for the new one.
const MAX_PARCEL_BYTES: usize = 65_536;

/// `POST /v1/link-sessions`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenLinkSessionRequest {
    /// The account's name, in any case.
    pub username: String,
    /// Its password.
    pub password: String,
}

/// A link session that was just opened.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkSession {
    /// The secret that both devices know it by.
    pub id: String,
    /// The account.
    pub user_id: String,
    /// The Unix second in which it expires.
    pub expires_at: i64,
}

/// SHA-256 of the id of a link session, which is all that the store knows of it.
pub struct LinkHash([u8; 32]);

impl FromPath for LinkHash {
    /// Whatever it says: one that was never opened is unknown, and not malformed.
    fn from_segment(segment: &str) -> Option<Self> {
        Some(Self(OpaqueSecret::hash_of(segment)))
    }
}

/// Opens a link session for a device that does not exist yet.
pub async fn open(
    State(app): State<App>,
    Json(request): Json<OpenLinkSessionRequest>,
) -> Result<(StatusCode, axum::Json<LinkSession>), ApiError> {
    let user = authenticate(&app, &request.username, request.password).await?;
    // Now, and not only when somebody has typed in what links the device.
    app.disk.check_growth()?;
    let id = OpaqueSecret::random();
    let now = app.clock.now();
    let expires_at = now + LIFETIME;
    app.store.open_link(user, &id.hash(), expires_at, now).await?;
    let session = LinkSession { id: id.text().to_owned(), user_id: user.to_string(), expires_at: expires_at.seconds() };
    Ok((StatusCode::CREATED, axum::Json(session)))
}

/// Approves a link session, and leaves a parcel in it for the new device.
pub async fn approve(
    State(app): State<App>,
    caller: Caller,
    PathId(LinkHash(hash)): PathId<LinkHash>,
    RawBody { bytes: parcel, share: _share }: RawBody,
) -> Result<StatusCode, ApiError> {
    if !caller.is_primary {
        return Err(ApiError::forbidden("Primary device required"));
    }
    if parcel.len() > MAX_PARCEL_BYTES {
        return Err(ApiError::TooLarge("Payload too large".into()));
    }
    app.disk.check_growth()?;
    match app.store.approve_link(caller.user, &hash, &parcel, app.clock.now()).await? {
        Approved::Stored => Ok(StatusCode::NO_CONTENT),
        Approved::Unknown => Err(ApiError::NotFound),
        Approved::Already => Err(ApiError::Conflict("Link session already approved".into())),
    }
}

/// What the primary device has left, or 204 as long as it has not.
pub async fn read(State(app): State<App>, PathId(LinkHash(hash)): PathId<LinkHash>) -> Result<Response, ApiError> {
    match app.store.link_body(&hash, app.clock.now()).await? {
        LinkBody::Approved(parcel) => {
            Ok(([(header::CONTENT_TYPE, "application/octet-stream")], parcel).into_response())
        }
        LinkBody::Waiting => Ok(StatusCode::NO_CONTENT.into_response()),
        LinkBody::Unknown => Err(ApiError::NotFound),
    }
}
