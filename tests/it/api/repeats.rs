//! A send that comes again has no second effect.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::harness::{Device, PATIENCE, Response, TestServer, outcome, send_request, within};

const DAY: Duration = Duration::from_hours(24);

fn is_replay(response: &Response) -> (bool, bool) {
    let flag = |name: &str| match response.header(name) {
        None => false,
        Some("true") => true,
        Some(other) => panic!("{name}: {other}"),
    };
    (flag("idempotency-replayed"), flag("idempotency-mismatch"))
}

async fn people(server: &TestServer) -> (Device, Device) {
    (server.account().await, server.account().await)
}

#[tokio::test]
async fn a_repeat_gets_the_first_answer_and_queues_nothing() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    let first = alice.post_messages(key, &request).await.expect(200);
    assert_eq!(is_replay(&first), (false, false));
    for _ in 0..3 {
        let again = alice.post_messages(key, &request).await.expect(200);
        assert_eq!(again.body, first.body);
        assert_eq!(is_replay(&again), (true, false));
    }
    assert_eq!(server.database().await.queued(&bob).await, 1);
}

#[tokio::test]
async fn a_stored_mismatch_is_answered_byte_for_byte_after_the_devices_have_changed() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let old = bob.link().await;
    bob.remove(&old).await;
    let tablet = bob.link().await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&old, b"o"), (&bob, b"b")]));
    let first = alice.post_messages(key, &request).await.expect(200);
    assert_eq!(outcome(&first).device_mismatches.len(), 1);

    bob.remove(&tablet).await;
    let again = alice.post_messages(key, &request).await.expect(200);
    assert_eq!(again.body, first.body, "the stored outcome stands, though the request would succeed now");
    assert_eq!(server.database().await.queued(&bob).await, 0);
    alice.send_to(&bob, "under a new key").await;
    bob.connect().await.expect_message("under a new key").await;
}

#[tokio::test]
async fn another_body_under_an_old_key_gets_the_old_answer_and_is_told_so() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let carol = server.account().await;
    let key = Uuid::new_v4();
    let first = alice.post_messages(key, &send_request(&[(&bob, b"first")])).await.expect(200);
    let other = alice.post_messages(key, &send_request(&[(&carol, b"other")])).await.expect(200);
    assert_eq!(other.body, first.body);
    assert_eq!(is_replay(&other), (true, true));
    assert_eq!(server.database().await.queued(&carol).await, 0);
    bob.connect().await.expect_message("first").await;
}

#[tokio::test]
async fn a_malformed_repeat_is_refused_though_its_key_is_known() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let key = Uuid::new_v4();
    alice.post_messages(key, &send_request(&[(&bob, b"first")])).await.expect(200);
    alice.messages_request(key, &b"\xff"[..]).send().await.expect(400);
    alice.post_messages(key, &send_request(&[(&bob, b"")])).await.expect(400);
    alice.messages_request(key, vec![0; 2 * 1024 * 1024 + 1]).send().await.expect(413);
}

#[tokio::test]
async fn a_key_belongs_to_one_sending_device() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (tablet, carol) = (alice.link().await, server.account().await);
    let key = Uuid::new_v4();
    for (sender, message) in [(&alice, b"one"), (&tablet, b"two"), (&carol, b"six")] {
        let answer = sender.post_messages(key, &send_request(&[(&bob, message)])).await.expect(200);
        assert_eq!(is_replay(&answer), (false, false));
    }
    assert_eq!(bob.connect().await.messages(3).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_repeats_at_once_one_is_queued_and_all_are_answered_alike() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let key = Uuid::new_v4();
    let sends: Vec<_> = (0..20)
        .map(|_| {
            let (alice, request) = (alice.clone(), send_request(&[(&bob, b"once")]));
            tokio::spawn(async move { alice.post_messages(key, &request).await.expect(200) })
        })
        .collect();
    let mut firsts = 0;
    for send in sends {
        let answer = within("an answer", send).await.unwrap();
        assert!(answer.body.is_empty());
        firsts += u32::from(!is_replay(&answer).0);
    }
    assert_eq!(firsts, 1);
    assert_eq!(server.database().await.queued(&bob).await, 1);
}

#[tokio::test]
async fn a_repeat_after_a_restart_is_still_a_repeat() {
    let mut server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    alice.post_messages(key, &request).await.expect(200);
    server.restart().await;
    assert_eq!(is_replay(&alice.post_messages(key, &request).await.expect(200)), (true, false));
    bob.connect().await.expect_message("once").await;
    assert_eq!(server.database().await.queued(&bob).await, 1);
}

#[tokio::test]
async fn a_repeat_after_the_ack_delivers_nothing_again() {
    let mut server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    alice.post_messages(key, &request).await.expect(200);
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("once").await;
    socket.ack(&[envelope]).await;
    socket.close().await;
    server.restart().await;

    assert_eq!(is_replay(&alice.post_messages(key, &request).await.expect(200)), (true, false));
    alice.send_to(&bob, "another").await;
    bob.connect().await.expect_message("another").await;
}

#[tokio::test]
async fn after_a_day_a_message_that_still_waits_is_not_queued_again() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    alice.post_messages(key, &request).await.expect(200);
    for _ in 0..3 {
        server.clock.advance(DAY + Duration::from_mins(5));
        let again = alice.log_in().await.post_messages(key, &request).await.expect(200);
        assert!(again.body.is_empty());
        assert_eq!(server.database().await.queued(&bob).await, 1);
    }
}

#[tokio::test]
async fn after_a_day_the_key_of_a_delivered_message_is_free_again() {
    let server = TestServer::start().await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"again")]));
    alice.post_messages(key, &request).await.expect(200);
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("again").await;
    socket.ack(&[envelope]).await;
    let database = server.database().await;
    crate::harness::eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;

    server.clock.advance(DAY + Duration::from_mins(5));
    let again = alice.log_in().await.post_messages(key, &request).await.expect(200);
    assert_eq!(is_replay(&again), (false, false));
    socket.expect_message("again").await;
}

#[tokio::test]
async fn a_send_that_the_database_could_not_take_leaves_nothing_and_may_be_repeated() {
    let server = TestServer::start_with(crate::harness::impatient).await;
    let (alice, bob) = people(&server).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    let database = server.database().await;
    let (held, asked) = (database.hold_write().await, Instant::now());
    alice.post_messages(key, &request).await.expect(503);
    assert!(asked.elapsed() < PATIENCE / 2, "refused after {:?}", asked.elapsed());
    held.release().await;
    let again = alice.post_messages(key, &request).await.expect(200);
    assert_eq!(is_replay(&again), (false, false));
    assert_eq!(database.queued(&bob).await, 1);
}
