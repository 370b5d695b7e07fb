//! The REST API. `ROUTES` is the table of contents; each resource has a file of its own.

pub mod accounts;
pub mod attachments;
pub mod connections;
pub mod device_keys;
pub mod devices;
pub mod error;
pub mod extract;
pub mod gateway;
pub mod health;
pub mod keys;
pub mod limits;
pub mod links;
pub mod management;
mod measured;
pub mod messages;
pub mod push_token;
mod request;
pub mod sessions;
mod strict;

use axum::Router;
use axum::http::header;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, delete, get, post, put};

use crate::api::error::ApiError;
use crate::api::limits::Limits;
use crate::app::App;

/// Which bucket of a client a route takes its tokens from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited {
    /// Most of the API.
    Standard,
    /// What starts or ends a session.
    Auth,
    /// Limited by the bytes that an account uploads, and not by requests.
    Bytes,
    /// Not limited: downloads and the document.
    Free,
}

/// A line of the contract: what may be asked, and every status that the answer may have. `openapi.yaml` is held
/// against it by a test.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The method.
    pub method: &'static str,
    /// The path, with its varying segments in braces.
    pub path: &'static str,
    /// Who pays for it.
    pub limited: Limited,
    /// Every status that it may answer with.
    pub statuses: &'static [u16],
}

/// Makes the table and the router from one list, so that they can't differ.
macro_rules! routes {
    ($($method:ident $path:literal $limited:ident $handler:path => [$($status:literal)*];)*) => {
        /// Every route of the API, in the order of the contract.
        pub const ROUTES: &[Route] = &[$(Route {
            method: stringify!($method),
            path: $path,
            limited: Limited::$limited,
            statuses: &[$($status),*],
        }),*];

        fn router_of(limits: &Limits) -> Router<App> {
            Router::new()$(.route($path, guarded(routes!(@method $method)($handler), Limited::$limited, limits)))*
        }
    };
    (@method GET) => { get };
    (@method POST) => { post };
    (@method PUT) => { put };
    (@method DELETE) => { delete };
}

routes! {
    POST   "/v1/users"                           Auth     accounts::register    => [201 400 408 409 413 415 422 429 500 503 507];
    POST   "/v1/users/reset"                     Auth     accounts::reset       => [200 400 401 408 413 415 422 429 500 503 507];
    POST   "/v1/session"                         Auth     sessions::log_in      => [200 400 401 408 409 413 415 422 429 500 503 507];
    DELETE "/v1/session"                         Auth     sessions::log_out     => [204 401 408 429 500 503 507];
    POST   "/v1/session/refresh"                 Auth     sessions::refresh     => [200 400 401 408 413 415 422 429 500 503 507];
    POST   "/v1/link-sessions"                   Auth     links::open           => [201 400 401 408 413 415 422 429 500 503 507];
    PUT    "/v1/link-sessions"                   Standard links::approve        => [204 400 401 403 404 408 409 413 429 500 503 507];
    GET    "/v1/link-sessions"                   Standard links::read           => [200 204 400 404 408 429 500 503];
    PUT    "/v1/link-sessions/{id}"              Standard links::approve        => [204 400 401 403 404 408 409 413 429 500 503 507];
    GET    "/v1/link-sessions/{id}"              Standard links::read           => [200 204 400 404 408 429 500 503];
    POST   "/v1/devices"                         Standard devices::link         => [201 400 403 408 413 415 422 429 500 503 507];
    GET    "/v1/devices"                         Standard devices::list         => [200 401 408 429 500 503];
    DELETE "/v1/devices/{deviceId}"              Standard devices::delete       => [204 400 401 403 404 408 429 500 503 507];
    POST   "/v1/keys"                            Standard keys::refill          => [204 400 401 408 413 415 422 429 500 503 507];
    GET    "/v1/keys"                            Standard keys::counts          => [200 401 408 429 500 503];
    GET    "/v1/keys/{userId}"                   Standard keys::bundles         => [200 400 401 404 408 429 500 503 507];
    GET    "/v1/keys/{userId}/devices/{deviceId}" Standard keys::bundle         => [200 400 401 404 408 429 500 503 507];
    POST   "/v1/messages"                        Standard messages::send        => [200 400 401 408 413 429 500 503 507];
    POST   "/v1/gateway/ticket"                  Standard gateway::ticket       => [201 401 408 429 500 503 507];
    GET    "/v1/gateway"                         Standard gateway::connect      => [101 400 401 408 426 429 500];
    PUT    "/v1/push-token"                      Standard push_token::put       => [204 400 401 408 413 415 422 429 500 503 507];
    DELETE "/v1/push-token"                      Standard push_token::delete    => [204 401 408 429 500 503 507];
    GET    "/v1/push/vapid-key"                  Standard push_token::vapid_key => [200 401 408 429 500 503];
    POST   "/v1/attachments"                     Bytes    attachments::upload   => [201 400 401 408 411 413 429 500 503 507];
    GET    "/v1/attachments/{id}"                Free     attachments::download => [200 206 304 400 401 404 408 416 500 503];
    GET    "/openapi.yaml"                       Free     document              => [200];
}

/// The API port.
pub fn router(app: App, limits: &Limits) -> Router {
    let router = router_of(limits)
        .fallback(|| async { ApiError::NotFound })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .layer(from_fn_with_state(app.clone(), request::bounded_in_time))
        .layer(from_fn(request::identified))
        .layer(from_fn_with_state(app.clone(), measured::measured));
    // Without a collector there is nothing in the way, not even a look whether there is one.
    let router = match app.traces.are_kept() {
        true => router.layer(from_fn_with_state(app.clone(), request::traced)),
        false => router,
    };
    router.with_state(app)
}

fn guarded(route: MethodRouter<App>, limited: Limited, limits: &Limits) -> MethodRouter<App> {
    match limited {
        Limited::Standard => route.layer(from_fn_with_state(limits.clone(), limits::standard)),
        Limited::Auth => route.layer(from_fn_with_state(limits.clone(), limits::auth)),
        Limited::Bytes | Limited::Free => route,
    }
}

/// `GET /openapi.yaml`
async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/yaml")], include_str!("../../openapi.yaml"))
}
