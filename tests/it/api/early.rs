//! Answers that are given before the body was read: they arrive all the same, and the connection ends within bounds.

use std::net::SocketAddr;

use obscura_server::limits::LimitSubject;
use obscura_server::model::ids::UserId;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Device, TestServer, eventually, raw_answer, send_request, within};
use crate::metrics::page::Page;

const MIB: usize = 1 << 20;
const LARGE: usize = 5 * MIB;

/// A request head: method and path, and headers that each end with a line break.
fn head(request: &str, headers: &str) -> Vec<u8> {
    format!("{request} HTTP/1.1\r\nhost: test\r\n{headers}\r\n").into_bytes()
}

/// Sends everything before it reads anything, as simple clients do, and answers with the status.
async fn status(address: SocketAddr, head: &[u8], body: usize) -> std::io::Result<u16> {
    status_behind(address, head, &vec![b'0'; body]).await
}

/// The same with this body.
async fn status_behind(address: SocketAddr, head: &[u8], body: &[u8]) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(head).await?;
    stream.write_all(body).await?;
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    Ok(answer[9..12].parse().unwrap_or_else(|_| panic!("{answer}")))
}

/// The head of a request of this device whose body has so many bytes. It names a link session, too, which most routes pass over.
fn head_of(device: &Device, request: &str, body: usize) -> Vec<u8> {
    let token = &device.token;
    let headers = format!("authorization: Bearer {token}\r\nobscura-link-id: unknown\r\ncontent-length: {body}\r\n");
    head(request, &headers)
}

