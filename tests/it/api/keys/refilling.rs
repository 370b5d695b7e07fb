//! Uploading more prekeys.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{bundle, counts, drain, keys, next_one_time, next_pq, register, upload};
use crate::harness::signer::Identity;
use crate::harness::{Device, TestServer, kyber_key, one_time_key, signed_key};

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

/// An upload with these one-time keys beside a new signed prekey.
fn upload_of(device: &Device, signed: u32, one_time: &Value, pq: &Value) -> Value {
    let mut body = keys(device, signed);
    body["oneTimePreKeys"] = one_time.clone();
    body["pqPreKeys"] = pq.clone();
    body
}

#[tokio::test]
async fn a_used_one_time_prekey_that_is_uploaded_again_is_not_handed_out_again() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(0)).await;
    let ec: Value = (1..=3).map(one_time_key).collect();
    let pq: Value = (1..=3).map(|id| kyber_key(&alice.identity, id)).collect();
    upload(&alice, &upload_of(&alice, 2, &ec, &pq)).await.expect(204);
    let used = bundle(&alice, &alice).await;
    // The answer was lost: the client repeats everything, then puts its keys beside the next signed prekey.
    for signed in [3, 4] {
        upload(&alice, &upload_of(&alice, signed, &ec, &pq)).await.expect(204);
        assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 2, "pqPreKeyCount": 2}));
    }
    // Under other ids and beside new ones it is left out too.
    let renamed = |key: &Value, id: u32| {
        let mut key = key.clone();
        key["keyId"] = json!(id);
        key
    };
    let ec = json!([renamed(&used["oneTimePreKey"], 101), one_time_key(102)]);
    let pq = json!([renamed(&used["pqPreKey"], 101), kyber_key(&alice.identity, 102)]);
    upload(&alice, &upload_of(&alice, 5, &ec, &pq)).await.expect(204);
    assert_eq!(drain(&alice).await, [2, 3, 102].into());
    assert_eq!(next_pq(&alice).await, Some(1_000_000));
    assert_eq!(server.database().await.number("SELECT count(*) FROM spent_prekeys").await, 8 + 4, "and 4 signed ones");
}

#[tokio::test]
async fn a_pruned_prekey_may_come_again_since_it_was_never_handed_out() {
    let server = TestServer::start_with(|config| config.prekeys.max = 2).await;
    let alice = register(&server, 0, None).await;
    let first: Value = (1..=2).map(one_time_key).collect();
    upload(&alice, &upload_of(&alice, 2, &first, &json!([]))).await.expect(204);
    let second: Value = (3..=4).map(one_time_key).collect();
    upload(&alice, &upload_of(&alice, 3, &second, &json!([]))).await.expect(204);
    upload(&alice, &upload_of(&alice, 4, &first, &json!([]))).await.expect(204);
    assert_eq!(drain(&alice).await, [1, 2].into());
}

#[tokio::test]
async fn spent_prekeys_are_remembered_when_the_account_has_another_identity_key() {
    let server = TestServer::start().await;
    let alice = register(&server, 3, None).await;
    let tablet = alice.link().await;
    alice.bundles(alice.user).await;
    let database = server.database().await;
    let remembered = async || database.number("SELECT count(*) FROM spent_prekeys").await;
    assert_eq!(remembered().await, 2);
    alice.remove(&tablet).await;
    assert_eq!(remembered().await, 3, "the signed prekey of the tablet too");
    alice.reset().await;
    assert_eq!(remembered().await, 3);
}

#[tokio::test]
async fn an_upload_that_is_repeated_is_204_and_changes_nothing() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(0)).await;
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = (1..=3).map(one_time_key).collect();
    body["pqPreKeys"] = (1..=3).map(|id| kyber_key(&alice.identity, id)).collect();
    body["pqLastResortPreKey"] = kyber_key(&alice.identity, 7);
    for replace in [false, true] {
        body["replace"] = json!(replace);
        upload(&alice, &body).await.expect(204);
    }
    bundle(&alice, &alice).await;
    for replace in [false, true] {
        body["replace"] = json!(replace);
        upload(&alice, &body).await.expect(204);
        assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 2, "pqPreKeyCount": 2}));
    }
}

#[tokio::test]
async fn one_request_replaces_all_keys_whatever_the_stored_ids() {
    let server = TestServer::start().await;
    let alice = register(&server, 5, Some(5)).await;
    // The highest id there is, after which no ordinary refill can follow.
    let mut poisoned = keys(&alice, 2);
    poisoned["signedPreKey"]["keyId"] = json!(i32::MAX);
    upload(&alice, &poisoned).await.expect(204);
    upload(&alice, &keys(&alice, 3)).await.expect(400);

    let mut body = keys(&alice, 3);
    body["replace"] = json!(true);
    body["oneTimePreKeys"] = json!([one_time_key(1), one_time_key(2)]);
    body["pqPreKeys"] = json!([kyber_key(&alice.identity, 1)]);
    upload(&alice, &body).await.expect(400);
    assert_eq!(
        counts(&alice).await,
        json!({"oneTimePreKeyCount": 5, "pqPreKeyCount": 5}),
        "a last-resort key is needed"
    );
    body["pqLastResortPreKey"] = kyber_key(&alice.identity, 1_000_000);
    upload(&alice, &body).await.expect(204);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 2, "pqPreKeyCount": 1}));
    let first = bundle(&alice, &alice).await;
    assert_eq!(first["signedPreKey"], body["signedPreKey"]);
    assert_eq!(first["oneTimePreKey"], body["oneTimePreKeys"][0], "the key with the stored id was replaced");
    assert_eq!(first["pqPreKey"], body["pqPreKeys"][0]);
    assert_eq!(bundle(&alice, &alice).await["pqPreKey"], body["pqLastResortPreKey"]);
    upload(&alice, &keys(&alice, 4)).await.expect(204);
}

#[tokio::test]
async fn a_last_resort_key_under_another_id_or_one_that_was_used_once_is_refused() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(2)).await;
    let used = bundle(&alice, &alice).await["pqPreKey"].clone();
    bundle(&alice, &alice).await;
    let stored = bundle(&alice, &alice).await["pqPreKey"].clone();
    assert_eq!(stored["keyId"], 1_000_000);
    let with = |key: &Value, id: i64| {
        let mut body = keys(&alice, 2);
        body["pqLastResortPreKey"] = key.clone();
        body["pqLastResortPreKey"]["keyId"] = json!(id);
        body
    };
    upload(&alice, &with(&stored, i64::from(i32::MAX))).await.expect(400);
    upload(&alice, &with(&used, 5)).await.expect(400);
    upload(&alice, &with(&stored, 1_000_000)).await.expect(204);
}
