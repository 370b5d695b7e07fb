//! Any request may go to any node.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Client, Device, Event, Keys, PASSWORD, Socket, TestServer, distinct_ids, send_request, within};

/// Two nodes. No look of a session at its inbox comes to the aid of a lost signal.
async fn two_nodes() -> (TestServer, TestServer) {
    let first = TestServer::start_node_with(|config| config.gateway.resync_interval = Duration::from_hours(24)).await;
    let second = first.start_beside().await;
    (first, second)
}

async fn dismissed(mut socket: Socket) {
    let end = within("the socket to be closed", socket.until_end()).await;
    assert!(matches!(end.last(), Some(Event::End | Event::Broken(_))), "{end:?}");
}

#[tokio::test]
async fn a_message_sent_at_one_node_reaches_a_socket_at_another() {
    let (a, b) = two_nodes().await;
    let (alice, bob) = (a.account().await, a.account().await);
    let mut socket = bob.at(&b.client()).connect().await;
    socket.until_pong().await;
    for text in ["one", "two", "three"] {
        alice.send_to(&bob, text).await;
        let envelope = socket.expect_message(text).await;
        socket.ack(&[envelope]).await;
    }
}

#[tokio::test]
async fn a_device_removed_at_one_node_loses_its_socket_at_another() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    let tablet = alice.link().await;
    let mut socket = tablet.at(&b.client()).connect().await;
    socket.until_pong().await;
    alice.remove(&tablet).await;
    dismissed(socket).await;
}

#[tokio::test]
async fn a_device_linked_at_one_node_is_shown_to_a_socket_at_another() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    let mut socket = alice.at(&b.client()).connect_with("device-list").await;
    socket.until_pong().await;
    let tablet = alice.link().await;
    let Event::Devices(list) = within("the new list", socket.next()).await else { panic!("something else came") };
    assert_eq!(list.device_ids, [alice.id_bytes(), tablet.id_bytes()]);
}

#[tokio::test]
async fn a_log_in_at_one_node_ends_the_session_at_another() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    let before = alice.at(&b.client());
    let ticket = before.ticket().await;
    let mut socket = before.connect().await;
    socket.until_pong().await;
    let again = alice.log_in().await;
    dismissed(socket).await;
    before.request("GET", "/v1/devices").send().await.expect(401);
    assert_eq!(Socket::open(b.address(), &ticket).await.err(), Some(401));
    again.at(&b.client()).connect().await.until_pong().await;
}

#[tokio::test]
async fn a_log_out_or_a_reset_at_one_node_closes_sockets_at_another() {
    let (a, b) = two_nodes().await;
    let (alice, bob) = (a.account().await, a.account().await);
    let mut sockets = [alice.at(&b.client()).connect().await, bob.at(&b.client()).connect().await];
    for socket in &mut sockets {
        socket.until_pong().await;
    }
    alice.log_out().await;
    bob.reset().await;
    for socket in sockets {
        dismissed(socket).await;
    }
    alice.at(&b.client()).request("GET", "/v1/devices").send().await.expect(401);
}

#[tokio::test]
async fn a_ticket_made_at_one_node_opens_a_socket_at_another_once() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    let ticket = alice.ticket().await;
    let openings = join_all([b.address(), a.address(), b.address()].map(|node| Socket::open(node, &ticket))).await;
    assert_eq!(openings.iter().filter(|opened| opened.is_ok()).count(), 1);
    assert!(openings.iter().filter_map(|opened| opened.as_ref().err()).all(|status| *status == 401));
}

#[tokio::test]
async fn a_device_joins_over_three_nodes() {
    let (a, b) = two_nodes().await;
    let c = b.start_beside().await;
    let alice = a.account().await;
    let session = alice.at(&b.client()).approved_link_session().await;
    let polled = c.client().get(&format!("/v1/link-sessions/{session}")).send().await.expect(200);
    assert_eq!(polled.body, "approved");
    let tablet = alice.at(&c.client()).finish_link(&session, Keys::default()).await;
    let mut socket = tablet.at(&a.client()).connect().await;
    let bob = b.account().await;
    bob.send(&[(&alice, b"both"), (&tablet, b"both")]).await;
    socket.expect_message("both").await;
}

