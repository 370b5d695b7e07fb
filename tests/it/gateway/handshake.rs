//! Tickets and the handshake.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use hyper_util::rt::TokioIo;
use obscura_server::app::App;
use obscura_server::gateway::{self, Features};
use obscura_server::limits::LimitSubject;
use obscura_server::model::ids::DeviceId;
use obscura_server::store::{DeviceAuth, SessionHolder};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use uuid::Uuid;

use crate::harness::{
    Event, Keys, RawSocket, Socket, TestServer, opcode, raw_answer, raw_request, send_request, within,
};

/// A handshake by hand, with these header lines instead of the usual ones, on a connection that is closed afterwards.
async fn handshake(server: &TestServer, path: &str, headers: &str, version: &str) -> String {
    raw_request(server.address(), format!("GET {path} HTTP/{version}\r\nhost: test\r\n{headers}\r\n").as_bytes()).await
}

const UPGRADE: &str = "connection: upgrade\r\nupgrade: websocket\r\n";
const KEY: &str = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const VERSION: &str = "sec-websocket-version: 13\r\n";

fn path(ticket: &str) -> String {
    format!("/v1/gateway?ticket={ticket}")
}

#[tokio::test]
async fn a_ticket_opens_one_socket() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let mut socket = Socket::open(server.address(), &ticket).await.ok().unwrap();
    assert_eq!(socket.until_pong().await, []);
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    assert_eq!(socket.until_pong().await, [], "the socket it opened is not disturbed");
}

#[tokio::test]
async fn several_tickets_may_be_outstanding() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let tickets = [alice.ticket().await, alice.ticket().await, alice.ticket().await];
    for ticket in tickets.iter().rev() {
        assert!(Socket::open(server.address(), ticket).await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twenty_attempts_with_one_ticket_exactly_one_succeeds() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for _ in 0..3 {
        let (address, ticket) = (server.address(), alice.ticket().await);
        let attempts: Vec<_> = (0..20)
            .map(|_| {
                let ticket = ticket.clone();
                tokio::spawn(async move { Socket::open(address, &ticket).await.map(drop) })
            })
            .collect();
        let mut opened = 0;
        for attempt in attempts {
            match within("a handshake", attempt).await.unwrap() {
                Ok(()) => opened += 1,
                Err(status) => assert_eq!(status, 401),
            }
        }
        assert_eq!(opened, 1);
    }
}

#[tokio::test]
async fn a_ticket_is_good_for_thirty_seconds() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let (early, late) = (alice.ticket().await, alice.ticket().await);
    server.clock.advance(Duration::from_secs(28));
    assert!(Socket::open(server.address(), &early).await.is_ok());
    server.clock.advance(Duration::from_secs(3));
    assert_eq!(Socket::open(server.address(), &late).await.err(), Some(401));
}

#[tokio::test]
async fn a_ticket_that_was_used_stays_used_after_a_restart_and_an_unused_one_stays_good() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    let (used, unused) = (alice.ticket().await, alice.ticket().await);
    Socket::open(server.address(), &used).await.ok().unwrap().close().await;
    server.restart().await;
    assert_eq!(Socket::open(server.address(), &used).await.err(), Some(401));
    assert!(Socket::open(server.address(), &unused).await.is_ok());
}

#[tokio::test]
async fn unknown_and_missing_tickets_are_refused() {
    let server = TestServer::start().await;
    for ticket in ["", "x", "5b1c3f6e-6f0e-4a57-9b2c-8d7e6f5a4b3c", "%00", "%ff", &"a".repeat(43), &"a".repeat(4000)] {
        let status = Socket::open(server.address(), ticket).await.err();
        assert!(status == Some(401) || (ticket == "%ff" && status == Some(400)), "{ticket}: {status:?}");
    }
    assert_eq!(Socket::open_path(server.address(), "/v1/gateway").await.err(), Some(400));
    assert_eq!(Socket::open_path(server.address(), "/v1/gateway?other=1").await.err(), Some(400));
}

#[tokio::test]
async fn other_query_members_and_the_authorization_header_are_not_looked_at() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let path = format!("/v1/gateway?device=1&ticket={ticket}&token=%22");
    assert!(Socket::open_path(server.address(), &path).await.is_ok());

    let headers =
        format!("connection: upgrade, close\r\nupgrade: websocket\r\n{KEY}{VERSION}authorization: Bearer forged\r\n");
    let wrong = handshake(&server, "/v1/gateway?ticket=unknown", &headers, "1.1").await;
    assert!(wrong.starts_with("HTTP/1.1 401 "), "{wrong}");
}

