//! Uploading more prekeys.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{bundle, counts, drain, keys, next_one_time, next_pq, register, upload};
use crate::harness::signer::Identity;
use crate::harness::{TestServer, kyber_key, one_time_key, signed_key};

#[tokio::test]
async fn the_signed_prekey_is_replaced_and_the_others_are_added() {
    let server = TestServer::start().await;
    let alice = register(&server, 2, None).await;
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = json!([one_time_key(3), one_time_key(4)]);
    body["identityKey"] = json!("ignored");
    body["registrationId"] = json!("ignored");
    upload(&alice, &body).await.expect(204);
    assert_eq!(bundle(&alice, &alice).await["signedPreKey"], body["signedPreKey"]);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 3, "pqPreKeyCount": 0}));
}

#[tokio::test]
async fn the_id_of_the_signed_prekey_has_to_rise() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    upload(&alice, &keys(&alice, 5)).await.expect(204);
    for id in [5, 4, 0] {
        let mut body = keys(&alice, id);
        body["oneTimePreKeys"] = json!([one_time_key(1)]);
        upload(&alice, &body).await.expect(400);
    }
    assert_eq!(counts(&alice).await["oneTimePreKeyCount"], 0, "nothing of it was stored");
    assert_eq!(bundle(&alice, &alice).await["signedPreKey"]["keyId"], 5);
    upload(&alice, &keys(&alice, 6)).await.expect(204);
    let mut body = keys(&alice, 7);
    body["signedPreKey"]["keyId"] = json!(-7);
    upload(&alice, &body).await.expect(400);
}

#[tokio::test]
async fn the_oldest_keys_make_room_so_that_the_total_is_the_maximum() {
    let server = TestServer::start_with(|config| config.prekeys.max = 10).await;
    let alice = register(&server, 8, Some(8)).await;
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = (101..=105).map(one_time_key).collect();
    body["pqPreKeys"] = (101..=104).map(|id| kyber_key(&alice.identity, id)).collect();
    upload(&alice, &body).await.expect(204);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 10, "pqPreKeyCount": 10}));
    let mut pq = BTreeSet::new();
    for _ in 0..10 {
        let bundle = bundle(&alice, &alice).await;
        assert!(bundle["oneTimePreKey"]["keyId"].as_i64().is_some_and(|id| id > 3), "{bundle}");
        assert!(pq.insert(bundle["pqPreKey"]["keyId"].as_i64().unwrap()));
    }
    assert_eq!(pq, (3..=8).chain(101..=104).collect());
    assert_eq!(next_pq(&alice).await, Some(1_000_000));
}

#[tokio::test]
async fn a_hundred_keys_of_a_kind_are_the_default_maximum_of_one_upload_and_of_the_store() {
    let server = TestServer::start().await;
    let alice = register(&server, 100, Some(100)).await;
    let ec = |count: u32| (1001..=1000 + count).map(one_time_key).collect::<Value>();
    let pq = |count: u32| (1001..=1000 + count).map(|id| kyber_key(&alice.identity, id)).collect::<Value>();
    for (one_time, pq_one_time) in [(ec(101), pq(0)), (ec(0), pq(101))] {
        let mut body = keys(&alice, 2);
        body["oneTimePreKeys"] = one_time;
        body["pqPreKeys"] = pq_one_time;
        upload(&alice, &body).await.expect(400);
    }
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = ec(100);
    body["pqPreKeys"] = pq(100);
    upload(&alice, &body).await.expect(204);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 100, "pqPreKeyCount": 100}));
    assert_eq!(next_one_time(&alice).await, Some(1001), "all the old ones made room");
}

#[tokio::test]
async fn an_id_that_is_stored_keeps_its_key() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = json!([one_time_key(1)]);
    upload(&alice, &body).await.expect(204);
    let mut again = keys(&alice, 3);
    again["oneTimePreKeys"] = json!([one_time_key(1), one_time_key(2)]);
    upload(&alice, &again).await.expect(204);
    assert_eq!(counts(&alice).await["oneTimePreKeyCount"], 2);
    assert_eq!(bundle(&alice, &alice).await["oneTimePreKey"], body["oneTimePreKeys"][0]);
    assert_eq!(drain(&alice).await, [2].into());
}

#[tokio::test]
async fn pq_members_that_are_absent_or_null_change_nothing() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(2)).await;
    upload(&alice, &keys(&alice, 2)).await.expect(204);
    let mut nulls = keys(&alice, 3);
    nulls["pqLastResortPreKey"] = Value::Null;
    nulls["pqPreKeys"] = Value::Null;
    upload(&alice, &nulls).await.expect(204);
    assert_eq!(counts(&alice).await["pqPreKeyCount"], 2);

    let mut body = keys(&alice, 4);
    body["pqLastResortPreKey"] = kyber_key(&alice.identity, 2_000_000);
    upload(&alice, &body).await.expect(204);
    for expected in [1, 2, 2_000_000, 2_000_000] {
        assert_eq!(next_pq(&alice).await, Some(expected));
    }
}

