//! How sockets end, and whose decision that was.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Event, RawSocket, Socket, TestServer, eventually, opcode};

const KIB: usize = 1024;

fn dismissed() -> Vec<Event> {
    vec![Event::Close(None), Event::End]
}

#[tokio::test]
async fn removing_a_device_closes_its_sockets_and_no_others() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let tablet = alice.link().await;
    let mut phone = alice.connect().await;
    let mut sockets = [tablet.connect().await, tablet.connect().await];
    for socket in &mut sockets {
        socket.until_pong().await;
    }
    alice.remove(&tablet).await;
    for socket in &mut sockets {
        assert_eq!(socket.until_end().await, dismissed());
    }
    assert_eq!(phone.until_pong().await, []);
}

#[tokio::test]
async fn resetting_an_account_closes_the_sockets_of_all_its_devices() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = alice.link().await;
    let mut others = bob.connect().await;
    let mut sockets = [alice.connect().await, tablet.connect().await];
    for socket in &mut sockets {
        socket.until_pong().await;
    }
    let new = alice.reset().await;
    for socket in &mut sockets {
        assert_eq!(socket.until_end().await, dismissed());
    }
    assert_eq!(others.until_pong().await, []);
    bob.send_to(&new, "hello again").await;
    new.connect().await.expect_message("hello again").await;
}

#[tokio::test]
async fn logging_out_ends_the_session_everywhere_at_once() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    let ticket = bob.ticket().await;
    bob.log_out().await;
    assert_eq!(socket.until_end().await, dismissed());
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    bob.request("GET", "/v1/devices").send().await.expect(401);
    let refresh = serde_json::json!({"refreshToken": bob.refresh_token});
    bob.client.post("/v1/session/refresh").json(&refresh).send().await.expect(401);

    alice.send_to(&bob, "kept").await;
    bob.log_in().await.connect().await.expect_message("kept").await;
}

#[tokio::test]
async fn a_removed_devices_undelivered_mail_is_not_sent_any_more() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = bob.link().await;
    for number in 0..8 {
        alice.send(&[(&bob, b"for the phone"), (&tablet, &vec![number; 1 << 20])]).await;
    }
    // A socket that doesn't read yet: most of its mail is still to be sent when the device is removed.
    let mut socket = RawSocket::open(server.address(), &tablet.ticket().await).await;
    bob.remove(&tablet).await;
    let mut envelopes = 0;
    while let Some((opcode::BINARY, frame)) = socket.receive().await {
        envelopes += frame.len() >> 20;
    }
    assert!(envelopes < 8, "{envelopes}");
    let database = server.database().await;
    let waiting = async || database.number("SELECT count(*) FROM messages").await;
    eventually("its mail to be gone", async || waiting().await == 8).await;
    assert_eq!(database.queued(&bob).await, 8);
}

#[tokio::test]
async fn an_expired_token_closes_no_socket() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    server.clock.advance(Duration::from_hours(2));
    bob.request("GET", "/v1/devices").send().await.expect(401);
    alice.log_in().await.send_to(&bob, "still open").await;
    socket.expect_message("still open").await;
}

#[tokio::test]
async fn shutdown_tells_every_socket_that_the_server_goes_away() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut sockets = [alice.connect().await, bob.connect().await, bob.connect().await];
    for socket in &mut sockets {
        socket.until_pong().await;
    }
    let ends = futures_util::future::join_all(sockets.iter_mut().map(Socket::until_end));
    let ((), ends) = tokio::join!(server.stop(), ends);
    for end in ends {
        assert_eq!(end, [Event::Close(Some((1001, "Server shutting down".to_owned()))), Event::End]);
    }
}

#[tokio::test]
async fn a_close_is_answered_with_the_same_code_and_reason() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for (code, reason) in [(1000, ""), (1000, "bye"), (1001, "tab closed"), (3000, "registered"), (4999, "ünïcode")] {
        let end = alice.connect().await.close_with(code, reason).await;
        assert_eq!(end, [Event::Close(Some((code, reason.to_owned()))), Event::End]);
    }
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    socket.send(opcode::CLOSE, b"").await.unwrap();
    assert_eq!(socket.receive().await, Some((opcode::CLOSE, Vec::new())));
    assert_eq!(socket.receive().await, None);
}

#[tokio::test]
async fn a_close_is_answered_behind_a_backlog() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    for _ in 0..10 {
        alice.send_to(&bob, vec![7; 1024 * KIB]).await;
    }
    let end = bob.connect().await.close_with(4000, "enough").await;
    assert_eq!(end, [Event::Close(Some((4000, "enough".to_owned()))), Event::End]);
}

#[tokio::test]
async fn a_frame_of_256_kib_is_ignored_and_a_larger_one_closes_the_socket_as_too_large() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    let mut other = bob.connect().await;
    socket.send(Message::Binary(Bytes::from(vec![0; 256 * KIB]))).await;
    assert_eq!(socket.until_pong().await, []);
    socket.send(Message::Binary(Bytes::from(vec![0; 256 * KIB + 1]))).await;
    assert_eq!(socket.until_end().await, [Event::Close(Some((1009, String::new()))), Event::End]);
    assert_eq!(other.until_pong().await, []);
    alice.send_to(&bob, "hello").await;
    other.expect_message("hello").await;
}

#[tokio::test]
async fn fragments_that_add_up_to_more_than_256_kib_are_too_large() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    socket.send_part(opcode::TEXT, &[b'x'; 200 * KIB]).await.unwrap();
    socket.send_part(opcode::CONTINUATION, &[b'x'; 200 * KIB]).await.unwrap();
    assert_eq!(socket.receive().await, Some((opcode::CLOSE, 1009_u16.to_be_bytes().to_vec())));
    assert_eq!(socket.receive().await, None);
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_told_how() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let mut large_length = vec![0x82, 0xff];
    large_length.extend((1_u64 << 40).to_be_bytes());
    large_length.extend([0; 4]);
    let wrong: [(u16, &[u8]); 6] = [
        (1002, &[0x82, 0x02, 1, 2]),                   // not masked
        (1002, &[0xf2, 0x80, 0, 0, 0, 0]),             // reserved bits
        (1002, &[0x83, 0x80, 0, 0, 0, 0]),             // an unknown opcode
        (1002, &[0x80, 0x80, 0, 0, 0, 0]),             // the rest of a message that was not begun
        (1007, &[0x81, 0x82, 0, 0, 0, 0, 0xff, 0xff]), // text that is not UTF-8
        (1009, &large_length),
    ];
    for (code, bytes) in wrong {
        let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
        // What follows must not cost the client the answer.
        socket.stream.write_all(&[bytes, &vec![0; 300 * KIB]].concat()).await.unwrap();
        assert_eq!(socket.receive().await, Some((opcode::CLOSE, code.to_be_bytes().to_vec())), "{bytes:?}");
        assert_eq!(socket.receive().await, None);
    }
    alice.connect().await.until_pong().await;
}
