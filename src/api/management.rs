//! The management port: is the process alive, and is it ready for work?

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::disk::Room;

/// The text format of Prometheus.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The management port.
pub fn router(app: App) -> Router {
    let state = Management { app, told: Arc::default() };
    Router::new()
        .route("/livez", get(|| async {}))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(state)
}

#[derive(Clone)]
struct Management {
    app: App,
    told: Arc<Told>,
}

/// Which parts are known to be away, as the log has it: probes come all the time, and each outage is told of once.
#[derive(Default)]
struct Told {
    database: AtomicBool,
    storage: AtomicBool,
    pubsub: AtomicBool,
}

/// `GET /metrics`, in the text format of Prometheus.
async fn metrics(State(Management { app, .. }): State<Management>) -> impl IntoResponse {
    match app.metrics.page() {
        Ok(page) => ([(header::CONTENT_TYPE, PROMETHEUS)], page).into_response(),
        Err(error) => {
            warn!(%error, "the page of metrics could not be made");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// `GET /readyz`
#[derive(Debug, Serialize)]
pub struct Readiness {
    status: Check,
    database: Check,
    storage: Check,
    pubsub: Check,
    /// Only while something is refused for lack of room. The node is ready all the same: acks make room again.
    #[serde(skip_serializing_if = "Option::is_none")]
    space: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Check {
    Ok,
    Error,
}

/// Not ready while the database, the storage or the wire doesn't answer, and from the start of shutdown on.
async fn ready(State(Management { app, told }): State<Management>) -> impl IntoResponse {
    let health = &app.config.health;
    let (database, storage, pubsub) = tokio::join!(
        check("database", &told.database, health.database_timeout, app.store.check()),
        check("storage", &told.storage, health.storage_timeout, app.blobs.check()),
        check("pubsub", &told.pubsub, health.pubsub_timeout, app.bus.check()),
    );
    let is_ready = [database, storage, pubsub].iter().all(|part| *part == Check::Ok) && !app.tasks.is_stopping();
    let (code, status) =
        if is_ready { (StatusCode::OK, Check::Ok) } else { (StatusCode::SERVICE_UNAVAILABLE, Check::Error) };
    let space = match app.disk.room() {
        Room::Enough => None,
        Room::Low => Some("low"),
        Room::Full => Some("full"),
    };
    (code, Json(Readiness { status, database, storage, pubsub, space }))
}

async fn check<E: Display>(
    part: &str,
    told: &AtomicBool,
    limit: Duration,
    look: impl Future<Output = Result<(), E>>,
) -> Check {
    let error = match tokio::time::timeout(limit, look).await {
        Ok(Ok(())) => {
            if told.swap(false, Ordering::Relaxed) {
                info!(part, "a part of the server is ready again");
            }
            return Check::Ok;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    if told.swap(true, Ordering::Relaxed) {
        debug!(part, %error, "a part of the server is still not ready");
    } else {
        warn!(part, %error, "a part of the server is not ready");
    }
    Check::Error
}
