//! The way into the gateway: a ticket, then the handshake. The open socket is handed to `gateway`.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Query, State, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
use crate::api::extract::Caller;
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::gateway::{self, Progress};
use crate::store::NewTicket;

/// `POST /v1/gateway/ticket`
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TicketResponse {
    /// Good for one handshake.
    pub ticket: String,
}

/// `POST /v1/gateway/ticket`: a ticket that opens one socket for the calling device.
pub async fn ticket(State(app): State<App>, caller: Caller) -> Result<(StatusCode, Json<TicketResponse>), ApiError> {
    let ticket = OpaqueSecret::random();
    let (device, token_expires_at) = (caller.no, caller.token_expires_at);
    let expires_at = app.clock.now() + app.config.gateway.ticket_lifetime;
    let new = NewTicket { hash: ticket.hash(), device, token_expires_at, expires_at };
    // Others may share the transaction, so it doesn't end with this request.
    let store = app.store.clone();
    if !app.tasks.finish(async move { store.issue_ticket(new).await }).await? {
        return Err(ApiError::Unauthorized);
    }
    Ok((StatusCode::CREATED, Json(TicketResponse { ticket: ticket.text().to_owned() })))
}

/// The query of `GET /v1/gateway`.
#[derive(Deserialize)]
pub struct ConnectQuery {
    ticket: String,
}

/// `GET /v1/gateway`: redeems the ticket and opens the socket. A request that is no proper upgrade doesn't cost the
/// ticket.
pub async fn connect(
    State(app): State<App>,
    Extension(progress): Extension<Arc<Progress>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    query: Result<Query<ConnectQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(refused)?;
    let Ok(Query(query)) = query else { return Err(ApiError::bad_request("The ticket parameter is missing")) };
    let (store, hash, now) = (app.store.clone(), OpaqueSecret::hash_of(&query.ticket), app.clock.now());
    let redeemed = app.tasks.finish(async move { store.redeem_ticket(&hash, now).await }).await;
    // The contract knows no other answer to a ticket that can't be looked up: the client asks for another one.
    // Its error is logged as those of other requests.
    let holder = redeemed.map_err(ApiError::from).ok().flatten().ok_or(ApiError::Unauthorized)?;
    let attended = app.tasks.attended();
    Ok(gateway::limited(upgrade).on_upgrade(move |socket| async move {
        let _attended = attended;
        gateway::run(app, holder, socket, progress).await;
    }))
}

fn refused(rejection: WebSocketUpgradeRejection) -> ApiError {
    match rejection {
        WebSocketUpgradeRejection::ConnectionNotUpgradable(_) => ApiError::UpgradeRequired,
        _ => ApiError::bad_request("Expected a WebSocket handshake"),
    }
}
