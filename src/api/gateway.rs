//! The way into the gateway: a ticket, then the handshake. The open socket is handed to `gateway`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::{Extension, Json};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tracing::debug;
use tungstenite::error::{Error, ProtocolError};
use tungstenite::handshake::server::create_response_with_body;

use crate::api::clients::AdmittedRequest;
use crate::api::error::ApiError;
use crate::api::extract::Caller;
use crate::app::App;
use crate::auth::tokens::OpaqueSecret;
use crate::gateway::{self, ConnectionProgress, Features};
use crate::limits::LimitSubject;
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
    if !app.tasks.run_to_end(async move { store.issue_ticket(new).await }).await? {
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
        let ticket = protocols(headers).find_map(|name| name.strip_prefix(TICKET_PROTOCOL));
        ticket.map(|ticket| Self::Protocol(ticket.to_owned()))
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
    Extension(progress): Extension<Arc<ConnectionProgress>>,
    Extension(admitted): Extension<AdmittedRequest>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut request = request.map(drop);
    let mut response = create_response_with_body(&request, Body::empty).map_err(refused)?;
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().ok_or(ApiError::UpgradeRequired)?;
    let missing = || ApiError::bad_request("There is no ticket, neither in the query nor in a header");
    let Query(query) = Query::<ConnectQuery>::try_from_uri(request.uri()).map_err(|_| missing())?;
    let features = Features::named(&query.features);
    let ticket = Ticket::find(query, request.headers()).ok_or_else(missing)?;
    let (store, hash, now) = (app.store.clone(), OpaqueSecret::hash_of(ticket.text()), app.clock.now());
    let redeemed = app.tasks.run_to_end(async move { store.redeem_ticket(&hash, now).await }).await;
    // The contract knows no other answer to a ticket that can't be looked up: the client asks for another one.
    // Its error is logged as those of other requests.
    let holder = redeemed.map_err(ApiError::from).ok().flatten().ok_or(ApiError::Unauthorized)?;
    // Browsers break off when none of the protocols that they name is confirmed; others get none.
    if matches!(ticket, Ticket::Protocol(_)) && protocols(request.headers()).any(|name| name == PROTOCOL) {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    let subject = AdmittedRequest { subject: LimitSubject::Account(holder.user), ..admitted }.limit_subject();
    app.tasks.clone().spawn_tracked(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let connection = Box::new(TokioIo::new(upgraded));
                gateway::run(app, (holder, subject), features, connection, progress).await;
            }
            Err(error) => debug!(%error, "a connection ended before it became a socket"),
        }
    });
    Ok(response)
}

/// The entries of all lists of protocols.
fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(str::trim)
}

fn refused(error: Error) -> ApiError {
    match error {
        Error::Protocol(ProtocolError::WrongHttpVersion) => ApiError::UpgradeRequired,
        _ => ApiError::bad_request("Expected a WebSocket handshake"),
    }
}