#[tokio::test]
async fn what_is_no_handshake_gets_400_and_leaves_the_ticket_good() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let close = "connection: close\r\n";
    let wrong = [
        close.to_owned(),
        format!("{close}upgrade: websocket\r\n{KEY}{VERSION}"),
        format!("connection: upgrade, close\r\n{KEY}{VERSION}"),
        format!("connection: upgrade, close\r\nupgrade: h2c\r\n{KEY}{VERSION}"),
        format!("connection: upgrade, close\r\nupgrade: websocket\r\n{VERSION}"),
        format!("connection: upgrade, close\r\nupgrade: websocket\r\n{KEY}"),
        format!("connection: upgrade, close\r\nupgrade: websocket\r\n{KEY}sec-websocket-version: 8\r\n"),
    ];
    for headers in &wrong {
        for path in [&path(&ticket), "/v1/gateway", "/v1/gateway?ticket=unknown"] {
            let answer = handshake(&server, path, headers, "1.1").await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{headers}{answer}");
            assert!(answer.to_lowercase().contains("x-request-id: "), "{answer}");
        }
    }
    alice.client.post(&path(&ticket)).send().await.expect(405);
    alice.client.get(&path(&ticket)).send().await.expect(400);
    assert!(Socket::open(server.address(), &ticket).await.is_ok());
}

#[tokio::test]
async fn a_connection_that_cannot_be_upgraded_gets_426_and_leaves_the_ticket_good() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let answer = handshake(&server, &path(&ticket), &format!("{UPGRADE}{KEY}{VERSION}"), "1.0").await;
    assert!(answer.starts_with("HTTP/1.0 426 ") || answer.starts_with("HTTP/1.1 426 "), "{answer}");
    assert!(Socket::open(server.address(), &ticket).await.is_ok());
}

#[tokio::test]
async fn no_subprotocol_is_chosen_and_no_extension_used() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let offers = "sec-websocket-protocol: chat\r\nsec-websocket-extensions: permessage-deflate\r\n";
    let head = format!("GET {} HTTP/1.1\r\nhost: test\r\n{UPGRADE}{KEY}{VERSION}{offers}\r\n", path(&ticket));
    let close_frame = [0x88, 0x80, 0, 0, 0, 0]; // so that the connection ends
    let request = [head.as_bytes(), &close_frame].concat();
    let answer = raw_request(server.address(), &request).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 101 "), "{answer}");
    assert!(answer.contains("x-request-id: "), "{answer}");
    assert!(!answer.contains("sec-websocket-protocol") && !answer.contains("sec-websocket-extensions"), "{answer}");
}

#[tokio::test]
async fn tickets_of_a_device_that_is_gone_or_logged_out_are_void() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let tablet = alice.link().await;
    let ticket = tablet.ticket().await;
    alice.remove(&tablet).await;
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));

    let ticket = alice.ticket().await;
    alice.log_out().await;
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    let alice = alice.log_in().await;
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401), "a new log-in does not bring it back");

    let ticket = alice.ticket().await;
    alice.reset().await;
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
}

#[tokio::test]
async fn a_handshake_whose_ticket_cannot_be_looked_up_gets_401() {
    let server = TestServer::start_with(crate::harness::impatient).await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let held = server.database().await.hold_write().await;
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    held.release().await;
}

/// Removes a device while it shakes hands, in any order the scheduler likes.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_removed_during_its_handshake_keeps_no_socket() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for round in 0..12 {
        let tablet = alice.link_with(Keys { one_time: 0, pq_one_time: None }).await;
        let (address, ticket) = (server.address(), tablet.ticket().await);
        let opening = tokio::spawn(async move { Socket::open(address, &ticket).await });
        if round % 3 > 0 {
            tokio::task::yield_now().await;
        }
        let (opened, ()) = tokio::join!(opening, alice.remove(&tablet));
        match opened.unwrap() {
            Err(status) => assert_eq!(status, 401),
            Ok(mut socket) => {
                let rest = within("the socket to be closed", socket.until_end()).await;
                assert!(rest.contains(&Event::Close(None)), "{rest:?}");
            }
        }
    }
}

