//! The REST API. `ROUTES` is the table of contents; each resource has a file of its own.

pub mod accounts;
pub mod attachments;
pub mod body_progress;
pub mod clients;
pub mod connections;
pub mod device_keys;
pub mod devices;
pub mod error;
pub mod extract;
pub mod gateway;
pub mod health;
pub mod keys;
pub mod links;
pub mod management;
pub mod messages;
pub mod push_token;
mod request;
mod request_metrics;
pub mod sessions;
mod strict;

use axum::Router;
use axum::handler::Handler;
use axum::http::header;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, delete, get, post, put};

use crate::api::clients::{AdmissionConfig, admit};
use crate::api::error::ApiError;
use crate::api::extract::MAX_BODY_BYTES;
use crate::app::App;
use crate::config::Config;
use crate::limits::Tier;

/// What a route reads of a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// None of it.
    Nothing,
    /// A few words: names, passwords, tokens.
    Words,
    /// What one device leaves for another or for a push provider.
    Parcel,
    /// The keys of a device.
    Keys,
    /// Messages.
    Messages,
    /// All of it, streamed to where it stays.
    Stream,
}

impl BodyKind {
    /// The largest body, in bytes; 0 for what is not read into memory.
    pub fn max_bytes(self, config: &Config) -> usize {
        const KIB: usize = 1 << 10;
        match self {
            Self::Nothing | Self::Stream => 0,
            Self::Words => 16 * KIB,
            Self::Parcel => 64 * KIB,
            // An elliptic-curve key and a Kyber key have 2.4 KB in JSON. The rest is for spaces, and lets an upload with too
            // many keys get the 400 that says so.
            Self::Keys => (64 * KIB + config.prekeys.max as usize * 4 * KIB).min(MAX_BODY_BYTES),
            Self::Messages => MAX_BODY_BYTES,
        }
    }
}

/// The largest body of a request without a token, in bytes.
pub fn largest_guest_body(config: &Config) -> usize {
    BodyKind::Keys.max_bytes(config)
}

/// A line of the contract: what may be asked, and every status that the answer may have. `openapi.yaml` is held
/// against it by a test.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The method.
    pub method: &'static str,
    /// The path, with its varying segments in braces.
    pub path: &'static str,
    /// The bucket of the client's address that it takes a token from.
    pub tier: Tier,
    /// What it reads of the body.
    pub reads: BodyKind,
    /// Every status that it may answer with.
    pub statuses: &'static [u16],
}

/// Makes the table and the router from one list, so that they can't differ.
macro_rules! routes {
    ($($method:ident $path:literal $tier:ident $reads:ident $handler:path => [$($status:literal)*];)*) => {
        /// Every route of the API, in the order of the contract.
        pub const ROUTES: &[Route] = &[$(Route {
            method: stringify!($method),
            path: $path,
            tier: Tier::$tier,
            reads: BodyKind::$reads,
            statuses: &[$($status),*],
        }),*];

        fn router_of(app: &App) -> Router<App> {
            Router::new()$(.route($path, guarded(routes!(@method $method)($handler), Tier::$tier, BodyKind::$reads, app)))*
        }
    };
    (@method GET) => { get };
    (@method POST) => { post };
    (@method PUT) => { put };
    (@method DELETE) => { delete };
}

