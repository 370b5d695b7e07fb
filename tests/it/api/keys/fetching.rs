//! Bundles, and how their one-time prekeys are spent.

use std::collections::HashSet;

use futures_util::future::join_all;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{bundle, counts, drain, id, keys, next_one_time, register, upload};
use crate::harness::{Keys, TestServer, kyber_key, one_time_key, signed_key};

#[tokio::test]
async fn a_bundle_without_pq_keys_is_byte_for_byte_as_it_always_was() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    let (signed, one_time) = (signed_key(&alice.identity, 2), one_time_key(77));
    upload(&alice, &json!({"signedPreKey": signed, "oneTimePreKeys": [one_time]})).await.expect(204);

    let with_key = |one_time: &str| {
        format!(
            r#"{{"deviceId":"{}","registrationId":4711,"identityKey":"{}","signedPreKey":{{"keyId":2,"publicKey":{},"signature":{}}},"oneTimePreKey":{one_time}}}"#,
            alice.id,
            alice.identity.public_key_base64(),
            signed["publicKey"],
            signed["signature"],
        )
    };
    let path = format!("/v1/keys/{}", alice.user);
    let answer = alice.request("GET", &path).send().await.expect(200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let one_time = format!(r#"{{"keyId":77,"publicKey":{}}}"#, one_time["publicKey"]);
    assert_eq!(answer.body, format!(r#"{{"bundles":[{}]}}"#, with_key(&one_time)));
    let exhausted = alice.request("GET", &path).send().await.expect(200);
    assert_eq!(exhausted.body, format!(r#"{{"bundles":[{}]}}"#, with_key("null")));
    let single = alice.request("GET", &format!("{path}/devices/{}", alice.id)).send().await.expect(200);
    assert_eq!(single.body, with_key("null"));
}

#[tokio::test]
async fn a_pq_prekey_is_the_last_member_and_comes_as_uploaded() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    let mut body = keys(&alice, 2);
    let (one_time, last_resort) = (kyber_key(&alice.identity, 5), kyber_key(&alice.identity, i32::MAX as u32));
    body["pqPreKeys"] = json!([one_time]);
    body["pqLastResortPreKey"] = last_resort.clone();
    upload(&alice, &body).await.expect(204);
    let path = format!("/v1/keys/{}/devices/{}", alice.user, alice.id);
    for key in [&one_time, &last_resort, &last_resort, &last_resort] {
        let answer = alice.request("GET", &path).send().await.expect(200);
        let expected = format!(
            r#","oneTimePreKey":null,"pqPreKey":{{"keyId":{},"publicKey":{},"signature":{}}}}}"#,
            key["keyId"], key["publicKey"], key["signature"]
        );
        let text = String::from_utf8(answer.body.to_vec()).unwrap();
        assert!(text.ends_with(&expected), "{text}");
    }
}

#[tokio::test]
async fn all_devices_come_oldest_first_and_each_spends_its_own_keys() {
    let server = TestServer::start().await;
    let (alice, bob) = (register(&server, 2, Some(1)).await, server.account().await);
    let second = alice.link_with(Keys { one_time: 1, pq_one_time: None }).await;
    let bundles = bob.bundles(alice.user).await;
    let ids: Vec<&Value> = bundles.iter().map(|bundle| &bundle["deviceId"]).collect();
    assert_eq!(ids, [&id(&alice), &id(&second)]);
    for bundle in &bundles {
        assert_eq!(bundle["identityKey"], alice.identity.public_key_base64(), "the account's key");
        assert!(bundle["oneTimePreKey"]["keyId"].is_i64());
    }
    assert!(bundles[0].get("pqPreKey").is_some() && bundles[1].get("pqPreKey").is_none());
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 1, "pqPreKeyCount": 0}));
    assert_eq!(counts(&second).await, json!({"oneTimePreKeyCount": 0, "pqPreKeyCount": 0}));
    assert_eq!(bob.bundles(alice.user).await[1]["oneTimePreKey"], Value::Null);
}

#[tokio::test]
async fn a_single_bundle_spends_a_key_of_that_device_only() {
    let server = TestServer::start().await;
    let (alice, bob) = (register(&server, 3, Some(3)).await, server.account().await);
    let second = alice.link_with(Keys { one_time: 3, pq_one_time: Some(3) }).await;
    assert_eq!(bundle(&bob, &second).await["deviceId"], id(&second));
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 3, "pqPreKeyCount": 3}));
    assert_eq!(counts(&second).await, json!({"oneTimePreKeyCount": 2, "pqPreKeyCount": 2}));
}

