//! A client that sends frames without need is read slowly, and loses nothing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use crate::harness::{Binary, Device, RawSocket, TestServer, eventually, opcode};
use crate::metrics::page;

/// Frames that a socket may send at once.
const BURST: u64 = 2000;
/// Frames that it may send in a second after that.
const PER_SECOND: u64 = 100;

async fn frames_read(server: &TestServer) -> u64 {
    page::sum(&[server], "obscura_gateway_frames_total", &[("network_io_direction", "receive")]).await
}

#[tokio::test]
async fn empty_frames_are_read_slowly_once_a_burst_is_used_up() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    let frames = [0x82, 0x80, 0, 0, 0, 0].repeat(20_000);
    let begun = Instant::now();
    socket.stream.write_all(&frames).await.unwrap();
    eventually("the burst to be read", async || frames_read(&server).await >= BURST).await;
    // What is observed is that time passes and hardly anything is read.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let read = frames_read(&server).await;
    let allowed = BURST + PER_SECOND * (begun.elapsed().as_secs() + 1);
    assert!(read <= allowed, "{read} frames were read, {allowed} may be");
}

#[tokio::test]
async fn after_acks_of_unknown_ids_the_socket_is_read_later_and_no_ack_is_lost() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "a message").await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    let unknown = |count: u64| (0..count).map(|_| Bytes::copy_from_slice(Uuid::new_v4().as_bytes())).collect();
    // A debt of two seconds.
    socket.ack_ids(unknown(BURST + 2 * PER_SECOND)).await;
    let begun = Instant::now();
    socket.ack(&envelopes).await;
    eventually("the first frame to be read", async || frames_read(&server).await >= 1).await;
    let database = server.database().await;
    eventually("the ack behind it to count", async || database.queued(&bob).await == 0).await;
    assert!(begun.elapsed() > Duration::from_secs(1), "the socket was read at once: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_drain_with_an_ack_for_each_message_is_not_slowed() {
    const MESSAGES: usize = 3000;
    let server = TestServer::start_with(|config| config.messaging.max_inbox_size = 10_000).await;
    let (alice, bob) = (server.account().await, server.account().await);
    for _ in 0..MESSAGES {
        alice.send_to(&bob, "a message").await;
    }
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(MESSAGES).await;
    let begun = Instant::now();
    for envelope in &envelopes {
        socket.ack(std::slice::from_ref(envelope)).await;
    }
    let database = server.database().await;
    eventually("all acks to count", async || database.queued(&bob).await == 0).await;
    let slowed = Duration::from_secs((MESSAGES as u64 - BURST) / PER_SECOND);
    assert!(begun.elapsed() < slowed, "it took {:?}; slowed it would be {slowed:?} at least", begun.elapsed());
}

#[tokio::test]
async fn pings_beyond_the_burst_are_answered_slowly_and_the_socket_stays_open() {
    const PINGS: u64 = BURST + 3 * PER_SECOND;
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    let ping = |number: u64| [&[0x89, 0x84, 0, 0, 0, 0], &(number as u32).to_be_bytes()[..]].concat();
    let begun = Instant::now();
    socket.stream.write_all(&(1..=PINGS).flat_map(ping).collect::<Vec<u8>>()).await.unwrap();
    // One answer may stand for several pings that have come before it.
    let mut answered = 0;
    while answered < PINGS {
        let (kind, payload) = socket.receive().await.expect("an open socket");
        assert_eq!(kind, opcode::PONG);
        answered = u32::from_be_bytes(payload.try_into().unwrap()).into();
    }
    assert!(begun.elapsed() > Duration::from_secs(2), "the last one was answered after {:?}", begun.elapsed());
    alice.send_to(&bob, "still here").await;
    assert_eq!(socket.receive().await.expect("an open socket").0, opcode::BINARY);
}

#[tokio::test]
async fn parts_of_a_message_that_never_ends_do_not_keep_a_processor_busy() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    socket.send_part(opcode::BINARY, b"a beginning").await.unwrap();
    let parts = [0x00, 0x80, 0, 0, 0, 0].repeat(10_000);
    let (begun, before) = (Instant::now(), server.cpu_time());
    while begun.elapsed() < Duration::from_secs(3) {
        let _ = tokio::time::timeout(Duration::from_millis(100), socket.stream.write_all(&parts)).await;
    }
    let spent = server.cpu_time() - before;
    assert!(spent < Duration::from_secs(1), "{spent:?} of three seconds");
}
