//! The management port: is the process alive, and is it ready for work?

use std::fmt::Display;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tracing::warn;

use crate::app::App;

/// The management port.
pub fn router(app: App) -> Router {
    Router::new().route("/livez", get(|| async {})).route("/readyz", get(ready)).with_state(app)
}

/// `GET /readyz`
#[derive(Debug, Serialize)]
pub struct Readiness {
    status: Check,
    database: Check,
    storage: Check,
    pubsub: Check,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Check {
    Ok,
    Error,
}

/// Not ready while the database, the storage or the wire doesn't answer, and from the start of shutdown on.
async fn ready(State(app): State<App>) -> impl IntoResponse {
    let health = &app.config.health;
    let (database, storage, pubsub) = tokio::join!(
        check("database", health.database_timeout, app.store.check()),
        check("storage", health.storage_timeout, app.blobs.check()),
        check("pubsub", health.pubsub_timeout, app.bus.check()),
    );
    let is_ready = [database, storage, pubsub].iter().all(|part| *part == Check::Ok) && !app.tasks.is_stopping();
    let (code, status) =
        if is_ready { (StatusCode::OK, Check::Ok) } else { (StatusCode::SERVICE_UNAVAILABLE, Check::Error) };
    (code, Json(Readiness { status, database, storage, pubsub }))
}

async fn check<E: Display>(part: &str, limit: Duration, look: impl Future<Output = Result<(), E>>) -> Check {
    match tokio::time::timeout(limit, look).await {
        Ok(Ok(())) => Check::Ok,
        Ok(Err(error)) => {
            warn!(part, %error, "a part of the server is not ready");
            Check::Error
        }
        Err(_) => {
            warn!(part, "a part of the server did not answer in time");
            Check::Error
        }
    }
}
