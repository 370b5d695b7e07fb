//! Sending.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Protobuf, RawBody, required_key};
use crate::app::App;
use crate::limits::RateLimited;
use crate::model::message::{Replay, SendRequest, SendResult, Sender};
use crate::telemetry::metrics::Refusal;
use crate::wire::{self, BadSend};

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MISMATCH: HeaderName = HeaderName::from_static("idempotency-mismatch");

/// `POST /v1/messages`: queues sealed messages. With 200 all that is not named in the answer is durable. With 429 some
/// messages may be queued, durably, and a repeat queues the rest.
pub async fn send(
    State(app): State<App>,
    caller: Caller,
    headers: HeaderMap,
    RawBody { bytes: body, share: _share }: RawBody,
) -> Result<Response, ApiError> {
    let key = required_key(&headers)?;
    let digest = Sha256::digest(&body);
    let digest = *digest.first_chunk().expect("SHA-256 has 32 bytes");
    let sender = Sender { user: caller.user, device: caller.device, no: caller.no };
    let mut request = wire::send_request(body, sender, key, digest, app.config.messaging.send_batch_limit)?;
    apply_rate_limits(&app, &mut request)?;
    if let Err(full) = app.disk.check_growth()
        && !app.store.has_outcome(caller.no, key).await?
    {
        return Err(full.into());
    }
    let sent = app.message_writer.send(request).await?;
    Ok(answer(&sent, is_lenient(&headers)))
}

/// Marks the recipients that get too many sends at the moment. Returns an error when all of them do.
fn apply_rate_limits(app: &App, request: &mut SendRequest) -> Result<(), ApiError> {
    let mut shortest: Option<RateLimited> = None;
    let mut limited = 0;
    for recipient in &mut request.recipients {
        if let Err(wait) = app.limits.send(request.sender.user, recipient.user) {
            recipient.throttled_for = Some(wait.0);
            shortest = Some(shortest.map_or(wait, |other| other.min(wait)));
            limited += 1;
        }
    }
    match shortest {
        Some(wait) if limited == request.recipients.len() => Err(wait.into()),
        _ => Ok(()),
    }
}

/// True if the request accepts an answer that names refused devices (`Prefer: handling=lenient`, RFC 7240).
fn is_lenient(headers: &HeaderMap) -> bool {
    let values = headers.get_all(PREFER).iter().filter_map(|value| value.to_str().ok());
    let mut preferences = values.flat_map(|value| value.split(','));
    preferences.any(|preference| {
        let (name, value) = preference.split(';').next().unwrap_or_default().split_once('=').unwrap_or_default();
        name.trim().eq_ignore_ascii_case("handling") && value.trim().trim_matches('"').eq_ignore_ascii_case("lenient")
    })
}

fn answer(sent: &SendResult, is_lenient: bool) -> Response {
    let mut response = match sent.retry_after {
        Some(wait) if !is_lenient => ApiError::from(RateLimited(wait, Refusal::InboxRoom)).into_response(),
        _ => Protobuf(wire::send_response(&sent.outcome)).into_response(),
    };
    if is_lenient {
        response.headers_mut().insert(PREFERENCE_APPLIED, HeaderValue::from_static("handling=lenient"));
        if let Some(wait) = sent.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs() + 1));
        }
    }
    let yes = HeaderValue::from_static("true");
    if sent.replay.is_some() {
        response.headers_mut().insert(REPLAYED, yes.clone());
    }
    if sent.replay == Some(Replay::OtherBody) {
        response.headers_mut().insert(MISMATCH, yes);
    }
    response
}

impl From<BadSend> for ApiError {
    fn from(bad: BadSend) -> Self {
        match bad {
            BadSend::TooMany => Self::TooLarge(bad.to_string().into()),
            BadSend::NotProtobuf | BadSend::Structure(_) => Self::bad_request(bad.to_string()),
        }
    }
}
