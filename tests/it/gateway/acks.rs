//! What clients send, above all acks.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::harness::proto::{EnvelopeBatch, Payload, PreKeyStatus, WebSocketFrame};
use crate::harness::{RawSocket, TestServer, eventually, opcode, send_request};

const NEVER: Duration = Duration::from_hours(1);

#[tokio::test]
async fn an_acknowledged_message_is_gone_for_good() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "one").await;
    alice.send_to(&bob, "two").await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(2).await;
    socket.ack(&envelopes[..1]).await;
    let database = server.database().await;
    eventually("the ack to be applied by its timer", async || database.queued(&bob).await == 1).await;
    bob.connect().await.expect_message("two").await;
}

#[tokio::test]
async fn acks_wait_for_company_and_are_written_when_there_is_enough() {
    let server = TestServer::start_with(|config| {
        config.gateway.ack_flush_interval = NEVER;
        config.gateway.ack_batch_size = 10;
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    for _ in 0..10 {
        alice.send_to(&bob, "x").await;
    }
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(10).await;
    socket.ack(&envelopes[..9]).await;
    socket.until_pong().await;
    let database = server.database().await;
    assert_eq!(database.queued(&bob).await, 10, "nothing is deleted before");
    socket.ack(&envelopes[9..]).await;
    eventually("a full batch to be written", async || database.queued(&bob).await == 0).await;
}

#[tokio::test]
async fn acks_received_are_applied_when_the_socket_closes() {
    let server = TestServer::start_with(|config| config.gateway.ack_flush_interval = NEVER).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let database = server.database().await;

    alice.send_to(&bob, "politely").await;
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("politely").await;
    socket.ack(&[envelope]).await;
    socket.close().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;

    alice.send_to(&bob, "violently").await;
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("violently").await;
    socket.ack(&[envelope]).await;
    drop(socket);
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
    assert_eq!(bob.connect().await.until_pong().await, []);
}

#[tokio::test]
async fn acks_count_though_the_next_frame_breaks_the_protocol() {
    let server = TestServer::start_with(|config| config.gateway.ack_flush_interval = NEVER).await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "hello").await;
    let mut reader = bob.connect().await;
    let envelope = reader.expect_message("hello").await;
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    socket.send(opcode::BINARY, &ack_frame(vec![envelope.id])).await.unwrap();
    socket.stream.try_write(&[0xff; 14]).unwrap(); // reserved bits are set
    socket.drain().await;
    let database = server.database().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
}

fn ack_frame(message_ids: Vec<Bytes>) -> Vec<u8> {
    let payload = Some(Payload::Ack(crate::harness::proto::AckMessage { message_ids }));
    WebSocketFrame { payload }.encode_to_vec()
}

#[tokio::test]
async fn acks_for_other_devices_messages_delete_nothing() {
    let server = TestServer::start().await;
    let (alice, bob, mallory) = (server.account().await, server.account().await, server.account().await);
    let tablet = bob.link().await;
    alice.send(&[(&bob, b"for bob"), (&tablet, b"for the tablet")]).await;
    alice.send_to(&mallory, "for mallory").await;
    let bobs = bob.connect().await.expect_message("for bob").await;

    let mut socket = mallory.connect().await;
    let own = socket.expect_message("for mallory").await;
    socket.ack_ids(vec![bobs.id.clone(), own.id.clone()]).await;
    let database = server.database().await;
    eventually("the own message to go", async || database.queued(&mallory).await == 0).await;
    let mut sibling = tablet.connect().await;
    let own = sibling.expect_message("for the tablet").await;
    sibling.ack_ids(vec![bobs.id.clone(), own.id]).await;
    eventually("the own message to go", async || database.queued(&tablet).await == 0).await;
    assert_eq!(bob.connect().await.expect_message("for bob").await, bobs);
}

#[tokio::test]
async fn malformed_unknown_and_repeated_ids_are_passed_over_and_the_good_ones_count() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    for _ in 0..3 {
        alice.send_to(&bob, "x").await;
    }
    let mut socket = bob.connect().await;
    let ids: Vec<Bytes> = socket.messages(3).await.into_iter().map(|envelope| envelope.id).collect();
    let odd = [Bytes::new(), ids[0].slice(..15), Bytes::from([&ids[0][..], b"1"].concat()), Bytes::from(vec![0; 16])];
    let unknown = Bytes::copy_from_slice(Uuid::new_v4().as_bytes());
    let mixed = vec![
        odd[0].clone(),
        ids[1].clone(),
        odd[1].clone(),
        unknown,
        ids[1].clone(),
        odd[2].clone(),
        ids[2].clone(),
        odd[3].clone(),
    ];
    socket.ack_ids(mixed.clone()).await;
    socket.ack_ids(mixed).await;
    let database = server.database().await;
    eventually("two messages to go", async || database.queued(&bob).await == 1).await;
    assert_eq!(socket.until_pong().await, []);
    assert_eq!(bob.connect().await.messages(1).await[0].id, ids[0]);
}

