//! Limits for accounts: requests, what reaches one from others, prekey bundles, uploaded bytes.

use std::time::Duration;

use obscura_server::config::Config;
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Device, Keys, Response, TestServer, send_request, signed_key};

/// Rates so low that no token comes back during a test.
fn scarce(config: &mut Config) {
    config.account_rates.per_second = 1;
    config.account_rates.burst = 200;
    config.account_rates.target_per_second = 1;
    config.account_rates.target_burst = 5;
    config.account_rates.bundles_per_hour = 4;
    config.account_rates.one_time_prekeys_per_hour = 1;
    config.account_rates.one_time_prekeys_burst = 1000;
}

/// The id of the last-resort key of an account with Kyber keys.
const LAST_RESORT_ID: u32 = 1_000_000;

/// How many of these requests are let through before one is refused, and the refusal.
async fn until_refused(most: usize, mut send: impl AsyncFnMut() -> Response) -> (usize, Response) {
    for count in 0..most {
        let answer = send().await;
        if answer.status == 429 {
            return (count, answer);
        }
    }
    panic!("{most} requests were let through");
}

/// The wait that a refusal tells.
fn wait(refused: &Response) -> u64 {
    assert!(!refused.error().is_empty());
    let wait = refused.header("retry-after").unwrap();
    assert_eq!(refused.header("x-ratelimit-after"), Some(wait));
    wait.parse().unwrap()
}

async fn send(from: &Device, to: &Device) -> Response {
    from.post_messages(Uuid::new_v4(), &send_request(&[(to, b"hello")])).await
}

#[tokio::test]
async fn an_account_is_limited_whatever_addresses_it_comes_from() {
    let server = TestServer::start_with(|config| {
        scarce(config);
        config.account_rates.burst = 5;
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let second = alice.link().await;
    let mut host = 0;
    let (count, refused) = until_refused(50, async || {
        host += 1;
        let device = if host % 2 == 0 { &alice } else { &second };
        device.request("GET", "/v1/devices").header("x-forwarded-for", format!("198.51.100.{host}")).send().await
    })
    .await;
    assert!((3..20).contains(&count), "{count}");
    assert!((1..=2).contains(&wait(&refused)));
    bob.request("GET", "/v1/devices").send().await.expect(200);
    // Attachments are limited by bytes, and who is nobody takes nothing from anybody.
    alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);
    server.client().get("/v1/devices").send().await.expect(401);
}

#[tokio::test]
async fn a_flood_at_one_account_is_slowed_and_its_friends_still_reach_it() {
    let server = TestServer::start_with(scarce).await;
    let (victim, friend, flooder) = (server.account().await, server.account().await, server.account().await);
    let (count, refused) = until_refused(100, async || send(&flooder, &victim).await).await;
    assert!((25..60).contains(&count), "five of the victim's, twenty of the flooder's own: {count}");
    assert!((1..=2).contains(&wait(&refused)));
    send(&friend, &victim).await.expect(200);
    send(&flooder, &friend).await.expect(200);
}

#[tokio::test]
async fn a_refused_send_queues_nothing_and_may_be_repeated_under_its_key() {
    let server = TestServer::start_with(scarce).await;
    let (victim, friend, flooder) = (server.account().await, server.account().await, server.account().await);
    until_refused(100, async || send(&flooder, &victim).await).await;
    let database = server.database().await;
    let (key, request) = (Uuid::new_v4(), send_request(&[(&friend, b"first"), (&victim, b"second")]));
    let refused = loop {
        let answer = flooder.post_messages(key, &request).await;
        if answer.status == 429 {
            break answer;
        }
    };
    let before = database.queued(&friend).await;
    assert!(before <= 1, "repeats under one key");
    // Here time itself is the event that is awaited.
    tokio::time::sleep(Duration::from_secs(wait(&refused))).await;
    flooder.post_messages(key, &request).await.expect(200);
    assert_eq!(database.queued(&friend).await, 1);
}

#[tokio::test]
async fn an_account_cannot_drain_the_prekeys_of_another() {
    let server = TestServer::start_with(scarce).await;
    let (victim, asker, friend) = (server.account().await, server.account().await, server.account().await);
    let mut turn = 0;
    let (count, refused) = until_refused(10, async || {
        turn += 1;
        let all = format!("/v1/keys/{}", victim.user);
        let one = format!("{all}/devices/{}", victim.id);
        asker.request("GET", if turn % 2 == 0 { &all } else { &one }).send().await
    })
    .await;
    assert_eq!(count, 4);
    assert!((800..=901).contains(&wait(&refused)), "a quarter of an hour");
    assert_eq!(asker.bundles(friend.user).await.len(), 1);
    assert_eq!(friend.bundles(victim.user).await.len(), 1);
    let left = victim.request("GET", "/v1/keys").send().await.expect(200).json();
    assert_eq!(left["oneTimePreKeyCount"], 30 - 5);
    for _ in 0..6 {
        victim.bundles(victim.user).await;
    }
}

/// Each used key is remembered, so this bounds what one account can make the database grow by.
#[tokio::test]
async fn an_account_spends_its_own_one_time_prekeys_within_a_budget_and_still_gets_its_bundles() {
    let server = TestServer::start_with(|config| {
        config.account_rates.one_time_prekeys_per_hour = 1;
        config.account_rates.one_time_prekeys_burst = 4;
    })
    .await;
    let alice = Device::register_with(&server.client(), Keys { pq_one_time: Some(30), ..Keys::default() }).await;
    let friend = server.account().await;
    for turn in 0..8 {
        let bundle = &alice.bundles(alice.user).await[0];
        assert_eq!(bundle["oneTimePreKey"].is_null(), turn >= 4, "{turn}: {bundle}");
        assert_eq!(bundle["pqPreKey"]["keyId"] == LAST_RESORT_ID, turn >= 4, "{turn}: {bundle}");
    }
    let of_alice = &friend.bundles(alice.user).await[0];
    assert!(!of_alice["oneTimePreKey"].is_null(), "others have a budget of their own");
    assert_eq!(server.database().await.number("SELECT count(*) FROM spent_prekeys").await, 5 + 5);
}

/// Each replaced signed prekey is remembered.
#[tokio::test]
async fn an_account_replaces_its_signed_prekeys_so_often() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut id = 1;
    let mut refill = async |device: &Device| {
        id += 1;
        let body = json!({"signedPreKey": signed_key(&device.identity, id), "oneTimePreKeys": []});
        device.request("POST", "/v1/keys").json(&body).send().await
    };
    let (count, refused) = until_refused(400, async || refill(&alice).await).await;
    assert!((300..310).contains(&count), "{count}");
    assert!((1..=16).contains(&wait(&refused)), "a quarter of a minute");
    refill(&bob).await.expect(204);
}

