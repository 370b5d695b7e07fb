//! A disk of ours that fills up: growth is refused early, and everything that makes room goes on.

use crate::harness::{TestServer, eventually, send_request};

/// More than any disk has.
const ENORMOUS: u64 = u64::MAX / 4;

#[tokio::test]
async fn a_full_disk_refuses_sends_and_uploads_and_lets_everything_else_go_on() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload = || alice.request("POST", "/v1/attachments").body("ciphertext");
    let id = upload().send().await.expect(201).json()["id"].as_str().unwrap().to_owned();
    alice.send_to(&bob, "waiting").await;

    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let message = send_request(&[(&bob, b"too much")]);
    let refused = alice.post_messages(uuid::Uuid::new_v4(), &message).await.expect(507);
    assert!(!refused.error().is_empty());
    upload().send().await.expect(507);

    alice.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200);
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    let database = server.database().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
    let linked = alice.link().await;
    alice.remove(&linked).await;
    alice.log_in().await;

    server.restart_with(|config| config.disk_reserve_bytes = 0).await;
    alice.send_to(&bob, "room again").await;
    upload().send().await.expect(201);
}

#[tokio::test]
async fn a_full_disk_does_not_change_the_answer_to_a_repeat() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (key, message) = (uuid::Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    alice.post_messages(key, &message).await.expect(200);
    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let repeated = alice.post_messages(key, &message).await.expect(200);
    assert_eq!(repeated.headers["idempotency-replayed"], "true");
}

#[tokio::test]
async fn a_refused_upload_is_not_read() {
    let server = TestServer::start_embedded_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let device = server.account().await;
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\n",
        device.token
    );
    let answer = crate::harness::raw_request(server.address(), head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 507 "), "{answer}");
    assert_eq!(server.database().await.number("SELECT count(*) FROM attachments").await, 0);
}