#[tokio::test]
async fn a_link_session_is_used_once_though_two_nodes_are_asked() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    for _ in 0..5 {
        let session = alice.approved_link_session().await;
        let join = |client: Client| {
            let mut body = Keys { one_time: 0, pq_one_time: None }.to_json(&alice.identity);
            body["linkSessionId"] = json!(session);
            async move { client.post("/v1/devices").json(&body).send().await.status }
        };
        let mut statuses = join_all([join(a.client()), join(b.client())]).await;
        statuses.sort_unstable();
        assert_eq!(statuses[0], 201, "{statuses:?}");
        assert!(statuses[1] >= 400 && statuses[1] < 500, "{statuses:?}");
        let devices = alice.request("GET", "/v1/devices").send().await.expect(200).json();
        for device in devices.as_array().into_iter().flatten().filter(|device| device["isPrimary"] == json!(false)) {
            let path = format!("/v1/devices/{}", device["deviceId"].as_str().expect("an id"));
            alice.request("DELETE", &path).send().await.expect(204);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_time_prekey_is_handed_out_once_by_all_nodes_together() {
    let (a, b) = two_nodes().await;
    let keys = Keys { one_time: 60, pq_one_time: Some(60) };
    let target = Device::register_with(&a.client(), keys).await;
    let asker = a.account().await;
    let askers = [asker.at(&a.client()), asker.at(&b.client())];
    let bundles = join_all((0..80).map(|n| askers[n % 2].bundles(target.user))).await;
    let ids = |member: &str, last_resort: i64| -> Vec<i64> {
        let ids = bundles.iter().filter_map(|bundles| bundles[0][member]["keyId"].as_i64());
        ids.filter(|id| *id != last_resort).collect()
    };
    for member in ["oneTimePreKey", "pqPreKey"] {
        let handed_out = ids(member, 1_000_000);
        assert_eq!(handed_out.len(), 60, "{member}: none is passed over while there are some left");
        assert_eq!(handed_out.iter().collect::<BTreeSet<_>>().len(), 60, "{member}: one was handed out twice");
    }
}

#[tokio::test]
async fn few_prekeys_after_a_fetch_at_one_node_are_told_at_another() {
    let (a, b) = two_nodes().await;
    let target = Device::register_with(&a.client(), Keys { one_time: 20, pq_one_time: None }).await;
    let mut socket = target.at(&b.client()).connect().await;
    socket.until_pong().await;
    a.account().await.bundles(target.user).await;
    assert_eq!(socket.pre_keys().await.one_time_pre_key_count, 19);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_send_handed_to_both_nodes_at_once_is_queued_once() {
    let (a, b) = two_nodes().await;
    let (alice, bob) = (a.account().await, a.account().await);
    let mut socket = bob.at(&b.client()).connect().await;
    let hands = [alice.at(&a.client()), alice.at(&b.client())];
    for round in 0..20 {
        let text = format!("round {round}");
        let request = send_request(&[(&bob, text.as_bytes())]);
        let key = Uuid::new_v4();
        let answers = join_all((0..6).map(|n| hands[n % 2].post_messages(key, &request))).await;
        answers.into_iter().for_each(|answer| drop(answer.expect(200)));
        let envelope = socket.expect_message(&text).await;
        socket.ack(&[envelope]).await;
    }
    assert_eq!(socket.until_pong().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_exchanged_once_by_all_nodes_together() {
    let (a, b) = two_nodes().await;
    for _ in 0..5 {
        let alice = a.account().await;
        let body = json!({"refreshToken": alice.refresh_token});
        let refresh = |client: Client| {
            let body = body.clone();
            async move { client.post("/v1/session/refresh").json(&body).send().await }
        };
        let clients = [a.client(), b.client(), a.client(), b.client()];
        let answers = join_all(clients.map(refresh)).await;
        let rotated: Vec<_> = answers.iter().filter(|answer| answer.status == 200).collect();
        assert_eq!(rotated.len(), 1, "{:?}", answers.iter().map(|answer| answer.status).collect::<Vec<_>>());
        let token = rotated[0].json()["token"].as_str().expect("a token").to_owned();
        b.client().get("/v1/devices").token(&token).send().await.expect(200);
    }
}

/// 16 senders at two nodes write to one device, and transactions are held open in between: a cursor that passes over
/// what commits late would lose some of it for the life of the socket.
#[tokio::test(flavor = "multi_thread")]
async fn sixteen_senders_at_two_nodes_reach_one_socket_completely_and_in_order() {
    const SENDERS: usize = 16;
    const EACH: usize = 40;
    let (a, b) = two_nodes().await;
    let bob = a.account().await;
    let mut socket = bob.at(&b.client()).connect().await;
    socket.until_pong().await;
    let database = a.database().await;
    let mut senders = Vec::new();
    for n in 0..SENDERS {
        let node = [&a, &b][n % 2];
        let (sender, bob) = (node.account().await, bob.clone());
        senders.push(tokio::spawn(async move {
            for number in 0..EACH {
                sender.send_to(&bob, format!("{n} {number}")).await;
            }
        }));
    }
    let holding = tokio::spawn(async move {
        for _ in 0..10 {
            let held = database.hold_account(bob.user).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            held.release().await;
        }
        database.close().await;
    });
    let mut envelopes = Vec::new();
    while envelopes.len() < SENDERS * EACH {
        let batch = socket.mail().await;
        socket.ack(&batch).await;
        envelopes.extend(batch);
    }
    for sender in senders {
        within("a sender", sender).await.unwrap();
    }
    within("the transactions", holding).await.unwrap();
    assert_eq!(distinct_ids(&envelopes).len(), SENDERS * EACH, "a message was repeated");
    let texts: Vec<String> =
        envelopes.iter().map(|envelope| String::from_utf8(envelope.message.to_vec()).unwrap()).collect();
    for n in 0..SENDERS {
        let own: Vec<&String> = texts.iter().filter(|text| text.starts_with(&format!("{n} "))).collect();
        let expected: Vec<String> = (0..EACH).map(|number| format!("{n} {number}")).collect();
        assert!(own.into_iter().eq(expected.iter()), "the mail of one sender came out of order");
    }
    assert_eq!(socket.until_pong().await, []);
}

/// A send sees the devices either before or after a change, never in between.
#[tokio::test(flavor = "multi_thread")]
async fn device_sets_that_change_at_one_node_never_let_a_send_at_another_miss_a_device() {
    let (a, b) = two_nodes().await;
    let (alice, bob) = (a.account().await, b.account().await);
    let bob_at_b = bob.at(&b.client());
    for _ in 0..8 {
        let linking = alice.link_with(Keys { one_time: 0, pq_one_time: None });
        let to_one = send_request(&[(&alice, b"to one device")]);
        let sending = bob_at_b.post_messages(Uuid::new_v4(), &to_one);
        let (tablet, answer) = tokio::join!(linking, sending);
        let covered = answer.expect(200).body.is_empty();
        let late = bob_at_b.post_messages(Uuid::new_v4(), &send_request(&[(&alice, b"too few")])).await.expect(200);
        assert!(!late.body.is_empty(), "a send that began after the link missed the new device (before: {covered})");
        let removing = alice.remove(&tablet);
        let both = send_request(&[(&alice, b"to both"), (&tablet, b"to both")]);
        let ((), answer) = tokio::join!(removing, bob_at_b.post_messages(Uuid::new_v4(), &both));
        answer.expect(200);
        let database = b.database().await;
        let orphans = "SELECT count(*) FROM messages WHERE device_no NOT IN (SELECT no FROM devices)";
        assert_eq!(database.number(orphans).await, 0, "mail was queued for a device that is gone");
        database.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_limit_holds_though_the_senders_are_at_two_nodes() {
    let a = TestServer::start_node_with(|config| {
        (config.messaging.max_inbox_size, config.messaging.sender_share_percent) = (10, 100)
    })
    .await;
    let b = a.start_beside().await;
    let bob = a.account().await;
    let senders = [a.account().await, b.account().await];
    let database = a.database().await;
    for round in 0..10 {
        let request = send_request(&[(&bob, format!("{round}").as_bytes())]);
        let sends = senders.iter().map(|sender| sender.post_messages(Uuid::new_v4(), &request));
        for answer in join_all(sends).await {
            assert!([200, 429].contains(&answer.status), "{}", answer.status);
        }
        assert!(database.queued(&bob).await <= 10);
    }
    assert_eq!(database.queued(&bob).await, 10);
}

#[tokio::test]
async fn the_bytes_of_an_inbox_hold_though_the_senders_are_at_two_nodes() {
    let a = TestServer::start_node_with(|config| {
        (config.messaging.inbox_max_bytes, config.messaging.sender_share_percent) = (10_000, 100);
    })
    .await;
    let b = a.start_beside().await;
    let bob = a.account().await;
    let senders = [a.account().await, b.account().await];
    let database = a.database().await;
    let request = send_request(&[(&bob, &[7; 1_500])]);
    for _ in 0..10 {
        let sends = senders.iter().map(|sender| sender.post_messages(Uuid::new_v4(), &request));
        for answer in join_all(sends).await {
            assert!([200, 429].contains(&answer.status), "{}", answer.status);
        }
        assert!(database.number("SELECT COALESCE(SUM(octet_length(body)), 0) FROM messages").await <= 10_000);
    }
    assert_eq!(database.queued(&bob).await, 6);
}

#[tokio::test]
async fn an_attachment_uploaded_at_one_node_is_downloaded_at_another() {
    let (a, b) = two_nodes().await;
    let alice = a.account().await;
    let bytes = Bytes::from(vec![7; 300_000]);
    let upload = alice.request("POST", "/v1/attachments").body(bytes.clone());
    let id = upload.send().await.expect(201).json()["id"].as_str().expect("an id").to_owned();
    let download = alice.at(&b.client()).request("GET", &format!("/v1/attachments/{id}"));
    assert!(download.send().await.expect(200).body == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_at_once_on_an_empty_database_all_come_up() {
    let nodes = TestServer::start_together(4).await;
    let alice = nodes[0].account().await;
    let body = json!({"username": alice.username, "password": PASSWORD, "deviceId": alice.id.to_string()});
    nodes[3].client().post("/v1/session").json(&body).send().await.expect(200);
    for node in nodes {
        node.stop().await;
    }
}
