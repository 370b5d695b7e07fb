//! What handlers take from a request: who is calling, and what exactly they said.
//!
//! Axum runs extractors in the order of a handler's arguments. `Caller` comes first everywhere, so that a missing or
//! void token wins over anything else that is wrong.

use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use prost::Message;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;
use tracing::error;

use crate::api::clients::AdmittedRequest;
use crate::api::error::ApiError;
use crate::api::strict::Strict;
use crate::app::App;
use crate::limits::{LimitSubject, PATIENCE, ResourcePermit, kib};
use crate::model::ids::{Address, AttachmentId, DeviceId, DeviceNo, IdempotencyKey, UserId};

/// The largest body that any route reads into memory, in bytes. Attachments are streamed.
pub const MAX_BODY_BYTES: usize = 2 << 20;

/// A body up to this size takes none of the memory that bodies share: the connection has room for that anyway. So a log-in,
/// a refresh and a small send get through, however much others hold.
const UNCOUNTED_BYTES: usize = 4 << 10;

/// The device that calls, proven by its access token. The device exists and its session has not been ended.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The account.
    pub user: UserId,
    /// The device.
    pub device: DeviceId,
    /// The device's number.
    pub no: DeviceNo,
    /// Whether it is the account's primary device.
    pub is_primary: bool,
    /// A Unix second behind all that the device's tokens are void up to, as long as the access token is good: by it the store
    /// tells whether it still is.
    pub token_expires_at: i64,
}

impl Caller {
    /// Where signals for this device go.
    pub fn address(&self) -> Address {
        Address { user: self.user, device: self.no }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Unmetered(caller) = Unmetered::from_request_parts(parts, app).await?;
        app.limits.request(caller.user)?;
        Ok(caller)
    }
}

/// The device that calls, where its account's requests aren't counted.
#[derive(Clone, Copy, Debug)]
pub struct Unmetered(pub Caller);

impl FromRequestParts<App> for Unmetered {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let token = bearer_token(&parts.headers).ok_or(ApiError::Unauthorized)?;
        let verified = app.tokens.verify_access_token(token, app.clock.now());
        // A token that was made while the clock was in doubt says when it expires by the other clock.
        let by_the_wall = || app.clock.doubt().and_then(|_| app.tokens.verify_access_token(token, app.clock.latest()));
        let claims = verified.or_else(by_the_wall).ok_or(ApiError::Unauthorized)?;
        let device_auth = app.store.device_auth(claims.device).await?.ok_or(ApiError::Unauthorized)?;
        if device_auth.user != claims.user || claims.is_revoked(device_auth.tokens_revoked_until) {
            return Err(ApiError::Unauthorized);
        }
        app.store.record_use(claims.user);
        if let Some(admitted) = parts.extensions.get_mut::<AdmittedRequest>() {
            admitted.subject = LimitSubject::Account(claims.user);
        }
        Ok(Self(Caller {
            user: claims.user,
            device: claims.device,
            no: device_auth.no,
            is_primary: device_auth.is_primary,
            // A token that doesn't outlive the void second is good until that grows.
            token_expires_at: claims.expires_at.max(device_auth.tokens_revoked_until.saturating_add(1)),
        }))
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Who a request is charged to: its account behind a [`Caller`], otherwise the address of its client.
#[derive(Clone, Copy, Debug)]
pub struct Client(pub LimitSubject);

impl FromRequestParts<App> for Client {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        // Every route lets requests in by `admit`.
        parts.extensions.get::<AdmittedRequest>().map(|admitted| Self(admitted.subject)).ok_or(ApiError::Internal)
    }
}

/// What is charged for what a request holds while it lasts. Comes after the [`Caller`].
#[derive(Clone, Copy, Debug)]
pub struct Holder(pub LimitSubject);

impl FromRequestParts<App> for Holder {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        // Every route lets requests in by `admit`.
        parts
            .extensions
            .get::<AdmittedRequest>()
            .map(|admitted| Self(admitted.limit_subject()))
            .ok_or(ApiError::Internal)
    }
}

/// A JSON body of type `T`, read strictly: unknown members are passed over, everything else has to fit.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::UnsupportedMediaType);
        }
        let RawBody { bytes: body, share: _share } = RawBody::from_request(request, app).await?;
        match read_json(&body) {
            Ok(value) => Ok(Self(value)),
            // The message of a data error names members and types, never the value of a secret: see `describe`.
            Err(error) if error.classify() == Category::Data && is_well_formed(&body) => {
                Err(ApiError::Unprocessable(describe(&error)))
            }
            Err(_) => Err(ApiError::bad_request("The body is not well-formed JSON")),
        }
    }
}

fn read_json<T: DeserializeOwned>(body: &[u8]) -> serde_json::Result<T> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = T::deserialize(Strict(&mut json))?;
    json.end()?;
    Ok(value)
}

/// Reading stops at the first member of a wrong type; what comes after it may be no JSON at all.
fn is_well_formed(body: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(body).is_ok()
}

/// True for `application/json` and `application/<x>+json`, with or without parameters.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || essence.strip_prefix("application/").is_some_and(|subtype| subtype.len() > 5 && subtype.ends_with("+json"))
}

/// Says what is wrong with a JSON body without repeating what it contains.
fn describe(error: &serde_json::Error) -> String {
    let message = error.to_string();
    if message.starts_with("missing field") || message.starts_with("duplicate field") {
        return message;
    }
    format!("The JSON body does not have the expected shape at line {} column {}", error.line(), error.column())
}

/// A body of at most as many bytes as its route takes. Its content type is not looked at.
#[derive(Debug)]
pub struct RawBody {
    /// What the client sent.
    pub bytes: Bytes,
    /// The body's part of the memory that all bodies share. To be kept for as long as the bytes are.
    pub share: Option<ResourcePermit>,
}