#[tokio::test]
async fn ones_own_bundles_can_be_fetched() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let second = alice.link().await;
    assert_eq!(second.bundles(second.user).await.len(), 2);
}

#[tokio::test]
async fn unknown_users_and_devices_give_404_and_malformed_ids_400() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (unknown_user, user) = (Uuid::new_v4(), alice.user);
    for path in [
        format!("/v1/keys/{unknown_user}"),
        format!("/v1/keys/{unknown_user}/devices/{}", alice.id),
        format!("/v1/keys/{user}/devices/{unknown_user}"),
        format!("/v1/keys/{user}/devices/{}", bob.id),
    ] {
        alice.request("GET", &path).send().await.expect(404);
    }
    for path in ["/v1/keys/x".into(), "/v1/keys/x/devices/y".into(), format!("/v1/keys/{user}/devices/y")] {
        alice.request("GET", &path).send().await.expect(400);
        server.client().get(&path).send().await.expect(401);
    }
    let spelled = format!("/v1/keys/{}/devices/{}", alice.user.simple(), alice.id.simple());
    alice.request("GET", &spelled).send().await.expect(200);
}

#[tokio::test]
async fn no_one_time_prekey_is_handed_out_twice_to_50_who_ask_at_once() {
    let server = TestServer::start().await;
    let alice = register(&server, 40, Some(40)).await;
    let second = alice.link_with(Keys { one_time: 60, pq_one_time: Some(60) }).await;
    let mut askers = Vec::new();
    for _ in 0..5 {
        askers.push(server.account().await);
    }
    let path = format!("/v1/keys/{}", alice.user);
    let answers = join_all((0..50).map(|n| askers[n % 5].request("GET", &path).send())).await;
    let bundles: Vec<Value> = answers.into_iter().map(|answer| answer.expect(200).json()).collect();
    for (position, device, expected) in [(0, &alice, 40), (1, &second, 50)] {
        let of_device = || bundles.iter().map(|answer| &answer["bundles"][position]);
        assert!(of_device().all(|bundle| bundle["deviceId"] == id(device)));
        let one_time: Vec<i64> = of_device().filter_map(|b| b["oneTimePreKey"]["keyId"].as_i64()).collect();
        assert_eq!((one_time.len(), one_time.iter().collect::<HashSet<_>>().len()), (expected, expected));
        let pq: Vec<i64> = of_device().map(|b| b["pqPreKey"]["keyId"].as_i64().unwrap()).collect();
        let one_time: HashSet<_> = pq.iter().filter(|id| **id != 1_000_000).collect();
        assert_eq!(one_time.len(), expected);
        assert_eq!(pq.iter().filter(|id| **id == 1_000_000).count(), 50 - expected);
    }
}

#[tokio::test]
async fn a_key_handed_out_stays_so_after_a_restart() {
    let mut server = TestServer::start().await;
    let alice = register(&server, 3, None).await;
    let first = next_one_time(&alice).await.unwrap();
    server.restart().await;
    let rest = drain(&alice).await;
    assert_eq!(rest.len(), 2);
    assert!(!rest.contains(&first));
}

#[tokio::test]
async fn a_fetch_that_leaves_few_keys_tells_the_device() {
    let server = TestServer::start_with(|config| config.prekeys.refill_threshold = 3).await;
    let (alice, bob) = (register(&server, 4, None).await, server.account().await);
    let second = alice.link_with(Keys { one_time: 9, pq_one_time: Some(3) }).await;
    let (mut of_alice, mut of_second) = (alice.connect().await, second.connect().await);

    bundle(&bob, &second).await;
    let status = of_second.pre_keys().await;
    assert_eq!((status.one_time_pre_key_count, status.pq_pre_key_count, status.min_threshold), (8, 2, 3));

    bundle(&bob, &alice).await; // leaves 3, which is not fewer than 3
    bundle(&bob, &alice).await;
    let status = of_alice.pre_keys().await;
    assert_eq!((status.one_time_pre_key_count, status.pq_pre_key_count, status.min_threshold), (2, 0, 3));
}