#[tokio::test]
async fn one_time_pq_keys_need_a_last_resort_key_stored_or_beside_them() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = json!([one_time_key(1)]);
    body["pqPreKeys"] = json!([kyber_key(&alice.identity, 1)]);
    upload(&alice, &body).await.expect(400);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 0, "pqPreKeyCount": 0}));
    body["pqLastResortPreKey"] = kyber_key(&alice.identity, 9);
    upload(&alice, &body).await.expect(204);
    let mut more = keys(&alice, 3);
    more["pqPreKeys"] = json!([kyber_key(&alice.identity, 2)]);
    upload(&alice, &more).await.expect(204);
    assert_eq!(counts(&alice).await["pqPreKeyCount"], 2);
}

#[tokio::test]
async fn bad_keys_are_refused_and_nothing_of_the_upload_is_stored() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(0)).await;
    let stranger = Identity::generate();
    let text = |value: &Value, member: &str| value[member].as_str().unwrap().to_owned();
    let with = |mut key: Value, member: &str, value: Value| {
        key[member] = value;
        key
    };
    let signed = signed_key(&alice.identity, 2);
    let kyber = kyber_key(&alice.identity, 1);
    let url_safe = |text: String| text.replace('+', "-").replace('/', "_");
    let bad = [
        ("signedPreKey", signed_key(&stranger, 2)),
        ("signedPreKey", with(signed.clone(), "signature", json!("AAAA"))),
        ("signedPreKey", with(signed.clone(), "publicKey", json!(text(&signed, "publicKey") + "\n"))),
        ("signedPreKey", with(signed.clone(), "publicKey", json!(text(&signed, "publicKey").replacen('B', "A", 1)))),
        ("oneTimePreKeys", json!([one_time_key(1), one_time_key(2), one_time_key(1)])),
        ("oneTimePreKeys", json!([with(one_time_key(1), "publicKey", json!("BQUF"))])),
        ("oneTimePreKeys", json!([with(one_time_key(1), "publicKey", json!("no base64"))])),
        ("pqLastResortPreKey", kyber_key(&stranger, 1)),
        ("pqLastResortPreKey", with(kyber.clone(), "keyId", json!(-1))),
        ("pqLastResortPreKey", with(kyber.clone(), "publicKey", signed["publicKey"].clone())),
        ("pqLastResortPreKey", with(kyber.clone(), "publicKey", json!(url_safe(text(&kyber, "publicKey"))))),
        ("pqPreKeys", json!([kyber, kyber])),
        ("pqPreKeys", json!([kyber_key(&alice.identity, 1), kyber_key(&stranger, 2)])),
    ];
    for (member, value) in bad {
        let mut body = keys(&alice, 2);
        body["oneTimePreKeys"] = json!([one_time_key(9)]);
        body[member] = value;
        let answer = upload(&alice, &body).await;
        assert_eq!(answer.status, 400, "{member}: {}", body[member]);
    }
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 0, "pqPreKeyCount": 0}));
    assert_eq!(bundle(&alice, &alice).await["signedPreKey"]["keyId"], 1);
    upload(&alice, &keys(&alice, 2)).await.expect(204);
}

#[tokio::test]
async fn bodies_of_the_wrong_shape_give_422() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for (member, value) in [
        ("signedPreKey", Value::Null),
        ("signedPreKey", json!({"keyId": 2, "publicKey": "BQ=="})),
        ("oneTimePreKeys", Value::Null),
        ("oneTimePreKeys", json!({})),
        ("oneTimePreKeys", json!([{"keyId": "1", "publicKey": "BQ=="}])),
        ("oneTimePreKeys", json!([{"keyId": 2_147_483_648_u32, "publicKey": "BQ=="}])),
        ("oneTimePreKeys", json!([{"keyId": 1.5, "publicKey": "BQ=="}])),
        ("pqPreKeys", json!([null])),
        ("pqLastResortPreKey", json!([])),
    ] {
        let mut body = keys(&alice, 2);
        body[member] = value;
        assert_eq!(upload(&alice, &body).await.status, 422, "{member}: {}", body[member]);
    }
    server.client().post("/v1/keys").json(&json!({})).send().await.expect(401);
    upload(&alice, &keys(&alice, 2)).await.expect(204);
}

#[tokio::test]
async fn of_uploads_with_one_signed_id_at_once_exactly_one_is_taken() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, None).await;
    let bodies: Vec<Value> = (1..=8)
        .map(|id| json!({"signedPreKey": signed_key(&alice.identity, 2), "oneTimePreKeys": [one_time_key(id)]}))
        .collect();
    let answers = join_all(bodies.iter().map(|body| upload(&alice, body))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 204).count(), 1);
    assert_eq!(answers.iter().filter(|answer| answer.status == 400).count(), 7);
    assert_eq!(counts(&alice).await["oneTimePreKeyCount"], 1);
}
