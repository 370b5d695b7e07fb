//! Shutdown of the real program: in order, in time, whatever the clients do.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::{
    Binary, Collector, Database, Device, Event, PATIENCE, RawSocket, eventually, send_request, within,
};

const SECOND: Duration = Duration::from_secs(1);

/// Time to shut down, and a second for a busy machine.
const LIMIT: Duration = Duration::from_secs(6);

fn going_away() -> Event {
    Event::Close(Some((1001, "Server shutting down".to_owned())))
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_told_and_their_acks_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &["--ws-ack-flush-interval-ms=3600000"]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    for number in 0..10 {
        alice.send_to(&bob, number.to_string()).await;
    }
    let mut socket = bob.connect().await;
    let mut idle = alice.connect().await;
    let envelopes = socket.messages(10).await;
    socket.ack(&envelopes[..7]).await;
    // By then the acks have been read.
    assert_eq!(socket.until_pong().await, []);
    idle.until_pong().await;
    server.terminate();
    assert_eq!(socket.until_end().await, [going_away(), Event::End]);
    assert_eq!(idle.until_end().await, [going_away(), Event::End]);
    assert_eq!(server.exit(LIMIT).await.code(), Some(0));

    let _server = server.start_again(&[]).await;
    let left = bob.connect().await.messages(3).await;
    assert_eq!(left, envelopes[7..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_way_are_answered_and_new_ones_are_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &[]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let database = Database::of(folder.path()).await;
    let held = database.hold_write().await;
    let (address, request) = (server.address(), raw_send(&alice, &bob));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&request).await.unwrap();
    tokio::time::sleep(SECOND / 2).await; // nothing tells from outside that the request has been taken in
    server.terminate();
    within("new connections to be refused", async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    held.release().await;
    database.close().await;
    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(server.exit(LIMIT).await.code(), Some(0));

    let _server = server.start_again(&[]).await;
    bob.connect().await.expect_message("in flight").await;
}

fn raw_send(sender: &Device, receiver: &Device) -> Vec<u8> {
    let body = prost::Message::encode_to_vec(&send_request(&[(receiver, b"in flight")]));
    let head = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\nidempotency-key: {}\r\n\
         content-length: {}\r\n\r\n",
        sender.token,
        Uuid::new_v4(),
        body.len()
    );
    [head.into_bytes(), body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_let_go_do_not_hold_it_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &["--shutdown-timeout-secs=3"]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    for _ in 0..8 {
        alice.send_to(&bob, vec![7; 2 * 1024 * 1024 - 200]).await;
    }
    let _not_reading = RawSocket::open(server.address(), &bob.ticket().await).await;
    let mut _stalled = TcpStream::connect(server.address()).await.unwrap();
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\nbegun",
        alice.token
    );
    _stalled.write_all(head.as_bytes()).await.unwrap();
    let _silent = TcpStream::connect(server.address()).await.unwrap();
    let mut well_behaved = bob.connect().await;
    well_behaved.messages(8).await;

    let begun = Instant::now();
    server.terminate();
    assert_eq!(well_behaved.until_end().await, [going_away(), Event::End]);
    assert_eq!(server.exit(SECOND * 5).await.code(), Some(0));
    assert!(begun.elapsed() < SECOND * 5);

    let server = server.start_again(&[]).await;
    bob.connect().await.messages(8).await;
    drop(server);
    let objects = folder.path().join("attachments").join("attachments");
    let objects = std::fs::read_dir(objects).map_or(0, Iterator::count);
    assert_eq!(objects, 0, "the upload that was cut off left something behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    for signal in ["TERM", "INT"] {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Binary::start(folder.path(), &["--shutdown-timeout-secs=60"]).await;
        let alice = Device::register(&server.client()).await;
        // A request that stalls keeps the first signal from being enough.
        let mut stalled = TcpStream::connect(server.address()).await.unwrap();
        let head = format!(
            "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\nbegun",
            alice.token
        );
        stalled.write_all(head.as_bytes()).await.unwrap();
        let mut socket = alice.connect().await;
        socket.until_pong().await;
        server.signal(signal);
        assert_eq!(socket.until_end().await, [going_away(), Event::End]);
        server.signal(signal);
        server.exit(SECOND * 5).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_does_not_wait_for_a_frozen_collector() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    collector.freeze();
    let endpoint = format!("--otlp-endpoint={}", collector.url());
    let mut server = Binary::start(folder.path(), &[&*endpoint, "--shutdown-drain-delay-secs=60"]).await;
    server.terminate();
    eventually("the first signal to be heard", async || server.output().contains("not ready any more")).await;
    let asked = Instant::now();
    server.terminate();
    server.exit(SECOND * 5).await;
    assert!(asked.elapsed() < SECOND * 3 / 2, "{:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_stops_at_once_and_leaves_a_database_without_a_log_to_replay() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await; // and its connection stays open
    let begun = Instant::now();
    server.signal("INT");
    assert_eq!(server.exit(PATIENCE).await.code(), Some(0));
    assert!(begun.elapsed() < SECOND * 3, "{:?}", begun.elapsed());
    let log = folder.path().join("obscura.db-wal");
    assert!(!log.exists() || std::fs::metadata(&log).unwrap().len() == 0);
    let _server = server.start_again(&[]).await;
    alice.request("GET", "/v1/devices").send().await.expect(200);
}
