//! `ApiError`: every failure that a client can see, and its answer. Causes are logged here, and never shown.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{debug, error};

use crate::auth::passwords::Busy;
use crate::blobs::BlobError;
use crate::delivery::WriteError;
use crate::disk::InsufficientSpace;
use crate::limits::{NoRoom, RateLimited};
use crate::store::StoreError;
use crate::telemetry::metrics::Refusal;
use crate::telemetry::throttle::LogThrottle;

/// What a client is told when something went wrong. The body is always `{"error": "<message>"}`.
#[derive(Debug)]
pub enum ApiError {
    /// 400: the request is not what this endpoint takes.
    BadRequest(Cow<'static, str>),
    /// 401: one constant message, which never says why.
    Unauthorized,
    /// 403
    Forbidden(Cow<'static, str>),
    /// 404
    NotFound,
    /// 405
    MethodNotAllowed,
    /// 408
    Timeout,
    /// 409
    Conflict(Cow<'static, str>),
    /// 411: a `content-length` is needed.
    LengthRequired,
    /// 413
    TooLarge(Cow<'static, str>),
    /// 415: the body is not JSON.
    UnsupportedMediaType,
    /// 415: the body has a `content-encoding`, such as gzip.
    UnsupportedEncoding,
    /// 416, with the size of the whole.
    RangeNotSatisfiable {
        /// Bytes.
        size: u64,
    },
    /// 422: well-formed JSON of the wrong shape.
    Unprocessable(String),
    /// 426: the connection can't become a WebSocket.
    UpgradeRequired,
    /// 429: come again after the given wait.
    TooManyRequests {
        /// The wait, in whole seconds, at least one.
        retry_after_secs: u64,
        /// By which limit.
        limit: Refusal,
    },
    /// 500: a defect of ours. The cause is in our log.
    Internal,
    /// 503: the database, the storage or a queue can't take this now.
    Unavailable {
        /// When to come again.
        retry_after: Duration,
        /// What is lacking.
        lacking: Refusal,
    },
    /// 507: there is no room to grow, so nothing new is taken in.
    DiskFull,
}

/// How long a client should wait when the database or the storage is away.
const RETRY_AFTER: Duration = Duration::from_secs(2);

impl ApiError {
    /// 400 with this message.
    pub fn bad_request(message: impl Into<Cow<'static, str>>) -> Self {
        Self::BadRequest(message.into())
    }

    /// 403 with this message.
    pub fn forbidden(message: impl Into<Cow<'static, str>>) -> Self {
        Self::Forbidden(message.into())
    }

    /// 503 with the usual wait, for want of this.
    pub(super) fn unavailable(lacking: Refusal) -> Self {
        Self::Unavailable { retry_after: RETRY_AFTER, lacking }
    }

    /// What it counts as.
    fn refusal(&self) -> Refusal {
        match self {
            Self::BadRequest(_) => Refusal::BadRequest,
            Self::Unauthorized => Refusal::Unauthorized,
            Self::Forbidden(_) => Refusal::Forbidden,
            Self::NotFound => Refusal::NotFound,
            Self::MethodNotAllowed => Refusal::MethodNotAllowed,
            Self::Timeout => Refusal::Timeout,
            Self::Conflict(_) => Refusal::Conflict,
            Self::LengthRequired => Refusal::LengthRequired,
            Self::TooLarge(_) => Refusal::TooLarge,
            Self::UnsupportedMediaType | Self::UnsupportedEncoding => Refusal::UnsupportedMediaType,
            Self::RangeNotSatisfiable { .. } => Refusal::RangeNotSatisfiable,
            Self::Unprocessable(_) => Refusal::Unprocessable,
            Self::UpgradeRequired => Refusal::UpgradeRequired,
            Self::TooManyRequests { limit, .. } => *limit,
            Self::Internal => Refusal::Internal,
            Self::Unavailable { lacking, .. } => *lacking,
            Self::DiskFull => Refusal::NoRoom,
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::LengthRequired => StatusCode::LENGTH_REQUIRED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType | Self::UnsupportedEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::RangeNotSatisfiable { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Unprocessable(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::UpgradeRequired => StatusCode::UPGRADE_REQUIRED,
            Self::TooManyRequests { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        }
    }

    fn message(&self) -> &str {
        match self {
            Self::BadRequest(message)
            | Self::Forbidden(message)
            | Self::Conflict(message)
            | Self::TooLarge(message) => message,
            Self::Unprocessable(message) => message,
            Self::Unauthorized => "Unauthorized",
            Self::NotFound => "Not found",
            Self::MethodNotAllowed => "Method not allowed",
            Self::Timeout => "Request timeout",
            Self::LengthRequired => "Length required",
            Self::UnsupportedMediaType => "Expected a body of content-type application/json",
            Self::UnsupportedEncoding => "Expected a body without content-encoding",
            Self::RangeNotSatisfiable { .. } => "Range not satisfiable",
            Self::UpgradeRequired => "Expected a WebSocket upgrade over HTTP/1.1",
            Self::TooManyRequests { .. } => "Too many requests",
            Self::Internal => "Internal server error",
            Self::Unavailable { .. } => "Temporarily unavailable",
            Self::DiskFull => "The server has no room for new data at the moment",
        }
    }

    fn add_headers(&self, response: &mut Response) {
        let headers = response.headers_mut();
        match self {
            Self::TooManyRequests { retry_after_secs, .. } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(*retry_after_secs));
                headers.insert("x-ratelimit-after", HeaderValue::from(*retry_after_secs));
            }
            Self::Unavailable { retry_after, .. } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after.as_secs().max(1)));
            }
            Self::RangeNotSatisfiable { size } => {
                let range = format!("bytes */{size}");
                headers.insert(header::CONTENT_RANGE, HeaderValue::from_str(&range).expect("digits are visible ASCII"));
            }
            Self::UpgradeRequired => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            }
            _ => {}
        }
    }
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(ErrorBody { error: self.message() })).into_response();
        self.add_headers(&mut response);
        response.extensions_mut().insert(self.refusal());
        response
    }
}

