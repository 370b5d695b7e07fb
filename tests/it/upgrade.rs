//! An upgrade from the version that landed before: its database opens, and its nodes work beside ours meanwhile.
//!
//! `scripts/former` builds the former program; `OBSCURA_TEST_FORMER` names it.

use std::collections::BTreeSet;
use std::path::Path;

use futures_util::future::join_all;
use prost::Message as _;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::cluster::traffic::Traffic;
use crate::harness::{
    Binary, Client, Database, Device, Event, Keys, PATIENCE, Socket, deployment, outcome, send_request, signed_key,
    within,
};

/// The former program on a database that it makes itself.
async fn former(folder: &Path) -> Binary {
    if deployment::is_distributed() {
        deployment::make_empty_database(folder).await;
    }
    Binary::start_former(deployment::options(folder).await).await
}

/// A node of the former program and one of ours, on one database, which ours brings up to date while the other one serves.
async fn old_and_new(folder: &Path) -> (Binary, Binary) {
    deployment::make_empty_database(folder).await;
    let layout = deployment::distributed_options(folder).await;
    let old = Binary::start_former(layout.clone()).await;
    (old, Binary::start_node(&layout).await)
}

/// The ids of the one-time prekeys that come with the bundles of a user; the last-resort key is none. None come with an
/// answer that asks to be repeated.
async fn one_time_keys(asker: &Device, target: &Device) -> Vec<(&'static str, i64)> {
    let mut ids = Vec::new();
    let answer = asker.request("GET", &format!("/v1/keys/{}", target.user)).send().await;
    if answer.status == 503 {
        return ids;
    }
    for bundle in answer.expect(200).json()["bundles"].as_array().unwrap() {
        let id = |member: &str| bundle[member]["keyId"].as_i64();
        ids.extend(id("oneTimePreKey").map(|id| ("ec", id)));
        ids.extend(id("pqPreKey").filter(|id| *id < 1_000_000).map(|id| ("pq", id)));
    }
    ids
}

async fn expect_dismissal(mut socket: Socket) {
    let end = within("the socket to be closed", socket.until_end()).await;
    assert!(matches!(end.last(), Some(Event::End | Event::Broken(_))), "{end:?}");
}

/// Receives exactly these messages in this order, and acknowledges them.
async fn expect_mail(device: &Device, texts: &[&str]) {
    let mut socket = device.connect().await;
    let mail = socket.messages(texts.len()).await;
    let received: Vec<&[u8]> = mail.iter().map(|envelope| &envelope.message[..]).collect();
    assert_eq!(received, texts.iter().map(|text| text.as_bytes()).collect::<Vec<_>>());
    socket.ack(&mail).await;
    socket.until_pong().await;
}

