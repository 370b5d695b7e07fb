//! An inbox without room, as senders and receivers see it.

use std::time::Duration;

use futures_util::future::join_all;
use prost::Message as _;
use uuid::Uuid;

use crate::harness::proto::InboxNotice;
use crate::harness::{Device, Event, Socket, TestServer, eventually, outcome, send_request};

async fn small(max: u32) -> TestServer {
    TestServer::start_with(|config| {
        (config.messaging.max_inbox_size, config.messaging.sender_share_percent) = (max, 100);
    })
    .await
}

async fn empty(server: &TestServer, device: &Device) {
    let mut socket = device.connect().await;
    let database = server.database().await;
    let waiting = usize::try_from(database.queued(device).await).unwrap();
    let mail = socket.messages(waiting).await;
    socket.ack(&mail).await;
    eventually("the inbox to be empty", async || database.queued(device).await == 0).await;
}

async fn notice(socket: &mut Socket) -> Option<InboxNotice> {
    let events = socket.until_pong().await;
    events.into_iter().find_map(|event| match event {
        Event::Notice(notice) => Some(notice),
        _ => None,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_from_thirty_accounts_leaves_what_a_friend_had_sent() {
    let server = TestServer::start().await;
    let (bob, friend) = (server.account().await, server.account().await);
    for number in 0..200 {
        friend.send_to(&bob, format!("friend {number}")).await;
    }
    let attackers = join_all((0..30).map(|_| server.account())).await;
    let request = send_request(&[(&bob, b"x")]);
    let floods = attackers.iter().map(|attacker| async {
        let mut taken = 0;
        for _ in 0..33 {
            let answer = attacker.post_messages(Uuid::new_v4(), &request).await;
            match answer.status {
                200 => taken += 1,
                429 => assert!(answer.header("retry-after").is_some()),
                status => panic!("{status}"),
            }
        }
        taken
    });
    let taken: usize = join_all(floods).await.into_iter().sum();
    assert_eq!(taken, 800, "as many as there was room for");
    let received = bob.connect().await.messages(1000).await;
    let friends = received.iter().filter(|envelope| envelope.message.starts_with(b"friend")).count();
    assert_eq!(friends, 200);
}

#[tokio::test]
async fn a_repeat_after_acks_queues_only_the_rest() {
    let server = small(2).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = bob.link().await;
    for _ in 0..2 {
        alice.send(&[(&bob, b"before"), (&tablet, b"before")]).await;
    }
    empty(&server, &tablet).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"phone"), (&tablet, b"tablet")]));
    let refused = alice.post_messages(key, &request).await.expect(429);
    assert!(refused.header("retry-after").is_some_and(|secs| secs.parse::<u64>().unwrap() > 0));
    let database = server.database().await;
    assert_eq!(database.queued(&tablet).await, 1, "the full inbox of one device does not hold up the other");
    assert_eq!(database.queued(&bob).await, 2);
    alice.post_messages(key, &request).await.expect(429);
    empty(&server, &bob).await;
    eventually("the repeat to find room", async || alice.post_messages(key, &request).await.status == 200).await;
    let again = alice.post_messages(key, &request).await.expect(200);
    assert!(again.body.is_empty() && again.header("idempotency-replayed").is_some());
    assert_eq!((database.queued(&bob).await, database.queued(&tablet).await), (1, 1));
    bob.connect().await.expect_message("phone").await;
    tablet.connect().await.expect_message("tablet").await;
}

