//! What waits is delivered, in order, in frames that are not too large.

use std::time::Duration;

use bytes::Bytes;

use crate::harness::proto::Envelope;
use crate::harness::{Device, Event, Socket, TestServer, distinct_ids, eventually};

/// `count` messages that say their number.
async fn send_numbered(sender: &Device, receiver: &Device, numbers: std::ops::Range<usize>) {
    for number in numbers {
        sender.send_to(receiver, number.to_string()).await;
    }
}

fn numbers(envelopes: &[Envelope]) -> Vec<usize> {
    let number = |envelope: &Envelope| std::str::from_utf8(&envelope.message).unwrap().parse().unwrap();
    envelopes.iter().map(number).collect()
}

#[tokio::test]
async fn what_waits_comes_first_and_then_what_arrives_all_in_order() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    send_numbered(&alice, &bob, 0..5).await;
    let mut socket = bob.connect().await;
    assert_eq!(numbers(&socket.messages(5).await), [0, 1, 2, 3, 4]);
    send_numbered(&alice, &bob, 5..10).await;
    assert_eq!(numbers(&socket.messages(5).await), [5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn messages_come_ordered_by_time_and_id() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let sends: Vec<_> = (0..40).map(|_| alice.send_to(&bob, "x")).collect();
    futures_util::future::join_all(sends).await;
    let envelopes = bob.connect().await.messages(40).await;
    let order: Vec<(u64, Bytes)> = envelopes.iter().map(|e| (e.timestamp, e.id.clone())).collect();
    assert!(order.is_sorted(), "not ascending by (timestamp, id)");
}

#[tokio::test]
async fn a_frame_holds_at_most_fifty_messages() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    send_numbered(&alice, &bob, 0..120).await;
    let mut socket = bob.connect().await;
    let frames = [socket.mail().await, socket.mail().await, socket.mail().await];
    assert_eq!(frames.each_ref().map(Vec::len), [50, 50, 20]);
    assert_eq!(numbers(&frames.concat()), (0..120).collect::<Vec<_>>());
    assert_eq!(socket.until_pong().await, []);
}

#[tokio::test]
async fn the_number_of_messages_in_a_frame_can_be_configured() {
    let server = TestServer::start_with(|config| config.messaging.batch_limit = 3).await;
    let (alice, bob) = (server.account().await, server.account().await);
    send_numbered(&alice, &bob, 0..7).await;
    let mut socket = bob.connect().await;
    assert_eq!([socket.mail().await.len(), socket.mail().await.len(), socket.mail().await.len()], [3, 3, 1]);
}

#[tokio::test]
async fn a_frame_is_closed_before_it_grows_too_large_and_a_larger_message_travels_alone() {
    let server = TestServer::start_with(|config| config.gateway.max_batch_bytes = 10_000).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let sizes = [4000, 4000, 4000, 20_000, 1, 30_000, 9000, 900, 4000];
    for size in sizes {
        alice.send_to(&bob, vec![7; size]).await;
    }
    let mut socket = bob.connect().await;
    let mut received = Vec::new();
    while received.len() < sizes.len() {
        let frame = socket.mail().await;
        let sizes: Vec<usize> = frame.iter().map(|envelope| envelope.message.len()).collect();
        let encoded: usize = frame.iter().map(prost::Message::encoded_len).sum();
        assert!(encoded <= 10_000 || frame.len() == 1, "{encoded} bytes in a frame of {sizes:?}");
        received.extend(sizes);
    }
    assert_eq!(received, sizes, "nothing is dropped for its size");
}

#[tokio::test]
async fn a_message_comes_once_on_a_connection_and_again_on_each_later_one() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "one").await;
    let mut socket = bob.connect().await;
    let first = socket.expect_message("one").await;
    alice.send_to(&bob, "two").await;
    socket.expect_message("two").await;
    assert_eq!(socket.until_pong().await, []);
    socket.close().await;

    for _ in 0..2 {
        let mut socket = bob.connect().await;
        let again = socket.messages(2).await;
        assert_eq!(again[0], first);
        assert_eq!(again[1].message, "two");
    }
}

#[tokio::test]
async fn every_socket_of_a_device_gets_everything() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "waiting").await;
    let mut sockets = [bob.connect().await, bob.connect().await, bob.connect().await];
    for socket in &mut sockets {
        socket.expect_message("waiting").await;
    }
    alice.send_to(&bob, "fresh").await;
    for socket in &mut sockets {
        socket.expect_message("fresh").await;
    }
}

