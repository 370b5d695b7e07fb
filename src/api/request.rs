//! What every request goes through: it gets an id, and it gets an end.

use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use crate::api::error::ApiError;
use crate::app::App;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Puts the request's own `x-request-id`, unchanged, or a fresh one on the answer. A client's id is never logged.
pub(super) async fn identified(request: Request, next: Next) -> Response {
    let id = request.headers().get(&REQUEST_ID).cloned().unwrap_or_else(fresh_id);
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn fresh_id() -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = Uuid::new_v4().hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).expect("hex digits and hyphens are visible ASCII")
}

/// Answers 408 when a request has no answer in time. The time runs from the request's head to the answer's head.
pub(super) async fn bounded_in_time(State(app): State<App>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(time_limit(&app, &request), next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::Timeout.into_response(),
    }
}

fn time_limit(app: &App, request: &Request) -> Duration {
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or_default();
    let is_upload_or_download =
        matches!(*request.method(), Method::POST | Method::GET | Method::HEAD) && path.starts_with("/v1/attachments");
    let own = if is_upload_or_download { app.config.attachments.timeout } else { app.config.server.request_timeout };
    own.min(app.config.server.global_timeout)
}