#[tokio::test]
async fn a_repeat_names_a_device_that_came_after_the_refusal() {
    let server = small(1).await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "before").await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"phone")]));
    alice.post_messages(key, &request).await.expect(429);
    let tablet = bob.link().await;
    let first = alice.post_messages(key, &request).await.expect(200);
    let told = outcome(&first);
    assert_eq!(told.device_mismatches.len(), 1, "not everything was queued");
    assert_eq!(told.device_mismatches[0].missing_device_ids, [tablet.id_bytes()]);
    assert!(told.refused_devices.is_empty() && told.invalid_device_ids.is_empty());
    empty(&server, &bob).await;
    let again = alice.post_messages(key, &request).await.expect(200);
    assert_eq!(again.body, first.body, "a mismatch that was told stands");
    assert!(again.header("idempotency-replayed").is_some());
    let database = server.database().await;
    assert_eq!((database.queued(&bob).await, database.queued(&tablet).await), (0, 0));
    let (key, both) = (Uuid::new_v4(), send_request(&[(&bob, b"phone"), (&tablet, b"tablet")]));
    eventually("room", async || alice.post_messages(key, &both).await.status == 200).await;
    bob.connect().await.expect_message("phone").await;
    tablet.connect().await.expect_message("tablet").await;
}

#[tokio::test]
async fn a_repeat_for_an_account_that_was_started_over_names_its_new_device() {
    let server = small(1).await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    alice.send(&[(&bob, b"before"), (&carol, b"before")]).await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"x"), (&carol, b"x")]));
    alice.post_messages(key, &request).await.expect(429);
    let new = bob.reset().await;
    empty(&server, &carol).await;
    let lenient = async || {
        let request = alice.messages_request(key, request.encode_to_vec()).header("prefer", "handling=lenient");
        outcome(&request.send().await.expect(200))
    };
    eventually("room for carol", async || lenient().await.refused_devices.is_empty()).await;
    let told = lenient().await;
    assert_eq!(told.invalid_device_ids, [bob.id_bytes()]);
    assert_eq!(told.device_mismatches.len(), 1);
    assert_eq!(told.device_mismatches[0].missing_device_ids, [new.id_bytes()]);
    carol.connect().await.expect_message("x").await;
}

#[tokio::test]
async fn a_client_that_understands_parts_gets_200_with_the_refused_devices() {
    let server = small(1).await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    alice.send_to(&bob, "before").await;
    let request = send_request(&[(&bob, b"x"), (&carol, b"x")]);
    let send = alice.messages_request(Uuid::new_v4(), request.encode_to_vec());
    let answer = send.header("prefer", "respond-async, handling=lenient").send().await.expect(200);
    assert_eq!(answer.header("preference-applied"), Some("handling=lenient"));
    assert!(answer.header("retry-after").is_some());
    let refused = outcome(&answer).refused_devices;
    assert_eq!(refused.len(), 1);
    assert_eq!((&refused[0].device_id, refused[0].reason), (&bob.id_bytes(), 1));
    // Probes and empty requests need no room.
    alice.post_messages(Uuid::new_v4(), &send_request(&[])).await.expect(200);
}

/// Sends one message under the lenient preference. Returns why it was refused, if it was.
async fn reason(sender: &Device, to: &Device) -> Option<i32> {
    let request = send_request(&[(to, b"x")]);
    let send = sender.messages_request(Uuid::new_v4(), request.encode_to_vec()).header("prefer", "handling=lenient");
    let answer = send.send().await.expect(200);
    if answer.body.is_empty() {
        return None;
    }
    let refused = outcome(&answer).refused_devices;
    assert_eq!((refused.len(), &refused[0].device_id), (1, &to.id_bytes()));
    assert!(answer.header("retry-after").is_some_and(|secs| secs.parse::<u64>().unwrap() > 0));
    Some(refused[0].reason)
}

#[tokio::test]
async fn a_sender_is_told_that_it_has_its_share_of_the_inbox() {
    let server = TestServer::start_with(|config| config.messaging.max_inbox_size = 8).await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    for _ in 0..5 {
        assert_eq!(reason(&alice, &bob).await, None);
    }
    assert_eq!(reason(&alice, &bob).await, Some(2));
    assert_eq!(reason(&carol, &bob).await, None, "there is room for others");
}

