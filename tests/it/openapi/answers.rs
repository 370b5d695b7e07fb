//! Answers are what the document says: those that the types of the server allow, and those that tests meet.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::IntoResponse;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use obscura_server::api::attachments::{self, Attachment};
use obscura_server::api::device_keys::{OneTimePreKeyBody, PqPreKeyBody, SignedPreKeyBody};
use obscura_server::api::devices::{self, Device, DeviceList};
use obscura_server::api::error::ApiError;
use obscura_server::api::gateway::{self, TicketResponse};
use obscura_server::api::keys::{self, BundleBody, BundleList, KeyCounts};
use obscura_server::api::links::{self, LinkSession};
use obscura_server::api::push_token::{self, VapidKeyBody};
use obscura_server::api::sessions::{self, AuthResponse};
use obscura_server::api::{ROUTES, accounts};
use obscura_server::telemetry::metrics::Refusal;
use serde::Serialize;
use serde_json::Value;

use super::document::{component, members, operation, operations};
use super::observed::{Answer, check};
use super::schema::{flat, is_nullable, objects, objects_of, required, validate};

/// What an operation answers when all goes well: everything filled in, and everything left out that may be.
struct Example {
    method: &'static str,
    path: &'static str,
    status: u16,
    full: Value,
    bare: Value,
}

/// A handler that answers JSON of type `Body`.
trait AnswersJson<Arguments> {
    type Body: Serialize;
}

/// How a handler can answer JSON.
trait JsonAnswer {
    type Body: Serialize;
}

impl<T: Serialize> JsonAnswer for axum::Json<T> {
    type Body = T;
}

impl<T: Serialize> JsonAnswer for (StatusCode, axum::Json<T>) {
    type Body = T;
}

macro_rules! answers_json {
    ($($argument:ident)*) => {
        impl<H, R, A, $($argument),*> AnswersJson<($($argument,)*)> for H
        where
            H: Fn($($argument),*) -> R,
            R: Future<Output = Result<A, ApiError>>,
            A: JsonAnswer,
        {
            type Body = A::Body;
        }
    };
}

answers_json!(A1 A2);
answers_json!(A1 A2 A3);
answers_json!(A1 A2 A3 A4);
answers_json!(A1 A2 A3 A4 A5);

fn answer<Arguments, H: AnswersJson<Arguments>>(
    (method, path, status): (&'static str, &'static str, u16),
    _: H,
    full: H::Body,
    bare: H::Body,
) -> Example {
    let json = |body: H::Body| serde_json::to_value(body).expect("JSON");
    Example { method, path, status, full: json(full), bare: json(bare) }
}

/// One for every handler that answers JSON. The compiler sees to it that handler and type fit.
fn examples() -> Vec<Example> {
    let devices = |device| DeviceList { devices: vec![device] };
    let bundles = |bundle| BundleList { bundles: vec![bundle] };
    let counts = || KeyCounts { one_time_pre_key_count: 98, pq_pre_key_count: 20 };
    let vapid_key = || VapidKeyBody { public_key: secret() };
    let ticket = || TicketResponse { ticket: secret() };
    let attachment = || Attachment { id: uuid(), expires_at: 1_764_375_300 };
    let bundle_path = "/v1/keys/{userId}/devices/{deviceId}";
    vec![
        answer(("POST", "/v1/users", 201), accounts::register, auth(), auth()),
        answer(("POST", "/v1/users/reset", 200), accounts::reset, auth(), auth()),
        answer(("POST", "/v1/session", 200), sessions::log_in, auth(), auth()),
        answer(("POST", "/v1/session/refresh", 200), sessions::refresh, auth(), auth()),
        answer(("POST", "/v1/link-sessions", 201), links::open, link_session(), link_session()),
        answer(("POST", "/v1/devices", 201), devices::link, auth(), auth()),
        answer(("GET", "/v1/devices", 200), devices::list, devices(device(true)), devices(device(false))),
        answer(("GET", "/v1/keys", 200), keys::counts, counts(), counts()),
        answer(("GET", "/v1/keys/{userId}", 200), keys::bundles, bundles(bundle(true)), bundles(bundle(false))),
        answer(("GET", bundle_path, 200), keys::bundle, bundle(true), bundle(false)),
        answer(("POST", "/v1/gateway/ticket", 201), gateway::ticket, ticket(), ticket()),
        answer(("GET", "/v1/push/vapid-key", 200), push_token::vapid_key, vapid_key(), vapid_key()),
        answer(("POST", "/v1/attachments", 201), attachments::upload, attachment(), attachment()),
    ]
}

fn auth() -> AuthResponse {
    AuthResponse {
        token: "text".into(),
        refresh_token: secret(),
        expires_at: 1_764_375_300,
        user_id: uuid(),
        device_id: uuid(),
    }
}

fn link_session() -> LinkSession {
    LinkSession { id: secret(), user_id: uuid(), expires_at: 1_764_375_300 }
}

