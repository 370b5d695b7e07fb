//! The way into the gateway: a ticket, then the handshake. The open socket is handed to `gateway`.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Query, State, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
use crate::api::extract::Caller;
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::gateway::{self, Features, Progress};
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
    ticket: Option<String>,
    /// What the client understands beyond the base contract: see [`Features`].
    #[serde(default)]
    features: String,
}

/// The WebSocket protocol that a client names beside its ticket when it can set no other header.
const PROTOCOL: &str = "obscura.v1";
/// What stands before the ticket in the list of protocols.
const TICKET_PROTOCOL: &str = "obscura.ticket.";

/// Where a ticket can stand. A proxy's log has the query and neither header.
enum Ticket {
    /// In the query or in `Authorization: Ticket …`.
    Plain(String),
    /// In `Sec-WebSocket-Protocol`: browsers can set nothing else.
    Protocol(String),
}

impl Ticket {
    fn find(query: ConnectQuery, headers: &HeaderMap) -> Option<Self> {
        // Clients of level 0.10.0 may send any `Authorization` beside the query, so that comes first.
        if let Some(ticket) = query.ticket {
            return Some(Self::Plain(ticket));
        }
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if let Some(ticket) = authorization.and_then(|value| value.strip_prefix("Ticket ")) {
            return Some(Self::Plain(ticket.to_owned()));
        }
        let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|list| list.to_str().ok());
        let mut protocols = lists.flat_map(|list| list.split(',')).map(str::trim);
        protocols.find_map(|name| name.strip_prefix(TICKET_PROTOCOL)).map(|ticket| Self::Protocol(ticket.to_owned()))
    }

    fn text(&self) -> &str {
        match self {
            Self::Plain(ticket) | Self::Protocol(ticket) => ticket,
        }
    }
}

/// `GET /v1/gateway`: redeems the ticket and opens the socket. A request that is no proper upgrade doesn't cost the
/// ticket.
pub async fn connect(
    State(app): State<App>,
    Extension(progress): Extension<Arc<Progress>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    query: Result<Query<ConnectQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(refused)?;
    let missing = || ApiError::bad_request("There is no ticket, neither in the query nor in a header");
    let Query(query) = query.map_err(|_| missing())?;
    let features = Features::named(&query.features);
    let ticket = Ticket::find(query, &headers).ok_or_else(missing)?;
    let (store, hash, now) = (app.store.clone(), OpaqueSecret::hash_of(ticket.text()), app.clock.now());
    let redeemed = app.tasks.finish(async move { store.redeem_ticket(&hash, now).await }).await;
    // The contract knows no other answer to a ticket that can't be looked up: the client asks for another one.
    // Its error is logged as those of other requests.
    let holder = redeemed.map_err(ApiError::from).ok().flatten().ok_or(ApiError::Unauthorized)?;
    // Browsers break off when none of the protocols that they name is confirmed; others get none.
    let upgrade = match ticket {
        Ticket::Plain(_) => upgrade,
        Ticket::Protocol(_) => upgrade.protocols([PROTOCOL]),
    };
    let attended = app.tasks.attended();
    Ok(gateway::limited(upgrade).on_upgrade(move |socket| async move {
        let _attended = attended;
        gateway::run(app, holder, features, socket, progress).await;
    }))
}

fn refused(rejection: WebSocketUpgradeRejection) -> ApiError {
    match rejection {
        WebSocketUpgradeRejection::ConnectionNotUpgradable(_) => ApiError::UpgradeRequired,
        _ => ApiError::bad_request("Expected a WebSocket handshake"),
    }
}