#[tokio::test]
async fn a_sender_is_told_that_its_day_is_used_up() {
    let server = TestServer::start_with(|config| config.messaging.sender_bytes_per_day = 64).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut taken = 0;
    let told = loop {
        match reason(&alice, &bob).await {
            None => taken += 1,
            Some(reason) => break reason,
        }
        assert!(taken <= 64, "each has at least a byte");
    };
    assert_eq!(told, 3);
    assert_eq!(reason(&bob, &alice).await, None, "it is the day of the sender");
}

#[tokio::test]
async fn a_receiver_who_asks_is_told_how_much_expired_and_since_which_hour() {
    let server = TestServer::start_with(|config| config.messaging.cleanup_interval = Duration::from_millis(100)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "never read").await;
    server.clock.advance(Duration::from_hours(31 * 24));
    let database = server.database().await;
    eventually("the message to expire", async || database.queued(&bob).await == 0).await;
    let bob = bob.log_in().await;
    let told = notice(&mut bob.connect_with_notices().await).await.expect("a notice");
    assert_eq!((told.expired_count, told.refused_count), (1, 0));
    let (hour, now) = (Duration::from_hours(1).as_millis() as u64, server.clock.now().millis().unsigned_abs());
    assert_eq!(told.since % hour, 0);
    assert!(now - hour < told.since + hour && told.since <= now, "{} is not of this hour: {now}", told.since);
}

#[tokio::test]
async fn a_receiver_who_asks_is_told_what_was_refused_until_it_acknowledges_that() {
    let server = small(1).await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "kept").await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"x")]));
    for _ in 0..3 {
        alice.post_messages(key, &request).await.expect(429);
    }
    let mut former = bob.connect().await;
    assert_eq!(notice(&mut former).await, None, "an old client is sent nothing that it doesn't know");
    let told = notice(&mut bob.connect_with_notices().await).await.expect("a notice");
    assert_eq!((told.expired_count, told.refused_count, told.id.len()), (0, 1, 16));
    // It was not acknowledged, so it comes again.
    let mut socket = bob.connect_with_notices().await;
    let again = notice(&mut socket).await.expect("the notice again");
    socket.ack_ids(vec![again.id]).await;
    let database = server.database().await;
    eventually("the notice to be cleared", async || database.number("SELECT count(*) FROM inbox_notices").await == 0)
        .await;
    assert_eq!(notice(&mut bob.connect_with_notices().await).await, None);
    assert_eq!(database.queued(&bob).await, 1, "a notice acknowledges no mail");
}

#[tokio::test]
async fn a_flood_leaves_only_the_flooded_member_of_a_group_out() {
    let server = TestServer::start_with(|config| {
        (config.account_rates.target_per_second, config.account_rates.target_burst) = (1, 1);
    })
    .await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    let to_bob = send_request(&[(&bob, b"flood")]);
    let to_both = send_request(&[(&bob, b"g"), (&carol, b"g")]);
    let database = server.database().await;
    let before = database.queued(&carol).await;
    // Bob may be sent to again after a second.
    while alice.post_messages(Uuid::new_v4(), &to_bob).await.status == 200 {}
    let answer = alice.post_messages(Uuid::new_v4(), &to_both).await;
    answer.expect(429);
    assert_eq!(database.queued(&carol).await, before + 1, "the other member has it");
    // A client that understands parts is told whom it left out, and why; once carol may be sent to again.
    let told = async || {
        while alice.post_messages(Uuid::new_v4(), &to_bob).await.status == 200 {}
        let request = alice.messages_request(Uuid::new_v4(), to_both.encode_to_vec());
        let answer = request.header("prefer", "handling=lenient").send().await;
        if answer.status != 200 {
            return false;
        }
        let refused = outcome(&answer).refused_devices;
        assert_eq!(refused.len(), 1);
        assert_eq!((&refused[0].device_id, refused[0].reason), (&bob.id_bytes(), 4));
        true
    };
    eventually("carol to be free", told).await;
}