fn device(is_full: bool) -> Device {
    Device { device_id: uuid(), name: is_full.then(|| "phone".into()), is_primary: true }
}

fn bundle(is_full: bool) -> BundleBody {
    let (public_key, signature) = (STANDARD.encode([5; 33]), STANDARD.encode([0; 64]));
    let one_time = OneTimePreKeyBody { key_id: 1, public_key: public_key.clone() };
    let pq = PqPreKeyBody { key_id: 1, public_key: STANDARD.encode([8; 1569]), signature: signature.clone() };
    BundleBody {
        device_id: uuid(),
        registration_id: 1,
        identity_key: public_key.clone(),
        signed_pre_key: SignedPreKeyBody { key_id: 1, public_key, signature },
        one_time_pre_key: is_full.then_some(one_time),
        pq_pre_key: is_full.then_some(pq),
    }
}

fn uuid() -> String {
    "0193a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b".into()
}

fn secret() -> String {
    "x".repeat(43)
}

#[test]
fn the_handlers_that_answer_json_are_those_of_the_document() {
    let mut documented = BTreeSet::new();
    for operation in operations() {
        let successes = operation.statuses().into_iter().filter(|status| *status < 400);
        for status in successes.filter(|status| operation.json_response(*status).is_some()) {
            documented.insert((operation.method.clone(), operation.path, status));
        }
    }
    let handlers = examples().into_iter().map(|example| (example.method.to_owned(), example.path, example.status));
    assert_eq!(documented, handlers.collect());
}

#[test]
fn answers_have_exactly_the_members_of_their_schemas() {
    for Example { method, path, status, full, bare } in examples() {
        let what = format!("{method} {path} {status}");
        let schema = operation(method, path).and_then(|operation| operation.json_response(status)).expect("a schema");
        for value in [&full, &bare] {
            validate(schema, value).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        assert_eq!(objects_of(&full), objects(schema), "{what}");
        check_bare(&what, schema, &bare);
    }
}

/// What is left out of a bare answer is what isn't required, and what is null is what is nullable.
fn check_bare(what: &str, schema: &Value, bare: &Value) {
    let schema = flat(schema);
    if let Some(object) = bare.as_object() {
        assert_eq!(object.keys().cloned().collect::<BTreeSet<_>>(), required(&schema), "{what}: required members");
    }
    for (name, member) in members(bare) {
        let property = &schema["properties"][name];
        assert_eq!(member.is_null(), is_nullable(&flat(property)), "{what}: nullable {name}");
        check_bare(what, property, member);
    }
    for item in bare.as_array().into_iter().flatten() {
        check_bare(what, &schema["items"], item);
    }
}

/// Every failure that a client can see.
fn failures() -> [ApiError; 17] {
    [
        ApiError::bad_request("text"),
        ApiError::Unauthorized,
        ApiError::forbidden("text"),
        ApiError::NotFound,
        ApiError::MethodNotAllowed,
        ApiError::Timeout,
        ApiError::Conflict("text".into()),
        ApiError::LengthRequired,
        ApiError::TooLarge("text".into()),
        ApiError::UnsupportedMediaType,
        ApiError::RangeNotSatisfiable { size: 7 },
        ApiError::Unprocessable("text".into()),
        ApiError::UpgradeRequired,
        ApiError::TooManyRequests { retry_after_secs: 7, limit: Refusal::AccountLimit },
        ApiError::Internal,
        ApiError::Unavailable { retry_after: Duration::ZERO, lacking: Refusal::Database },
        ApiError::DiskFull,
    ]
}

#[tokio::test]
async fn failures_have_exactly_the_headers_and_the_body_of_the_document() {
    let mut statuses = BTreeSet::new();
    for failure in failures() {
        let mut response = failure.into_response();
        let status = response.status().as_u16();
        // What the layers around the handlers add.
        response.headers_mut().insert("x-request-id", "id".parse().unwrap());
        if status == 405 {
            response.headers_mut().insert("allow", "GET,HEAD".parse().unwrap());
        }
        let headers = response.headers().clone();
        let body = axum::body::to_bytes(response.into_body(), 1000).await.unwrap();
        let answer = Answer { status, headers: &headers, body: Some(&body) };
        let documented = operations().into_iter().filter_map(|operation| operation.response(status));
        let unknown = [("NotFound", 404), ("MethodNotAllowed", 405)].into_iter().filter(|(_, its)| *its == status);
        let unknown = unknown.map(|(name, _)| component(&format!("#/components/responses/{name}")));
        for definition in documented.chain(unknown) {
            check(&status.to_string(), definition, &answer);
            let example = &definition["content"]["application/json"]["example"];
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert!(body["error"] == "text" || *example == body, "{status}: {body}, and for example {example}");
        }
        statuses.insert(status);
    }
    let in_table = ROUTES.iter().flat_map(|route| route.statuses).copied().filter(|status| *status >= 400);
    assert_eq!(statuses, in_table.chain([405]).collect());
}