async fn refresh(client: &Client, token: &str) -> Value {
    client.post("/v1/session/refresh").json(&json!({"refreshToken": token})).send().await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_the_former_version_opens_with_everything_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = former(folder.path()).await;
    let keys = Keys { one_time: 30, pq_one_time: Some(30) };
    let alice = Device::register_with(&old.client(), keys).await;
    let bob = Device::register_with(&old.client(), keys).await;
    let tablet = alice.link().await;
    let spent: BTreeSet<_> = one_time_keys(&alice, &bob).await.into_iter().collect();
    assert_eq!(spent.len(), 2, "one of each kind");
    let picture = vec![7; 300_000];
    let upload = alice.request("POST", "/v1/attachments").body(picture.clone()).send().await.expect(201).json();
    for text in ["read", "one", "two"] {
        alice.send_to(&bob, text).await;
    }
    let mut socket = bob.connect().await;
    let mail = socket.messages(3).await;
    socket.ack(&mail[..1]).await;
    socket.until_pong().await;
    drop(socket);
    let (key, repeated) = (Uuid::new_v4(), send_request(&[(&alice, b"three"), (&tablet, b"three")]));
    bob.post_messages(key, &repeated).await.expect(200);
    let (partial_key, partial) = (Uuid::new_v4(), send_request(&[(&alice, b"without the tablet")]));
    let mismatch = bob.post_messages(partial_key, &partial).await.expect(200);
    assert_eq!(outcome(&mismatch).device_mismatches.len(), 1);
    let link = alice.approved_link_session().await;
    bob.request("PUT", "/v1/push-token").json(&json!({"token": "a token"})).send().await.expect(204);
    old.terminate();
    assert!(old.exit(PATIENCE).await.success());

    let new = old.start_again(&[]).await;
    let path = format!("/v1/attachments/{}", upload["id"].as_str().unwrap());
    assert_eq!(bob.request("GET", &path).send().await.expect(200).body, picture);
    assert_eq!(bob.post_messages(key, &repeated).await.expect(200).body.len(), 0);
    let again = bob.post_messages(partial_key, &partial).await.expect(200);
    assert_eq!(again.body, mismatch.body, "the outcome that was stored");
    alice.send_to(&bob, "four").await;
    expect_mail(&bob, &["one", "two", "four"]).await;
    bob.send(&[(&alice, b"five"), (&tablet, b"five")]).await;
    expect_mail(&alice, &["three", "five"]).await;
    expect_mail(&tablet, &["three", "five"]).await;
    let laptop = alice.finish_link(&link, keys).await;
    assert_eq!(
        alice.request("GET", "/v1/devices").send().await.expect(200).json()["devices"].as_array().unwrap().len(),
        3
    );
    laptop.connect().await.until_pong().await;
    let rest: Vec<_> = join_all((0..5).map(|_| one_time_keys(&alice, &bob))).await.concat();
    assert!(!rest.is_empty() && rest.iter().all(|key| !spent.contains(key)), "a prekey was handed out twice");
    let refreshed = refresh(&new.client(), &bob.refresh_token).await;
    assert_eq!(refreshed["deviceId"], json!(bob.id.to_string()));
    bob.log_in().await.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_repeated_or_reordered_while_old_and_new_nodes_work_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    deployment::make_empty_database(folder.path()).await;
    let layout = deployment::distributed_options(folder.path()).await;
    let old = Binary::start_former(layout.clone()).await;
    // The migrations run while the old node is at work.
    let before = Traffic::start(&[old.client()], &[old.client()]).await;
    let new = Binary::start_node(&layout).await;
    let during = Traffic::start(&[new.client(), old.client()], &[old.client(), new.client()]).await;
    before.goes_on(300).await;
    during.goes_on(300).await;
    before.finish().await;
    during.finish().await;
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_time_prekey_is_handed_out_once_by_old_and_new_nodes_together() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new(folder.path()).await;
    let target = Device::register_with(&old.client(), Keys { one_time: 30, pq_one_time: Some(30) }).await;
    let asker = Device::register(&new.client()).await;
    let askers = [asker.at(&old.client()), asker];
    let mut keys = Vec::new();
    while keys.len() < 60 {
        let more = join_all((0..8).map(|n| one_time_keys(&askers[n % 2], &target))).await.concat();
        keys.extend(more);
    }
    assert_eq!((keys.len(), keys.iter().collect::<BTreeSet<_>>().len()), (60, 60));
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_out_at_an_old_or_a_new_node_closes_sockets_at_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new(folder.path()).await;
    for (here, there) in [(&old, &new), (&new, &old)] {
        let device = Device::register(&here.client()).await;
        let mut socket = device.at(&there.client()).connect().await;
        socket.until_pong().await;
        device.log_out().await;
        expect_dismissal(socket).await;
        device.at(&there.client()).request("GET", "/v1/devices").send().await.expect(401);
        let device = device.at(&there.client()).log_in().await;
        device.at(&here.client()).connect().await.until_pong().await;
    }
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_is_repeated_across_old_and_new_nodes_without_acting_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new(folder.path()).await;
    let (alice, bob) = (Device::register(&old.client()).await, Device::register(&new.client()).await);
    for (first, second) in [(&old, &new), (&new, &old)] {
        let (key, body) = (Uuid::new_v4(), send_request(&[(&bob, b"once")]).encode_to_vec());
        for node in [first, second, first] {
            let answer = alice.at(&node.client()).messages_request(key, body.clone()).send().await;
            assert!(answer.expect(200).body.is_empty());
        }
    }
    alice.send_to(&bob, "the next").await;
    expect_mail(&bob, &["once", "once", "the next"]).await;
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_node_refused_an_old_node_with_room_queues_once() {
    let folder = tempfile::tempdir().unwrap();
    deployment::make_empty_database(folder.path()).await;
    let mut layout = deployment::distributed_options(folder.path()).await;
    let old = Binary::start_former(layout.clone()).await;
    layout.extend(["--max-inbox-size=1".to_owned(), "--inbox-sender-share-percent=100".to_owned()]);
    let new = Binary::start_node(&layout).await;
    let (alice, bob) = (Device::register(&old.client()).await, Device::register(&new.client()).await);
    alice.at(&new.client()).send_to(&bob, "kept").await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"refused")]));
    alice.at(&new.client()).post_messages(key, &request).await.expect(429);
    for node in [&old, &new, &old] {
        assert!(alice.at(&node.client()).post_messages(key, &request).await.expect(200).body.is_empty());
    }
    expect_mail(&bob, &["kept", "refused"]).await;
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prekey_that_was_used_at_an_old_or_a_new_node_is_known_at_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new(folder.path()).await;
    let asker = Device::register(&new.client()).await;
    for (here, there, place) in [(&old, &new, "new"), (&new, &old, "old")] {
        let target = Device::register_with(&here.client(), Keys { one_time: 0, pq_one_time: Some(0) }).await;
        let mut body = Keys { one_time: 2, pq_one_time: Some(2) }.to_json(&target.identity);
        body["signedPreKey"] = signed_key(&target.identity, 2);
        target.request("POST", "/v1/keys").json(&body).send().await.expect(204);
        let spent = one_time_keys(&asker.at(&here.client()), &target).await;
        assert_eq!(spent.len(), 2, "one of each kind");
        // The answer to an upload was lost, or a copy of the device was restored: the same keys come again.
        body["signedPreKey"] = signed_key(&target.identity, 3);
        target.at(&there.client()).request("POST", "/v1/keys").json(&body).send().await.expect(204);
        let rest = one_time_keys(&asker.at(&there.client()), &target).await;
        assert_eq!(rest.len(), 2, "the other one of each kind");
        assert!(rest.iter().all(|key| !spent.contains(key)), "handed out twice: {spent:?}, {rest:?}");
        assert_eq!(
            one_time_keys(&asker.at(&here.client()), &target).await,
            [],
            "no more are stored, uploaded at the {place} node"
        );
    }
    deployment::drop_state(folder.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn prekeys_used_before_a_device_was_removed_at_an_old_node_stay_known() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new(folder.path()).await;
    let (alice, asker) = (Device::register(&old.client()).await, Device::register(&new.client()).await);
    let tablet = alice.link().await;
    let known = "SELECT count(*) FROM spent_prekeys";
    let layout = deployment::distributed_options(folder.path()).await;
    let database = Database::open(&deployment::config_of(&layout).database).await;
    one_time_keys(&asker, &alice).await;
    let before = database.number(known).await;
    assert!(before > 0);
    let path = format!("/v1/devices/{}", tablet.id);
    alice.at(&old.client()).request("DELETE", &path).send().await.expect(204);
    assert!(database.number(known).await >= before);
    deployment::drop_state(folder.path());
}
