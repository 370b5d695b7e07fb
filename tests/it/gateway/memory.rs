//! Memory of sockets: what large frames cost while they are under way, and that nothing of them is kept.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::limits::{LimitSubject, ResourceLimit};
use prost::Message as _;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::proto::{AckMessage, Payload, WebSocketFrame};
use crate::harness::{Binary, Device, RawSocket, TestServer, eventually, opcode, within};
use crate::metrics::page;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// The share of one account of the memory for large frames, in KiB.
const SHARE: u32 = 16 << 10;
/// A message that takes this much of it, in KiB.
const LARGE: u32 = 2 << 10;
const MANY_SOCKETS: &str = "--ws-max-connections-per-device=1000";

/// A message of nearly 2 MiB, all bytes of which are this number.
fn large(number: u8) -> Vec<u8> {
    vec![number; 2 * MIB as usize - 200]
}

async fn accounts(server: &Binary) -> (Device, Device) {
    (Device::register(&server.client()).await, Device::register(&server.client()).await)
}

/// Waits until the server has given memory back, down to this much more than before.
async fn falls_back(server: &Binary, before: u64, most: u64) {
    let mut grown = 0;
    let fallen = eventually("the memory to fall back", async || {
        grown = server.resident_bytes().saturating_sub(before);
        grown < most
    });
    if tokio::time::timeout(Duration::from_secs(15), fallen).await.is_err() {
        panic!("{} MiB are kept, {} MiB may be", grown / MIB, most / MIB);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_have_read_large_frames_give_their_memory_back() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[MANY_SOCKETS]).await;
    let (alice, bob) = accounts(&server).await;
    // Two messages that travel alone, then a page that grows with the pace of the client.
    for number in 0..2 {
        alice.send_to(&bob, large(number)).await;
    }
    for number in 0..40 {
        alice.send_to(&bob, vec![number; 100 * KIB as usize]).await;
    }
    let mut sockets = vec![bob.connect().await];
    sockets[0].messages(42).await; // what is made once is made now
    let before = server.resident_bytes();
    for _ in 0..60 {
        let mut socket = bob.connect().await;
        socket.messages(42).await;
        sockets.push(socket);
    }
    falls_back(&server, before, 24 * MIB).await;
    for socket in &mut sockets {
        socket.until_pong().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_frames_of_clients_leave_no_memory_behind() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[MANY_SOCKETS]).await;
    let (_, bob) = accounts(&server).await;
    let mut sockets = Vec::new();
    for _ in 0..200 {
        sockets.push(bob.connect().await);
    }
    let before = server.resident_bytes();
    for socket in &mut sockets {
        socket.send(Message::Binary(vec![0xff; 250 << 10].into())).await;
        socket.until_pong().await;
    }
    falls_back(&server, before, 16 * MIB).await;
    for socket in &mut sockets {
        socket.until_pong().await;
    }
}

/// Of one account; the others have memory.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_of_clients_that_never_end_hold_a_bounded_amount_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[MANY_SOCKETS]).await;
    let (alice, bob) = accounts(&server).await;
    let mut sockets = Vec::new();
    for _ in 0..60 {
        sockets.push(RawSocket::open(server.address(), &bob.ticket().await).await);
    }
    let (before, mut refused) = (server.resident_bytes(), 0);
    for socket in &mut sockets {
        for part in 0..20 {
            // Each part is small. Those that were refused may be closed already.
            let first = if part == 0 { opcode::BINARY } else { opcode::CONTINUATION };
            let _ = socket.send_part(first, &[0xff; 12 << 10]).await;
        }
        let _ = socket.send(opcode::PING, b"").await;
        match socket.receive().await {
            Some((opcode::PONG, _)) => {}
            Some((opcode::CLOSE, code)) if code == 1013_u16.to_be_bytes() => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, 60 - SHARE / 512);
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 24 * MIB, "{} MiB", grown / MIB);
    let mut other = alice.connect().await;
    other.send(Message::Binary(vec![0xff; 250 << 10].into())).await;
    other.until_pong().await;
}

#[tokio::test]
async fn a_client_that_does_not_end_a_large_message_is_disconnected_though_it_answers_pings() {
    let server = TestServer::start_with(|config| {
        config.gateway.ping_interval = Duration::from_secs(1);
        config.gateway.ping_timeout = Duration::from_secs(2);
    })
    .await;
    let alice = server.account().await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    socket.send_part(opcode::BINARY, &[0xff; 20 << 10]).await.unwrap();
    let closed = within("the end of the socket", async {
        loop {
            match socket.receive().await.expect("a close frame") {
                (opcode::PING, payload) => socket.send(opcode::PONG, &payload).await.unwrap(),
                (opcode::CLOSE, code) => return code,
                _ => {}
            }
        }
    });
    assert_eq!(closed.await, 1008_u16.to_be_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_that_do_not_read_large_messages_hold_a_bounded_amount_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[MANY_SOCKETS]).await;
    let (alice, bob) = accounts(&server).await;
    let carol = Device::register(&server.client()).await;
    let mut reader = carol.connect().await;
    for number in 0..2 {
        alice.send_to(&bob, large(number)).await;
        alice.send_to(&carol, large(number)).await;
    }
    reader.messages(2).await; // what is made once is made now
    let before = server.resident_bytes();
    let mut stuck = Vec::new();
    for _ in 0..80 {
        stuck.push(RawSocket::open(server.address(), &bob.ticket().await).await);
    }
    for socket in &mut stuck {
        socket.send(opcode::PING, b"").await.unwrap();
    }
    // Another account has room, so its messages come at once, and the stuck sockets have had their turn by then.
    alice.send_to(&bob, "behind").await;
    alice.send_to(&carol, large(9)).await;
    assert_eq!(reader.messages(1).await[0].message.len(), large(9).len());
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 80 * MIB, "{} MiB for 80 sockets with a message of 2 MiB each", grown / MIB);
}