/// The moment between the redeemed ticket and the session's first look, held open.
#[tokio::test]
async fn a_session_checks_the_auth_of_its_device_first() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (removed, logged_out) = (alice.link().await, alice.link().await);
    let message = send_request(&[(&removed, b"sealed"), (&logged_out, b"sealed"), (&alice, b"sealed")]);
    bob.post_messages(Uuid::new_v4(), &message).await.expect(200);
    let app = server.server().app().clone();
    for device in [&removed, &logged_out] {
        let id = DeviceId::from_bytes(device.id.as_bytes()).unwrap();
        let device_auth = app.store.device_auth(id).await.unwrap().unwrap();
        let DeviceAuth { no, user, tokens_revoked_until, .. } = device_auth;
        let holder = SessionHolder { user, device: id, no, tokens_revoked_until };
        if device.id == removed.id {
            alice.remove(device).await;
        } else {
            device.log_out().await;
        }
        let mut socket = RawSocket::open(serve_session(app.clone(), holder).await, "redeemed").await;
        assert_eq!(socket.receive().await, Some((opcode::CLOSE, Vec::new())));
        assert_eq!(socket.receive().await, None);
    }
}

/// A port at which every socket is a session of this device.
async fn serve_session(app: App, holder: SessionHolder) -> SocketAddr {
    let connect = move |request: Request| async move {
        let mut request = request.map(drop);
        let response = create_response_with_body(&request, Body::empty).unwrap();
        let (upgrade, subject) = (hyper::upgrade::on(&mut request), LimitSubject::Account(holder.user));
        tokio::spawn(async move {
            let connection = Box::new(TokioIo::new(upgrade.await.unwrap()));
            gateway::run(app, (holder, subject), Features::default(), connection, Arc::default()).await;
        });
        response
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/v1/gateway", axum::routing::get(connect));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

#[tokio::test]
async fn the_first_bytes_after_the_handshake_may_come_with_it() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    socket.send(opcode::PING, b"early").await.unwrap();
    assert_eq!(socket.receive().await, Some((opcode::PONG, b"early".to_vec())));
}

#[tokio::test]
async fn a_ticket_may_stand_in_a_header_where_no_log_of_a_proxy_has_it() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let upgraded = async |lines: &str| {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let request = format!("GET /v1/gateway HTTP/1.1\r\nhost: test\r\n{UPGRADE}{KEY}{VERSION}{lines}\r\n");
        raw_answer(&mut stream, request.as_bytes()).await.to_lowercase()
    };
    let ticket = alice.ticket().await;
    let answer = upgraded(&format!("authorization: Ticket {ticket}\r\n")).await;
    assert!(answer.starts_with("http/1.1 101 ") && !answer.contains("sec-websocket-protocol"), "{answer}");
    let again = upgraded(&format!("authorization: Ticket {ticket}\r\n")).await;
    assert!(again.starts_with("http/1.1 401 "), "{again}");

    // A browser can name protocols and nothing else, and breaks off unless one of them is confirmed.
    let ticket = alice.ticket().await;
    let answer = upgraded(&format!("sec-websocket-protocol: obscura.v1, obscura.ticket.{ticket}\r\n")).await;
    assert!(answer.starts_with("http/1.1 101 "), "{answer}");
    assert!(answer.contains("sec-websocket-protocol: obscura.v1\r\n") && !answer.contains("ticket"), "{answer}");

    for none in ["", "authorization: Bearer x\r\n", "sec-websocket-protocol: obscura.v1\r\n"] {
        let answer = upgraded(none).await;
        assert!(answer.starts_with("http/1.1 400 "), "{answer}");
    }
}

#[tokio::test]
async fn beside_a_ticket_in_the_query_no_header_is_looked_at() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ticket = alice.ticket().await;
    let headers = "authorization: Ticket nonsense\r\nsec-websocket-protocol: chat\r\n";
    let request = format!("GET {} HTTP/1.1\r\nhost: test\r\n{UPGRADE}{KEY}{VERSION}{headers}\r\n", path(&ticket));
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let answer = raw_answer(&mut stream, request.as_bytes()).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 101 ") && !answer.contains("sec-websocket-protocol"), "{answer}");
}