#[tokio::test]
async fn an_ack_on_one_socket_counts_for_all() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (mut one, mut two) = (bob.connect().await, bob.connect().await);
    alice.send_to(&bob, "hello").await;
    one.expect_message("hello").await;
    let envelope = two.expect_message("hello").await;
    two.ack(&[envelope]).await;
    let database = server.database().await;
    eventually("the message to go", async || database.queued(&bob).await == 0).await;
    assert_eq!(bob.connect().await.until_pong().await, []);
    alice.send_to(&bob, "next").await;
    one.expect_message("next").await;
}

#[tokio::test]
async fn one_socket_too_many_closes_the_oldest() {
    let server = TestServer::start_with(|config| config.gateway.max_connections_per_device = 2).await;
    let bob = server.account().await;
    let (mut oldest, mut middle) = (bob.connect().await, bob.connect().await);
    oldest.until_pong().await;
    middle.until_pong().await;
    let mut newest = bob.connect().await;
    assert_eq!(oldest.until_end().await, [Event::Close(None), Event::End]);
    middle.until_pong().await;
    newest.until_pong().await;
}

#[tokio::test]
async fn an_expired_message_is_not_delivered_even_before_it_is_swept() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "old").await;
    server.clock.advance(Duration::from_hours(24) * 30 - Duration::from_mins(1));
    let bob = bob.log_in().await;
    bob.connect().await.expect_message("old").await;
    alice.log_in().await.send_to(&bob, "new").await;

    server.clock.advance(Duration::from_mins(2));
    bob.connect().await.expect_message("new").await;
}

#[tokio::test]
async fn a_queue_that_cannot_be_read_for_a_while_is_delivered_without_a_reconnect() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    let database = server.database().await;
    // Bodies can be written, but reading one fails.
    let sabotage = if crate::harness::deployment::is_distributed() {
        "ALTER TABLE messages RENAME TO hidden;
             CREATE VIEW messages AS SELECT ctid, position, device_no, id, sender_user, sender_device, received_at,
                 CASE WHEN 1 / (position * 0) = 1 THEN body END AS body FROM hidden;
             CREATE FUNCTION pass_on() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO hidden VALUES (NEW.position, NEW.device_no, NEW.id, NEW.sender_user, NEW.sender_device,
                     NEW.received_at, NEW.body); RETURN NEW; END $$;
             CREATE TRIGGER writing INSTEAD OF INSERT ON messages FOR EACH ROW EXECUTE FUNCTION pass_on();
             CREATE FUNCTION take_away() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 DELETE FROM hidden WHERE position = OLD.position; RETURN OLD; END $$;
             CREATE TRIGGER deleting INSTEAD OF DELETE ON messages FOR EACH ROW EXECUTE FUNCTION take_away()"
    } else {
        "ALTER TABLE messages RENAME TO hidden;
             CREATE VIEW messages AS SELECT position, device_no, id, sender_user, sender_device, received_at,
                 CASE WHEN json('broken') THEN body END AS body FROM hidden;
             CREATE TRIGGER writing INSTEAD OF INSERT ON messages BEGIN
                 INSERT INTO hidden VALUES (NEW.position, NEW.device_no, NEW.id, NEW.sender_user, NEW.sender_device,
                     NEW.received_at, NEW.body); END;
             CREATE TRIGGER deleting INSTEAD OF DELETE ON messages BEGIN
                 DELETE FROM hidden WHERE position = OLD.position; END"
    };
    database.execute(sabotage).await;
    alice.send_to(&bob, "patience").await;
    let nothing = tokio::time::timeout(Duration::from_secs(1), socket.read()).await;
    assert!(nothing.is_err(), "{nothing:?} came out of a broken database");
    database.execute("DROP VIEW messages; ALTER TABLE hidden RENAME TO messages").await;
    socket.expect_message("patience").await;
}

/// Signals come while sessions begin and end all the time. Whoever is left with an open socket gets everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_opens_while_another_closes_is_not_deaf() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    let mut received = Vec::new();
    for round in 0..40 {
        let next = async {
            let mut next = bob.connect().await;
            next.ping(b"ready").await;
            next
        };
        let message = round.to_string();
        let (_, (), next) = tokio::join!(drop_socket(socket), alice.send_to(&bob, &message), next);
        socket = next;
        // Everything not acknowledged comes again, this round's message with it.
        let mut mail = Vec::new();
        while !mail.iter().any(|envelope: &Envelope| envelope.message == message) {
            match socket.next().await {
                Event::Mail(envelopes) => mail.extend(envelopes),
                Event::Pong(_) | Event::Ping => {}
                other => panic!("{other:?}"),
            }
        }
        socket.ack(&mail).await;
        received.extend(mail);
    }
    assert!(distinct_ids(&received).len() >= 40);
}

async fn drop_socket(socket: Socket) {
    drop(socket);
}