#[tokio::test]
async fn many_askers_do_not_drain_the_one_time_prekeys_of_an_account() {
    let server = TestServer::start_with(|config| {
        config.account_rates.one_time_prekeys_per_hour = 1;
        config.account_rates.one_time_prekeys_burst = 4;
    })
    .await;
    let victim = Device::register_with(&server.client(), Keys { pq_one_time: Some(30), ..Keys::default() }).await;
    let askers = [server.account().await, server.account().await, server.account().await];
    for turn in 0..12 {
        let bundles = askers[turn % 3].bundles(victim.user).await;
        let [bundle] = &bundles[..] else { panic!("one device has one bundle") };
        assert_eq!(bundle["oneTimePreKey"].is_null(), turn >= 4, "{turn}: {bundle}");
        assert_eq!(bundle["pqPreKey"]["keyId"] == LAST_RESORT_ID, turn >= 4, "{turn}: {bundle}");
        assert!(!bundle["signedPreKey"].is_null());
    }
    let path = format!("/v1/keys/{}/devices/{}", victim.user, victim.id);
    let bundle = askers[0].request("GET", &path).send().await.expect(200).json();
    assert!(bundle["oneTimePreKey"].is_null() && bundle["pqPreKey"]["keyId"] == LAST_RESORT_ID, "{bundle}");
    let left = victim.request("GET", "/v1/keys").send().await.expect(200).json();
    assert_eq!((&left["oneTimePreKeyCount"], &left["pqPreKeyCount"]), (&26.into(), &26.into()));
    assert!(!victim.bundles(victim.user).await[0]["oneTimePreKey"].is_null(), "it has a budget of its own");
    let other = &askers[0].bundles(askers[1].user).await[0];
    assert!(!other["oneTimePreKey"].is_null(), "other accounts have their own");
}

#[tokio::test]
async fn an_account_uploads_so_many_bytes_in_a_day_on_any_node_and_after_any_restart() {
    let mut server = TestServer::start_with(|config| config.attachments.bytes_per_day = 1_000_000).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload =
        async |device: &Device, size| device.request("POST", "/v1/attachments").body(vec![7; size]).send().await;
    upload(&alice, 900_000).await.expect(201);
    server.restart().await;
    let refused = upload(&alice, 600_000).await.expect(429);
    assert!((43_190..=43_201).contains(&wait(&refused)), "half a day");
    upload(&alice, 100_000).await.expect(201);
    upload(&bob, 900_000).await.expect(201);
    server.clock.advance(Duration::from_secs(wait(&refused)));
    upload(&alice.log_in().await, 500_000).await.expect(201);
}

#[tokio::test]
async fn the_defaults_are_out_of_the_way_of_a_busy_group() {
    let defaults = Config::embedded("unused".as_ref()).unwrap();
    let server = TestServer::start_with(|config| config.account_rates = defaults.account_rates).await;
    let receiver = server.account().await;
    let members = [server.account().await, server.account().await, server.account().await, server.account().await];
    for member in &members {
        for _ in 0..50 {
            send(member, &receiver).await.expect(200);
        }
    }
}
