//! What some options change, as far as no other test shows it. `config/effects.rs` lists where each is shown.

use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::{
    Binary, Database, Device, Event, S3, S3Proxy, Socket, TestServer, deployment, eventually, free_port, raw_request,
    send_request,
};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_hours(24);

async fn people(server: &TestServer) -> (Device, Device) {
    (server.account().await, server.account().await)
}

#[tokio::test]
async fn both_ports_are_where_the_options_say() {
    let folder = tempfile::tempdir().unwrap();
    let (api, management) = (free_port(), free_port());
    let mut options = deployment::options(folder.path()).await;
    options.extend(["--server-host=127.0.0.2".to_owned(), "--mgmt-host=127.0.0.2".to_owned()]);
    options.extend([format!("--server-port={api}"), format!("--mgmt-port={management}")]);
    let _server = Binary::begin(&options.iter().map(String::as_str).collect::<Vec<_>>());
    let answer = async |port: u16| {
        let request = "GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        eventually("the port to be open", async || TcpStream::connect(("127.0.0.2", port)).await.is_ok()).await;
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "{port} is open at another address");
        raw_request(([127, 0, 0, 2], port).into(), request.as_bytes()).await
    };
    assert!(answer(management).await.starts_with("HTTP/1.1 200 "));
    assert!(answer(api).await.starts_with("HTTP/1.1 404 "));
}

#[tokio::test]
async fn log_lines_are_objects_when_they_are_for_machines() {
    for (format, is_for_machines) in [("--log-format=json", true), ("--log-format=text", false)] {
        let folder = tempfile::tempdir().unwrap();
        let server = Binary::start(folder.path(), &[format]).await;
        let says = "the server is ready";
        eventually("the line to be written", async || server.output().contains(says)).await;
        for line in server.output().lines().filter(|line| line.contains(says)) {
            let object = serde_json::from_str::<serde_json::Value>(line).is_ok_and(|line| line.is_object());
            assert_eq!(object, is_for_machines, "{line}");
        }
    }
}

#[tokio::test]
async fn an_access_token_lives_as_long_as_the_option_says() {
    let server = TestServer::start_with(|config| config.auth.access_token_lifetime = Duration::from_hours(2)).await;
    let alice = server.account().await;
    server.clock.advance(Duration::from_hours(2));
    alice.request("GET", "/v1/devices").send().await.expect(200);
    // The leeway for clocks that differ.
    server.clock.advance(Duration::from_secs(61));
    alice.request("GET", "/v1/devices").send().await.expect(401);
}

#[tokio::test]
async fn a_ticket_lives_as_long_as_the_option_says() {
    let server = TestServer::start_with(|config| config.gateway.ticket_lifetime = Duration::from_mins(5)).await;
    let alice = server.account().await;
    let (early, late) = (alice.ticket().await, alice.ticket().await);
    server.clock.advance(Duration::from_mins(4));
    assert!(Socket::open(server.address(), &early).await.is_ok());
    server.clock.advance(Duration::from_mins(2));
    assert_eq!(Socket::open(server.address(), &late).await.err(), Some(401));
}

#[tokio::test]
async fn a_message_lives_as_many_days_as_the_option_says() {
    let server = TestServer::start_with(|config| config.retention = 2 * DAY).await;
    let (alice, bob) = people(&server).await;
    alice.send_to(&bob, "old").await;
    server.clock.advance(2 * DAY - Duration::from_mins(1));
    let bob = bob.log_in().await;
    bob.connect().await.expect_message("old").await;
    server.clock.advance(Duration::from_mins(2));
    alice.log_in().await.send_to(&bob, "new").await;
    bob.connect().await.expect_message("new").await;
}

#[tokio::test]
async fn a_send_has_as_many_recipients_and_submissions_as_the_option_says() {
    let server = TestServer::start_with(|config| config.messaging.send_batch_limit = 2).await;
    let (alice, bob) = people(&server).await;
    let (carol, dave) = people(&server).await;
    let send =
        async |messages: &[(&Device, &[u8])]| alice.post_messages(Uuid::new_v4(), &send_request(messages)).await.status;
    assert_eq!(send(&[(&bob, b"x"), (&carol, b"x")]).await, 200);
    assert_eq!(send(&[(&bob, b"x"), (&carol, b"x"), (&dave, b"x")]).await, 413);
    let (second, third) = (bob.link().await, bob.link().await);
    assert_eq!(send(&[(&bob, b"x"), (&second, b"x"), (&third, b"x")]).await, 413);
}

#[tokio::test]
async fn the_outcome_of_a_send_is_kept_as_long_as_the_option_says() {
    let lifetime = Duration::from_mins(5);
    let server = TestServer::start_with(|config| config.messaging.idempotency_lifetime = lifetime).await;
    let (alice, bob) = people(&server).await;
    let mut socket = bob.connect().await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"again")]));
    let is_repeat = async || {
        let answer = alice.post_messages(key, &request).await.expect(200);
        answer.header("idempotency-replayed").is_some()
    };
    assert!(!is_repeat().await);
    let envelope = socket.expect_message("again").await;
    socket.ack(&[envelope]).await;
    let database = server.database().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
    server.clock.advance(Duration::from_mins(4));
    assert!(is_repeat().await);
    server.clock.advance(Duration::from_mins(4));
    assert!(!is_repeat().await, "the key is free again");
    socket.expect_message("again").await;
}

