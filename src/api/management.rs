//! The management port: is the process alive, and is it ready for work? It answers before anything else is there.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};

use crate::api::health::Health;

/// The management port.
pub fn router(health: Health) -> Router {
    Router::new().route("/livez", get(|| async {})).route("/readyz", get(ready)).with_state(health)
}

async fn ready(State(health): State<Health>) -> impl IntoResponse {
    let readiness = health.look().await;
    let code = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness))
}