routes! {
    POST   "/v1/users"                            Auth     Keys     accounts::register    => [201 400 408 409 413 415 422 429 500 503 507];
    POST   "/v1/users/reset"                      Auth     Keys     accounts::reset       => [200 400 401 408 413 415 422 429 500 503 507];
    POST   "/v1/session"                          Auth     Words    sessions::log_in      => [200 400 401 408 409 413 415 422 429 500 503 507];
    DELETE "/v1/session"                          Auth     Nothing  sessions::log_out     => [204 401 408 429 500 503 507];
    POST   "/v1/session/refresh"                  Auth     Words    sessions::refresh     => [200 400 401 408 413 415 422 429 500 503 507];
    POST   "/v1/link-sessions"                    Auth     Words    links::open           => [201 400 401 408 413 415 422 429 500 503 507];
    PUT    "/v1/link-sessions"                    Standard Parcel   links::approve        => [204 400 401 403 404 408 409 413 415 429 500 503 507];
    GET    "/v1/link-sessions"                    Standard Nothing  links::read           => [200 204 400 404 408 429 500 503];
    PUT    "/v1/link-sessions/{id}"               Standard Parcel   links::approve        => [204 400 401 403 404 408 409 413 415 429 500 503 507];
    GET    "/v1/link-sessions/{id}"               Standard Nothing  links::read           => [200 204 400 404 408 429 500 503];
    POST   "/v1/devices"                          Standard Keys     devices::link         => [201 400 403 408 413 415 422 429 500 503 507];
    GET    "/v1/devices"                          Standard Nothing  devices::list         => [200 401 408 429 500 503];
    DELETE "/v1/devices/{deviceId}"               Standard Nothing  devices::delete       => [204 400 401 403 404 408 429 500 503 507];
    POST   "/v1/keys"                             Standard Keys     keys::refill          => [204 400 401 408 413 415 422 429 500 503 507];
    GET    "/v1/keys"                             Standard Nothing  keys::counts          => [200 401 408 429 500 503];
    GET    "/v1/keys/{userId}"                    Standard Nothing  keys::bundles         => [200 400 401 404 408 429 500 503 507];
    GET    "/v1/keys/{userId}/devices/{deviceId}" Standard Nothing  keys::bundle          => [200 400 401 404 408 429 500 503 507];
    POST   "/v1/messages"                         Standard Messages messages::send        => [200 400 401 408 413 415 429 500 503 507];
    POST   "/v1/gateway/ticket"                   Standard Nothing  gateway::ticket       => [201 401 408 429 500 503 507];
    GET    "/v1/gateway"                          Standard Nothing  gateway::connect      => [101 400 401 408 426 429 500];
    PUT    "/v1/push-token"                       Standard Parcel   push_token::put       => [204 400 401 408 413 415 422 429 500 503 507];
    DELETE "/v1/push-token"                       Standard Nothing  push_token::delete    => [204 401 408 429 500 503 507];
    GET    "/v1/push/vapid-key"                   Standard Nothing  push_token::vapid_key => [200 401 408 429 500 503];
    POST   "/v1/attachments"                      Open     Stream   attachments::upload   => [201 400 401 408 411 413 415 429 500 503 507];
    GET    "/v1/attachments/{id}"                 Open     Nothing  attachments::download => [200 206 304 400 401 404 408 416 429 500 503];
    GET    "/openapi.yaml"                        Open     Nothing  document              => [200 429];
}

/// The API port.
pub fn router(app: App) -> Router {
    let elsewhere = || from_fn_with_state(AdmissionConfig { app: app.clone(), tier: Tier::Open, max_body: 0 }, admit);
    let router = router_of(&app)
        .fallback((|| async { ApiError::NotFound }).layer(elsewhere()))
        .method_not_allowed_fallback((|| async { ApiError::MethodNotAllowed }).layer(elsewhere()))
        .layer(from_fn_with_state(app.clone(), request::bounded_in_time))
        .layer(from_fn(request::identified))
        .layer(from_fn_with_state(app.clone(), request_metrics::record_metrics));
    // Without a collector there is nothing in the way, not even a look whether there is one.
    let router = match app.traces.are_recorded() {
        true => router.layer(from_fn_with_state(app.clone(), request::traced)),
        false => router,
    };
    router.with_state(app)
}

fn guarded(route: MethodRouter<App>, tier: Tier, reads: BodyKind, app: &App) -> MethodRouter<App> {
    let entrance = AdmissionConfig { app: app.clone(), tier, max_body: reads.max_bytes(&app.config) };
    route.layer(from_fn_with_state(entrance, admit))
}

/// `GET /openapi.yaml`
async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/yaml")], include_str!("../../openapi.yaml"))
}