/// Every job has a round soon after the start; the second one shows the pause.
#[tokio::test]
async fn the_sweeps_come_again_after_the_pauses_that_the_options_say() {
    let server = TestServer::start_with(|config| {
        config.messaging.cleanup_interval = SECOND;
        config.auth.refresh_token_cleanup_interval = SECOND;
        config.attachments.cleanup_interval = SECOND;
    })
    .await;
    let (mut alice, bob) = people(&server).await;
    let database = server.database().await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    for round in 1..=3 {
        alice = alice.log_in().await;
        alice.send_to(&bob, "never fetched").await;
        alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);
        server.clock.advance(31 * DAY);
        for table in ["messages", "sessions", "attachments"] {
            eventually(&format!("{table} to be swept, round {round}"), async || rows(table).await == 0).await;
        }
    }
}

#[tokio::test]
async fn expired_attachments_are_removed_so_many_at_a_time() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let behind = bucket.at(&proxy.endpoint);
    let server = TestServer::start_with(|config| {
        behind.configure(&mut config.attachments);
        config.attachments.cleanup_interval = SECOND;
        config.attachments.cleanup_batch_size = 2;
    })
    .await;
    let alice = server.account().await;
    for _ in 0..4 {
        alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);
    }
    server.clock.advance(31 * DAY);
    eventually("the objects to be gone", async || bucket.is_empty().await).await;
    assert_eq!(proxy.count("POST"), 2, "a request for each step");
}

/// Puts the mail of one device into the inbox of another one, without a signal.
async fn move_mail(database: &Database, from: &Device, to: &Device) {
    let [from, to] =
        [from, to].map(|device| format!("(SELECT no FROM devices WHERE id = {})", database.literal(device.id)));
    database.execute(&format!("UPDATE messages SET device_no = {to} WHERE device_no = {from}")).await;
}

/// A signal is lost: mail turns up in an inbox of which nobody said anything.
#[tokio::test]
async fn a_lost_signal_is_made_up_for_by_a_resync_after_the_interval() {
    let server = TestServer::start_with(|config| config.gateway.resync_interval = SECOND).await;
    let (alice, bob) = people(&server).await;
    let carol = server.account().await;
    alice.send_to(&bob, "moved").await;
    let mut socket = carol.connect().await;
    socket.until_pong().await;
    let database = server.database().await;
    move_mail(&database, &bob, &carol).await;
    socket.expect_message("moved").await;
}

/// The server forgets when a device last logged in. Its open socket looks at the device's row, and stays open.
#[tokio::test]
async fn a_socket_outlives_the_second_of_the_log_in_that_it_began_with() {
    let server = TestServer::start_with(|config| config.gateway.resync_interval = SECOND).await;
    let (alice, bob) = people(&server).await;
    let carol = server.account().await.log_in().await;
    alice.send_to(&bob, "moved").await;
    let mut socket = carol.connect().await;
    socket.until_pong().await;
    let database = server.database().await;
    let revoked_until = format!("SELECT tokens_void_to FROM devices WHERE id = {}", database.literal(carol.id));
    assert_ne!(database.number(&revoked_until).await, 0);
    database.execute("UPDATE devices SET tokens_void_to = 0, tokens_issued_to = 0").await;
    // A regular look finds the message, and has looked at the device before.
    move_mail(&database, &bob, &carol).await;
    socket.expect_message("moved").await;
    carol.log_out().await;
    assert!(matches!(socket.until_end().await.last(), Some(Event::End)));
}

#[tokio::test]
async fn a_socket_is_read_no_further_while_as_many_acks_wait_as_may() {
    let server = TestServer::start_with(|config| config.gateway.ack_buffer_size = 2).await;
    let (alice, bob) = people(&server).await;
    for _ in 0..10 {
        alice.send_to(&bob, "x").await;
    }
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(10).await;
    let database = server.database().await;
    let held = database.hold_write().await;
    for envelope in &envelopes {
        socket.ack(std::slice::from_ref(envelope)).await;
    }
    socket.ping(b"are you there").await;
    let answer = tokio::time::timeout(SECOND, socket.read()).await;
    assert!(answer.is_err(), "{answer:?}, though no ack can be written");
    held.release().await;
    socket.until_pong().await;
    eventually("all acks to be applied", async || database.queued(&bob).await == 0).await;
}

#[tokio::test]
async fn failed_reads_of_an_inbox_are_retried_quickly_only_within_the_budget() {
    for (budget, is_quick) in [(Duration::ZERO, false), (Duration::from_secs(10), true)] {
        let server = TestServer::start_with(|config| config.gateway.fetch_retry_budget = budget).await;
        let (alice, bob) = people(&server).await;
        alice.send_to(&bob, "patience").await;
        let database = server.database().await;
        let rename = |from: &str, to: &str| format!("ALTER TABLE {from} RENAME TO {to}");
        database.execute(&rename("messages", "hidden")).await;
        let mut socket = bob.connect().await;
        let failed = Instant::now();
        tokio::time::sleep(Duration::from_millis(50)).await; // nothing tells from outside that the read has failed
        database.execute(&rename("hidden", "messages")).await;
        socket.expect_message("patience").await;
        let took = failed.elapsed();
        assert_eq!(took < Duration::from_millis(800), is_quick, "{budget:?}: {took:?}");
        server.stop().await;
    }
}