/// Requests with a body of 5 MiB that are refused before it is read, and with what.
fn refused(alice: &Device) -> Vec<(u16, Vec<u8>)> {
    let length = format!("content-length: {LARGE}\r\n");
    let json = format!("content-type: application/json\r\n{length}");
    let with_token = format!("authorization: Bearer {}\r\n", alice.token);
    let mut refused = vec![
        (401, head("POST /v1/attachments", &length)),
        (401, head("POST /v1/messages", &length)),
        (401, head("POST /v1/keys", &json)),
        (401, head("PUT /v1/push-token", &json)),
        (401, head("PUT /v1/link-sessions/unknown", &length)),
        (404, head("POST /v1/nothing", &length)),
        (405, head("PUT /v1/users", &json)),
        (411, head("POST /v1/attachments", &format!("{with_token}transfer-encoding: chunked\r\n"))),
        (413, head("POST /v1/messages", &format!("{with_token}{length}"))),
        (413, head("PUT /v1/link-sessions/unknown", &format!("{with_token}{length}"))),
    ];
    for path in ["/v1/users", "/v1/session", "/v1/session/refresh", "/v1/users/reset", "/v1/devices"] {
        refused.push((413, head(&format!("POST {path}"), &json)));
        refused.push((415, head(&format!("POST {path}"), &length)));
    }
    refused
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_before_a_large_body_is_read_arrives_every_time() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for (expected, head) in refused(&alice) {
        for _ in 0..3 {
            // A chunked body begins with a size; one that is never used up by what follows.
            let head = match expected {
                411 => [&head[..], b"7fffffff\r\n"].concat(),
                _ => head.clone(),
            };
            let status = within("an answer", status(server.address(), &head, LARGE)).await;
            assert_eq!(status.ok(), Some(expected), "{}", String::from_utf8_lossy(&head));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_may_not_approve_hears_so_behind_the_parcel_it_sends() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let linked = alice.link().await;
    for path in ["PUT /v1/link-sessions/unknown", "PUT /v1/link-sessions"] {
        // A body that no route takes gets 413, from this device as well.
        for (bytes, expected) in [(60 << 10, 403), (2 * MIB, 403), (LARGE, 413)] {
            let head = head_of(&linked, path, bytes);
            for _ in 0..3 {
                let status = within("an answer", status(server.address(), &head, bytes)).await;
                assert_eq!(status.ok(), Some(expected), "{path} with {bytes} bytes");
            }
        }
    }
}

/// Repeats a request of `LARGE` bytes until its rate has refused it three times. All other answers are `otherwise`.
async fn until_refused_for_its_rate(server: &TestServer, head: &[u8], otherwise: u16) {
    let mut refused = 0;
    for _ in 0..60 {
        match within("an answer", status(server.address(), head, LARGE)).await {
            Ok(429) => refused += 1,
            other => assert_eq!(other.ok(), Some(otherwise), "{}", String::from_utf8_lossy(head)),
        }
        if refused == 3 {
            return;
        }
    }
    panic!("no rate refuses this: {}", String::from_utf8_lossy(head));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_above_a_rate_hears_so_behind_five_megabytes() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    server
        .restart_with(|config| {
            (config.rate_limits.auth_per_second, config.rate_limits.auth_burst) = (1, 1);
            (config.accounts.uploads_per_second, config.accounts.uploads_burst) = (1, 1);
        })
        .await;
    let words = format!("content-type: application/json\r\ncontent-length: {LARGE}\r\n");
    for path in ["/v1/session", "/v1/session/refresh", "/v1/users", "/v1/users/reset", "/v1/link-sessions"] {
        until_refused_for_its_rate(&server, &head(&format!("POST {path}"), &words), 413).await;
    }
    until_refused_for_its_rate(&server, &head_of(&alice, "POST /v1/attachments", LARGE), 201).await;

    server.restart_with(|config| (config.rate_limits.per_second, config.rate_limits.burst) = (1, 1)).await;
    for path in ["/v1/devices", "/v1/keys"] {
        let otherwise = if path == "/v1/keys" { 401 } else { 413 };
        until_refused_for_its_rate(&server, &head(&format!("POST {path}"), &words), otherwise).await;
    }
    until_refused_for_its_rate(&server, &head_of(&alice, "POST /v1/messages", LARGE), 413).await;
    until_refused_for_its_rate(&server, &head_of(&alice, "PUT /v1/link-sessions", LARGE), 413).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_which_there_is_no_space_hears_so_behind_its_body() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    let bob = server.account().await;
    server.restart_with(|config| config.database.max_size_bytes = 1).await;
    let upload = head_of(&alice, "POST /v1/attachments", LARGE);
    let message = send_request(&[(&bob, &[7; 1_900_000])]).encode_to_vec();
    for _ in 0..3 {
        let refused = within("an answer", status(server.address(), &upload, LARGE)).await;
        assert_eq!(refused.ok(), Some(507), "an upload");
        let headers = format!(
            "authorization: Bearer {}\r\nidempotency-key: {}\r\ncontent-length: {}\r\n",
            alice.token,
            uuid::Uuid::new_v4(),
            message.len()
        );
        let send = head("POST /v1/messages", &headers);
        let refused = within("an answer", status_behind(server.address(), &send, &message)).await;
        assert_eq!(refused.ok(), Some(507), "a send");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_for_which_there_is_no_memory_hears_so_behind_its_body() {
    /// As many of the largest bodies as one account has memory for.
    const SHARE: usize = 8;
    const BODY: usize = 1_900_000;
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut held = Vec::new();
    for _ in 0..SHARE {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(&head_of(&alice, "POST /v1/messages", 2 * MIB)).await.unwrap();
        within("the server to read", stream.write_all(&vec![0; 2 * MIB - 1])).await.unwrap();
        held.push(stream);
    }
    let limits = &server.server().app().limits;
    let bodies = limits.bodies(LimitSubject::Account(UserId::parse(&alice.user.to_string()).unwrap()));
    eventually("the server to have read them", async || bodies.taken() as usize == SHARE * 2 * MIB / 1024).await;
    for _ in 0..3 {
        let head = head_of(&alice, "POST /v1/messages", BODY);
        let refused = within("an answer", status(server.address(), &head, BODY)).await;
        assert_eq!(refused.ok(), Some(503));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upload_of_fifty_megabytes_hears_why() {
    let server = TestServer::start_with(|config| config.attachments.max_size_bytes = 1 << 20).await;
    let alice = server.account().await;
    let length = 52 * MIB;
    let headers = format!("authorization: Bearer {}\r\ncontent-length: {length}\r\n", alice.token);
    let status = within("an answer", status(server.address(), &head("POST /v1/attachments", &headers), length)).await;
    assert_eq!(status.ok(), Some(413));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_hears_so_behind_five_megabytes() {
    let server = TestServer::start().await;
    let status = within("an answer", status(server.address(), b"this is not HTTP at all\r\n\r\n", LARGE)).await;
    assert_eq!(status.ok(), Some(400));
}

#[tokio::test]
async fn a_body_that_waits_to_be_asked_for_is_not_asked_for_by_a_refusal() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let headers = format!("expect: 100-continue\r\ncontent-length: {LARGE}\r\n");
    stream.write_all(&head("POST /v1/attachments", &headers)).await.unwrap();
    let mut answer = String::new();
    within("the server to close", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
}

#[tokio::test]
async fn a_connection_outlives_a_refusal_whose_body_was_small() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    for _ in 0..3 {
        let request = [&head("POST /v1/messages", "content-length: 1000\r\n")[..], &[7; 1000]].concat();
        let answer = raw_answer(&mut stream, &request).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_on_sending_behind_its_answer_is_cut_off() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = head("POST /v1/messages", "content-length: 1000000000000\r\n");
    stream.write_all(&request).await.unwrap();
    let mut sent = 0;
    while within("the server to take bytes or to close", stream.write_all(&[0; MIB])).await.is_ok() {
        sent += MIB;
        assert!(sent < 100 * MIB, "the server goes on reading");
    }
    assert!(sent > 50 * MIB, "{sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_can_hold_few_connections_behind_their_answers_and_none_for_good() {
    const CONNECTIONS: usize = 40;
    const READ_ON: f64 = 32.0;
    let server = TestServer::start_with(|config| config.server.max_connections_per_address = 64).await;
    let request = head("POST /v1/messages", "content-length: 100000000\r\n");
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        // Not 127.0.0.1, which is trusted as a proxy and may hold as many as there are.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(server.address()).await.unwrap();
        stream.write_all(&request).await.unwrap();
        held.push(stream);
    }
    let mut ended = 0;
    for stream in &mut held {
        let mut answer = String::new();
        within("the answer", stream.read_to_string(&mut answer)).await.unwrap();
        ended += usize::from(answer.starts_with("HTTP/1.1 401 "));
    }
    assert_eq!(ended, CONNECTIONS);
    // All of them are still open on the client's side, and the server reads on the allowed ones only.
    let open = async || Page::of(&server).await.sum("obscura_listener_connections", &[("port", "api")]);
    let read_on = open().await;
    assert!(read_on <= READ_ON, "{read_on} connections are read on");
    // The silent ones are given up.
    eventually("the server to give them up", async || open().await == 0.0).await;
}

/// Caddy, for one, closes its client's connection when an answer comes early.
#[tokio::test]
async fn behind_a_proxy_a_refusal_comes_after_the_body_and_the_connection_goes_on() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let headers = format!("x-forwarded-for: 192.0.2.7\r\ncontent-length: {MIB}\r\n");
    for _ in 0..2 {
        stream.write_all(&head("POST /v1/attachments", &headers)).await.unwrap();
        stream.write_all(&vec![7; MIB - 1]).await.unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(300), stream.read_u8()).await;
        assert!(early.is_err(), "an answer came before the body was there");
        let answer = raw_answer(&mut stream, b"7").await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
        assert!(!answer.to_lowercase().contains("connection: close"), "{answer}");
    }
}