impl FromRequest<App> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let Some(admitted) = request.extensions().get::<AdmittedRequest>().copied() else {
            error!("a body came in on a route without a limit");
            return Err(ApiError::Internal);
        };
        let (subject, max_body) = (admitted.limit_subject(), admitted.max_body);
        check_encoding(request.headers())?;
        let too_large = || ApiError::TooLarge("Payload too large".into());
        if announced_bytes(&request) > max_body as u64 {
            return Err(too_large());
        }
        let mut body = request.into_body();
        let (mut bytes, mut share) = (BytesMut::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| ApiError::bad_request("The body could not be read"))?;
            let Ok(data) = frame.into_data() else { continue };
            let length = bytes.len() + data.len();
            if length > max_body {
                return Err(too_large());
            }
            if length > UNCOUNTED_BYTES {
                let share = share.get_or_insert_with(|| app.limits.bodies(subject).holder(subject));
                share.grow_to(kib(length), PATIENCE).await?;
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Self { bytes: bytes.freeze(), share })
    }
}

/// The length of the body as far as the client has told it.
pub fn announced_bytes(request: &Request) -> u64 {
    axum::body::HttpBody::size_hint(request.body()).lower()
}

/// Refuses a body with an encoding, such as a compressed one: 415.
pub fn check_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let lines = headers.get_all(header::CONTENT_ENCODING).iter();
    let mut codings = lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
    let is_plain = codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"));
    if is_plain { Ok(()) } else { Err(ApiError::UnsupportedEncoding) }
}

/// A protobuf answer.
#[derive(Debug)]
pub struct Protobuf<T>(pub T);

impl<T: Message> axum::response::IntoResponse for Protobuf<T> {
    fn into_response(self) -> axum::response::Response {
        ([(header::CONTENT_TYPE, "application/x-protobuf")], self.0.encode_to_vec()).into_response()
    }
}

/// The only segment of a path that varies, read as an id.
#[derive(Clone, Copy, Debug)]
pub struct PathId<T>(pub T);

/// An id that can stand in a path.
pub trait FromPath: Sized {
    /// Reads it; `None` when it is malformed.
    fn from_segment(segment: &str) -> Option<Self>;
}

impl FromPath for UserId {
    fn from_segment(segment: &str) -> Option<Self> {
        Self::parse(segment)
    }
}

impl FromPath for DeviceId {
    fn from_segment(segment: &str) -> Option<Self> {
        Self::parse(segment)
    }
}

impl FromPath for AttachmentId {
    fn from_segment(segment: &str) -> Option<Self> {
        Self::parse(segment)
    }
}

impl<T: FromPath> FromRequestParts<App> for PathId<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let [segment] = &path_segments(parts, app).await?[..] else { return Err(malformed_path()) };
        T::from_segment(segment).map(Self).ok_or_else(malformed_path)
    }
}

/// The two varying segments of a path, read as ids.
#[derive(Clone, Copy, Debug)]
pub struct PathIds<T, U>(pub T, pub U);

impl<T: FromPath, U: FromPath> FromRequestParts<App> for PathIds<T, U> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let [first, second] = &path_segments(parts, app).await?[..] else { return Err(malformed_path()) };
        match (T::from_segment(first), U::from_segment(second)) {
            (Some(first), Some(second)) => Ok(Self(first, second)),
            _ => Err(malformed_path()),
        }
    }
}

async fn path_segments(parts: &mut Parts, app: &App) -> Result<Vec<String>, ApiError> {
    let params = RawPathParams::from_request_parts(parts, app).await.map_err(|_| malformed_path())?;
    Ok(params.iter().map(|(_, value)| value.to_owned()).collect())
}

fn malformed_path() -> ApiError {
    ApiError::bad_request("The path does not hold a valid id")
}

/// The `Idempotency-Key` header, where one is required. A plain function, because its check comes after the body's.
pub fn required_key(headers: &HeaderMap) -> Result<IdempotencyKey, ApiError> {
    idempotency_key(headers)?.ok_or_else(|| ApiError::bad_request("The Idempotency-Key header is missing"))
}

/// The `Idempotency-Key` header, where one may be given.
#[derive(Clone, Copy, Debug)]
pub struct OptionalKey(pub Option<IdempotencyKey>);

impl FromRequestParts<App> for OptionalKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        idempotency_key(&parts.headers).map(Self)
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().and_then(IdempotencyKey::parse);
    key.map(Some).ok_or_else(|| ApiError::bad_request("The Idempotency-Key header must be a UUID"))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_json_content_types_count_as_json() {
        let mut headers = HeaderMap::new();
        assert!(!is_json(&headers));
        for (value, expected) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/problem+json", true),
            ("application/+json", false),
            ("text/json", false),
            ("application/jsonp", false),
            ("", false),
        ] {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            assert_eq!(is_json(&headers), expected, "{value}");
        }
    }

    #[test]
    fn only_bodies_that_are_not_encoded_are_taken() {
        let mut headers = HeaderMap::new();
        assert!(check_encoding(&headers).is_ok());
        for (value, is_taken) in [("identity", true), ("Identity, ", true), ("gzip", false), ("identity, br", false)] {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(value));
            assert_eq!(check_encoding(&headers).is_ok(), is_taken, "{value}");
        }
    }

    #[test]
    fn only_the_exact_bearer_scheme_is_read() {
        let mut headers = HeaderMap::new();
        for (value, expected) in
            [("Bearer abc", Some("abc")), ("bearer abc", None), ("Bearer", None), ("Basic abc", None)]
        {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            assert_eq!(bearer_token(&headers), expected, "{value}");
        }
    }
}