impl From<Busy> for ApiError {
    fn from(_: Busy) -> Self {
        Self::Unavailable { retry_after: Duration::from_secs(1), lacking: Refusal::Passwords }
    }
}

impl From<RateLimited> for ApiError {
    /// The wait rounded down, plus one.
    fn from(RateLimited(wait, limit): RateLimited) -> Self {
        Self::TooManyRequests { retry_after_secs: wait.as_secs() + 1, limit }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        static LOGGED: LogThrottle = LogThrottle::new();
        if LOGGED.try_acquire() {
            error!(%error, "a request failed in the database");
        } else {
            debug!(%error, "another request failed in the database");
        }
        if error.is_full() { Self::DiskFull } else { Self::unavailable(Refusal::Database) }
    }
}

impl From<InsufficientSpace> for ApiError {
    fn from(_: InsufficientSpace) -> Self {
        Self::DiskFull
    }
}

impl From<NoRoom> for ApiError {
    fn from(_: NoRoom) -> Self {
        Self::unavailable(Refusal::Memory)
    }
}

impl From<WriteError> for ApiError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Full => Self::DiskFull,
            WriteError::Unavailable => Self::unavailable(Refusal::MessageWriter),
        }
    }
}

impl From<BlobError> for ApiError {
    fn from(error: BlobError) -> Self {
        static LOGGED: LogThrottle = LogThrottle::new();
        if LOGGED.try_acquire() {
            error!(%error, "a request failed in the attachment storage");
        } else {
            debug!(%error, "another request failed in the attachment storage");
        }
        if error.is_full() { Self::DiskFull } else { Self::unavailable(Refusal::Storage) }
    }
}
