//! Sending.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::api::error::ApiError;
use crate::api::extract::{Caller, Protobuf, RawBody, required_key};
use crate::app::App;
use crate::model::mail::{Replay, Sender, Sent};
use crate::wire::{self, BadSend};

const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MISMATCH: HeaderName = HeaderName::from_static("idempotency-mismatch");

/// `POST /v1/messages`: queues sealed messages. What it answers with 200 is durable.
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
    let mail = wire::outgoing(body, sender, key, digest, app.config.messaging.send_batch_limit)?;
    for recipient in &mail.recipients {
        app.limits.send(caller.user, recipient.user)?;
    }
    if let Err(full) = app.disk.check_growth()
        && !app.store.has_outcome(caller.no, key).await?
    {
        return Err(full.into());
    }
    let sent = app.mailroom.send(mail).await?;
    Ok(answer(&sent))
}

fn answer(sent: &Sent) -> Response {
    let mut response = Protobuf(wire::send_response(&sent.outcome)).into_response();
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
