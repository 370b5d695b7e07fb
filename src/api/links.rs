//! Link sessions: how the new device and the primary one find each other. Open, approve, read.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Client, FromPath, Json, MAX_BODY_BYTES, PathId, RawBody, announced_bytes};
use crate::api::sessions::{Claim, authenticate};
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::store::{Approval, Approved, LinkBody};

/// How long a link session can be used.
const LIFETIME: Duration = Duration::from_mins(10);

/// `POST /v1/link-sessions`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenLinkSessionRequest {
    /// The account's name, in any case.
    pub username: String,
    /// Its password.
    pub password: String,
    /// A live refresh token of a device of the account. With it, wrong passwords that others try don't slow this request.
    pub refresh_token: Option<String>,
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

/// The path of link sessions whose id is in a header, where no log of a proxy has it.
const WITHOUT_ID: &str = "/v1/link-sessions";

/// Which link session a request is about: the one of its path or, for `/v1/link-sessions`, of the `Obscura-Link-Id` header.
pub struct NamedLink([u8; 32]);

impl FromRequestParts<App> for NamedLink {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if parts.uri.path() != WITHOUT_ID {
            let PathId(LinkHash(hash)) = PathId::from_request_parts(parts, app).await?;
            return Ok(Self(hash));
        }
        let id = parts.headers.get("obscura-link-id").and_then(|id| id.to_str().ok());
        let id = id.ok_or_else(|| ApiError::bad_request("The Obscura-Link-Id header is missing"))?;
        Ok(Self(OpaqueSecret::hash_of(id)))
    }
}

/// The `Obscura-Require-Proof` header: the new device has to prove that it holds the identity key.
pub struct ProofRequired(bool);

impl FromRequestParts<App> for ProofRequired {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        proof_required(&parts.headers).map(Self)
    }
}

fn proof_required(headers: &HeaderMap) -> Result<bool, ApiError> {
    match headers.get("obscura-require-proof").map(HeaderValue::as_bytes) {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        // A misspelled value must not be taken for `false`.
        Some(_) => Err(ApiError::bad_request("The Obscura-Require-Proof header must be true or false")),
    }
}

/// Opens a link session for a device that does not exist yet.
pub async fn open(
    State(app): State<App>,
    Client(client): Client,
    Json(request): Json<OpenLinkSessionRequest>,
) -> Result<(StatusCode, axum::Json<LinkSession>), ApiError> {
    let proof = request.refresh_token.as_deref().map(|token| (token, None));
    let claim = Claim { username: &request.username, password: request.password, proof };
    let user = authenticate(&app, client, claim).await?;
    // Now, and not only when the user has typed in what links the device.
    app.disk.check_growth()?;
    let id = OpaqueSecret::random();
    let now = app.clock.now();
    let expires_at = now + LIFETIME;
    app.store.open_link(user, &id.hash(), expires_at, now).await?;
    // A client goes by its own clock. While ours is in doubt, the one that is ahead may be right.
    let announced = (app.clock.latest() + LIFETIME).seconds();
    let session = LinkSession { id: id.text().to_owned(), user_id: user.to_string(), expires_at: announced };
    Ok((StatusCode::CREATED, axum::Json(session)))
}

/// Approves a link session, and leaves a parcel in it for the new device.
pub async fn approve(
    State(app): State<App>,
    caller: Caller,
    NamedLink(hash): NamedLink,
    ProofRequired(proof_required): ProofRequired,
    request: Request,
) -> Result<StatusCode, ApiError> {
    // The parcel of a device that may not approve isn't read. A body that no route would take gets 413 all the same.
    if !caller.is_primary && announced_bytes(&request) <= MAX_BODY_BYTES as u64 {
        return Err(ApiError::forbidden("Primary device required"));
    }
    let RawBody { bytes: parcel, share: _share } = RawBody::from_request(request, &app).await?;
    app.disk.check_growth()?;
    let approval = Approval { parcel: &parcel, proof_required };
    match app.store.approve_link(caller.user, &hash, approval, app.clock.now()).await? {
        Approved::Stored => Ok(StatusCode::NO_CONTENT),
        Approved::Unknown => Err(ApiError::NotFound),
        Approved::Already => Err(ApiError::Conflict("Link session already approved".into())),
    }
}

/// What the primary device has left, or 204 as long as it has not.
pub async fn read(State(app): State<App>, NamedLink(hash): NamedLink) -> Result<Response, ApiError> {
    match app.store.link_body(&hash, app.clock.now()).await? {
        LinkBody::Approved(parcel) => {
            Ok(([(header::CONTENT_TYPE, "application/octet-stream")], parcel).into_response())
        }
        LinkBody::Waiting => Ok(StatusCode::NO_CONTENT.into_response()),
        LinkBody::Unknown => Err(ApiError::NotFound),
    }
}
