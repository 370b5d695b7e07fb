//! The management port: is the process alive, is it ready for work, and what has it counted? It answers before anything
//! else is there.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use tracing::warn;

use crate::api::health::Health;
use crate::telemetry::metrics::Metrics;

/// The text format of Prometheus.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the management port answers.
pub fn router(health: Health, metrics: Metrics) -> Router {
    Router::new()
        .route("/livez", get(|| async {}))
        .route("/readyz", get(ready).with_state(health))
        .route("/metrics", get(page).with_state(metrics))
}

/// `GET /metrics`. A page that can't be made is a defect, and must not look like a server without metrics.
async fn page(State(metrics): State<Metrics>) -> impl IntoResponse {
    match metrics.page() {
        Ok(page) => ([(header::CONTENT_TYPE, PROMETHEUS)], page).into_response(),
        Err(error) => {
            warn!(%error, "the page of metrics could not be made");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn ready(State(health): State<Health>) -> impl IntoResponse {
    let readiness = health.check_all().await;
    let code = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness))
}
