//! What every request goes through: it gets an id, it gets an end, and it is traced.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::time::Instant;
use uuid::Uuid;

use crate::api::body_progress::{BodyProgress, Deadline};
use crate::api::error::ApiError;
use crate::app::App;
use crate::telemetry::parent::Parent;
use crate::telemetry::traces::Span;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

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

/// Answers 408 when a request has no answer in time. The time runs from the last byte of the body to the answer's head; a
/// body that comes in too slowly uses it up.
pub(super) async fn bounded_in_time(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut deadline = Deadline::new(time_limit(&app, &request));
    let body_progress = request.extensions().get::<Arc<BodyProgress>>().cloned();
    let mut answered = std::pin::pin!(next.run(request));
    loop {
        if let Ok(response) = tokio::time::timeout_at(deadline.at(), answered.as_mut()).await {
            return response;
        }
        if deadline.check_expired(body_progress.as_deref(), Instant::now()) {
            return ApiError::Timeout.into_response();
        }
    }
}

fn time_limit(app: &App, request: &Request) -> Duration {
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or_default();
    let is_upload_or_download =
        matches!(*request.method(), Method::POST | Method::GET | Method::HEAD) && path.starts_with("/v1/attachments");
    let own = if is_upload_or_download { app.config.attachments.timeout } else { app.config.server.request_timeout };
    own.min(app.config.server.global_timeout)
}

/// Keeps a trace of the request, if it is its turn: what was asked by the name of the route, and what came of it.
pub(super) async fn traced(State(app): State<App>, request: Request, next: Next) -> Response {
    let span = begun(&app, &request);
    let response = span.run(next.run(request)).await;
    let status = response.status();
    span.set("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.set("error.type", status.as_str().to_owned());
        span.set_failed();
    }
    response
}

fn begun(app: &App, request: &Request) -> Span {
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let name: Cow<'static, str> = match (&route, method) {
        (Some(route), method) => format!("{} {route}", method.unwrap_or("HTTP")).into(),
        (None, method) => method.unwrap_or("HTTP").into(),
    };
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
    let span = app.traces.begin_server(name, parent(app, peer, request.headers()));
    if span.is_recorded() {
        span.set("http.request.method", method.unwrap_or("_OTHER"));
        if let Some(route) = route {
            span.set("http.route", route);
        }
    }
    span
}

/// Anything may stand for a method, so only those that we know are written down.
fn known_method(method: &Method) -> Option<&'static str> {
    ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"]
        .into_iter()
        .find(|known| method.as_str() == *known)
}

fn parent(app: &App, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<Parent> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let (Some(parent), None) = (parents.next(), parents.next()) else { return None };
    let is_trusted = peer.is_some_and(|peer| app.config.server.trusts(peer));
    let states: Option<Vec<_>> = headers.get_all(TRACESTATE).iter().map(|state| state.to_str().ok()).collect();
    Parent::read(parent.as_bytes(), states.map(|states| states.join(",")).as_deref(), is_trusted)
}