/// What a socket is sent, up to this many messages: the first byte of each.
async fn read_messages(socket: &mut RawSocket, count: usize) -> Vec<u8> {
    let mut messages = Vec::new();
    while messages.len() < count {
        let (kind, payload) = socket.receive().await.expect("an open socket");
        if kind != opcode::BINARY {
            continue;
        }
        let Some(Payload::EnvelopeBatch(batch)) = WebSocketFrame::decode(&payload[..]).unwrap().payload else {
            continue;
        };
        messages.extend(batch.envelopes.iter().map(|envelope| envelope.message[0]));
    }
    messages
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_above_the_limit_of_a_frame_is_charged_and_waits_for_room_in_its_order() {
    let server = TestServer::start_with(|config| {
        config.gateway.max_connections_per_device = 100;
        config.gateway.write_timeout = Duration::from_secs(60);
    })
    .await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    alice.send_to(&bob, [1]).await;
    alice.send_to(&bob, large(2)).await;
    alice.send_to(&bob, [3]).await;
    alice.send_to(&bob, large(4)).await;
    let frames = server.server().app().limits.frames.clone();
    let open = async || RawSocket::open_with_buffer(server.address(), &bob.ticket().await, 64 << 10).await;
    let mut sockets = vec![open().await];
    eventually("one message to be charged", async || frames.taken() == LARGE).await;
    for _ in 0..19 {
        sockets.push(open().await);
    }
    eventually("the share to be taken", async || frames.taken() == SHARE).await;
    // Pings of those that wait are answered, and another account isn't kept waiting.
    let mut carols = carol.connect().await;
    alice.send_to(&carol, large(5)).await;
    assert_eq!(carols.messages(1).await[0].message[0], 5);
    eventually("the other account's memory to be given back", async || frames.taken() == SHARE).await;
    let sent = page::sum(&[&server], "obscura_gateway_frames_total", &[("network_io_direction", "transmit")]).await;
    assert!(sent <= 20 + u64::from(SHARE / LARGE) + 1, "{sent} frames: large ones were started without room");
    let read = join_all(sockets.iter_mut().map(|socket| read_messages(socket, 4)));
    for messages in within("all messages", read).await {
        assert_eq!(messages, [1, 2, 3, 4]);
    }
    eventually("all memory to be given back", async || frames.taken() == 0).await;
    alice.send_to(&bob, [6]).await;
    for messages in join_all(sockets.iter_mut().map(|socket| read_messages(socket, 1))).await {
        assert_eq!(messages, [6]);
    }
}

#[tokio::test]
async fn a_socket_that_waits_for_room_answers_pings_and_can_be_closed() {
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(60)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let frames = server.server().app().limits.frames.clone();
    let taken = frames.try_take(LimitSubject::Exempt, units_in_all(&frames)).unwrap();
    alice.send_to(&bob, large(1)).await;
    let mut socket = bob.connect().await;
    assert_eq!(socket.until_pong().await, []);
    let mut other = bob.connect().await;
    assert_eq!(other.until_pong().await, []);
    assert_eq!(other.close_with(1000, "").await.len(), 2);
    drop(taken);
    assert_eq!(socket.messages(1).await[0].message[0], 1);
    eventually("all memory to be given back", async || frames.taken() == 0).await;
}

/// How many units can be taken at once.
fn units_in_all(frames: &ResourceLimit) -> u32 {
    let fits = |units: &u32| frames.try_take(LimitSubject::Exempt, *units).is_some();
    (1..=1024).map(|mebibytes| mebibytes << 10).take_while(fits).last().unwrap()
}

/// Between two parts of a message, and within a frame, nothing may be given back.
#[tokio::test]
async fn acks_behind_a_large_frame_count_in_whatever_pieces_they_come() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, large(1)).await;
    let mut reader = bob.connect().await;
    let envelope = reader.messages(1).await.remove(0);
    let ack = WebSocketFrame { payload: Some(Payload::Ack(AckMessage { message_ids: vec![envelope.id] })) };
    let ack = ack.encode_to_vec();
    let mut socket = RawSocket::open_with_buffer(server.address(), &bob.ticket().await, 64 << 10).await;
    assert_eq!(read_messages(&mut socket, 1).await, [1]);
    let (one, two) = ack.split_at(7);
    socket.send(opcode::BINARY, &vec![0xff; 200 << 10]).await.unwrap();
    socket.send_part(opcode::BINARY, one).await.unwrap();
    socket.send(opcode::PING, b"between").await.unwrap();
    assert_eq!(socket.receive().await, Some((opcode::PONG, b"between".to_vec())));
    socket.send_part(0x80 | opcode::CONTINUATION, two).await.unwrap();
    let database = server.database().await;
    eventually("the ack to count", async || database.queued(&bob).await == 0).await;
}