#[tokio::test]
async fn a_message_may_be_acknowledged_on_a_socket_that_did_not_bring_it() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "hello").await;
    let mut first = bob.connect().await;
    let envelope = first.expect_message("hello").await;
    first.close().await;
    let mut socket = bob.connect().await;
    socket.ack(&[envelope]).await; // before this socket has read anything
    let database = server.database().await;
    eventually("the message to go", async || database.queued(&bob).await == 0).await;
}

#[tokio::test]
async fn no_ack_is_dropped_however_many_come_at_once_and_however_small_the_buffer() {
    let server = TestServer::start_with(|config| {
        config.gateway.ack_buffer_size = 5;
        config.gateway.ack_batch_size = 3;
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let sends: Vec<_> = (0..400).map(|_| alice.send_to(&bob, "x")).collect();
    futures_util::future::join_all(sends).await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(400).await;
    socket.ack(&envelopes[..200]).await;
    for envelope in &envelopes[200..] {
        socket.ack(std::slice::from_ref(envelope)).await;
    }
    let database = server.database().await;
    eventually("all acks to be applied", async || database.queued(&bob).await == 0).await;
    socket.until_pong().await;
}

#[tokio::test]
async fn acks_that_could_not_be_written_are_written_later() {
    let server = TestServer::start_with(crate::harness::impatient).await;
    let (alice, bob) = (server.account().await, server.account().await);
    for message in ["one", "two"] {
        alice.send_to(&bob, message).await;
    }
    let mut socket = bob.connect().await;
    let mut closing = bob.connect().await;
    let envelopes = socket.messages(2).await;
    closing.messages(2).await;
    let database = server.database().await;
    let held = database.hold_write().await;
    socket.ack(&envelopes[..1]).await;
    closing.ack(&envelopes[1..]).await;
    closing.close().await; // this one's acks have no socket to wait on
    for _ in 0..2 {
        alice.post_messages(Uuid::new_v4(), &send_request(&[(&bob, b"refused")])).await.expect(503);
    }
    held.release().await;
    eventually("the acks to be applied in the end", async || database.queued(&bob).await == 0).await;
    assert_eq!(socket.until_pong().await, []);
}

#[tokio::test]
async fn what_is_no_ack_is_ignored() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "hello").await;
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("hello").await;
    let batch = Payload::EnvelopeBatch(EnvelopeBatch { envelopes: vec![envelope.clone()] });
    let status = PreKeyStatus { one_time_pre_key_count: 1, min_threshold: 2, pq_pre_key_count: 3 };
    for payload in [None, Some(batch), Some(Payload::PreKeyStatus(status))] {
        socket.send(Message::Binary(WebSocketFrame { payload }.encode_to_vec().into())).await;
    }
    for bytes in [&b""[..], b"\xff\xff\xff", b"\x0a\x01x", b"\x9a\x06\x03new", &[0; 70_000]] {
        socket.send(Message::Binary(Bytes::copy_from_slice(bytes))).await;
    }
    for text in ["", "hello", "{\"ack\":[]}", &"x".repeat(70_000)] {
        socket.send(Message::text(text)).await;
    }
    socket.send(Message::Pong(Bytes::from_static(b"unasked"))).await;
    assert_eq!(socket.until_pong().await, []);
    assert_eq!(server.database().await.queued(&bob).await, 1);
    alice.send_to(&bob, "still here").await;
    socket.expect_message("still here").await;
}

#[tokio::test]
async fn an_ack_may_come_in_fragments() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "hello").await;
    let envelope = bob.connect().await.expect_message("hello").await;
    let frame = ack_frame(vec![envelope.id]);
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    socket.send_part(opcode::BINARY, &frame[..5]).await.unwrap();
    socket.send(opcode::PING, b"between").await.unwrap();
    socket.send_part(opcode::CONTINUATION, &frame[5..9]).await.unwrap();
    socket.send(opcode::CONTINUATION, &frame[9..]).await.unwrap();
    let database = server.database().await;
    eventually("the message to go", async || database.queued(&bob).await == 0).await;
}
