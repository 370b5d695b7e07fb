//! A one-time prekey is handed out once, whatever it is uploaded as.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{bundle, counts, keys, register, upload};
use crate::harness::{Device, Keys, TestServer, kyber_key, one_time_key, signed_key};

/// The same key under another id.
fn renamed(key: &Value, id: i64) -> Value {
    let mut key = key.clone();
    key["keyId"] = json!(id);
    key
}

/// The ids under which the one-time keys of these devices are handed out, each with the key. Fails the test if one key comes twice.
async fn handed_out(devices: &[&Device]) -> BTreeMap<String, BTreeSet<i64>> {
    let (mut keys, mut ids) = (BTreeSet::new(), BTreeMap::<String, BTreeSet<i64>>::new());
    for device in devices {
        loop {
            let bundle = bundle(device, device).await;
            let one_time = [&bundle["oneTimePreKey"], &bundle["pqPreKey"]];
            let one_time = one_time.into_iter().filter(|key| !key.is_null() && key["keyId"] != 1_000_000);
            let mut is_empty = true;
            for key in one_time {
                is_empty = false;
                assert!(keys.insert(key["publicKey"].to_string()), "handed out twice: {}", key["keyId"]);
                let of_device = ids.entry(device.id.to_string()).or_default();
                of_device.insert(key["keyId"].as_i64().unwrap());
            }
            if is_empty {
                break;
            }
        }
    }
    ids
}

/// Ids of one device.
fn ids(device: &Device, ids: impl IntoIterator<Item = i64>) -> (String, BTreeSet<i64>) {
    (device.id.to_string(), ids.into_iter().collect())
}

#[tokio::test]
async fn a_key_that_comes_twice_in_one_upload_is_handed_out_once() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(0)).await;
    let (ec, pq) = (one_time_key(1), kyber_key(&alice.identity, 11));
    let mut body = keys(&alice, 2);
    body["oneTimePreKeys"] = json!([ec, renamed(&ec, 2), one_time_key(3)]);
    body["pqPreKeys"] = json!([pq, renamed(&pq, 12), kyber_key(&alice.identity, 13)]);
    for replace in [false, true] {
        body["replace"] = json!(replace);
        body["pqLastResortPreKey"] = kyber_key(&alice.identity, 1_000_000);
        body["signedPreKey"] = signed_key(&alice.identity, 2 + u32::from(replace));
        // Repeated, it is still in order.
        for _ in 0..2 {
            upload(&alice, &body).await.expect(204);
            assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 2, "pqPreKeyCount": 2}));
        }
    }
    assert_eq!(handed_out(&[&alice]).await, [ids(&alice, [1, 3, 11, 13])].into());
}

#[tokio::test]
async fn a_key_that_comes_twice_at_sign_up_reset_or_linking_is_handed_out_once() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let twice = |mut body: Value| {
        let (ec, pq) = (one_time_key(1), kyber_key(&alice.identity, 11));
        body["oneTimePreKeys"] = json!([ec, renamed(&ec, 2)]);
        body["pqPreKeys"] = json!([pq, renamed(&pq, 12)]);
        body
    };
    let full = || Keys { one_time: 0, pq_one_time: Some(0) }.to_json(&alice.identity);
    let mut link = twice(full());
    link["linkSessionId"] = json!(alice.approved_link_session().await);
    let mut reset = twice(full());
    reset["username"] = json!(alice.username);
    reset["password"] = json!(crate::harness::PASSWORD);
    let mut sign_up = reset.clone();
    sign_up["username"] = json!(crate::harness::unique_name("twice"));
    for (path, body, status) in
        [("/v1/devices", link, 201), ("/v1/users/reset", reset, 200), ("/v1/users", sign_up, 201)]
    {
        let answer = server.client().post(path).json(&body).send().await.expect(status).json();
        let device = Device::from_answer(&alice.client, alice.identity.clone(), alice.username.clone(), &answer);
        assert_eq!(handed_out(&[&device]).await, [ids(&device, [1, 11])].into(), "{path}");
    }
}

/// A client that has lost an answer may number its keys anew. It knows the new numbers for sure.
#[tokio::test]
async fn a_stored_key_that_comes_again_under_another_id_is_handed_out_once_under_that_one() {
    let server = TestServer::start().await;
    let alice = register(&server, 0, Some(0)).await;
    let ec: Vec<Value> = (1..=3).map(one_time_key).collect();
    let pq: Vec<Value> = (11..=13).map(|id| kyber_key(&alice.identity, id)).collect();
    let mut body = keys(&alice, 2);
    (body["oneTimePreKeys"], body["pqPreKeys"]) = (json!(ec), json!(pq));
    upload(&alice, &body).await.expect(204);
    let mut again = keys(&alice, 3);
    // An id that is stored keeps its key, so the last one of each stays where it is.
    again["oneTimePreKeys"] = json!([renamed(&ec[0], 101), renamed(&ec[1], 3), one_time_key(102)]);
    again["pqPreKeys"] = json!([renamed(&pq[0], 111), renamed(&pq[1], 13), kyber_key(&alice.identity, 112)]);
    for _ in 0..2 {
        upload(&alice, &again).await.expect(204);
        assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 4, "pqPreKeyCount": 4}));
    }
    assert_eq!(handed_out(&[&alice]).await, [ids(&alice, [2, 3, 101, 102, 12, 13, 111, 112])].into());
}

/// The answer to linking was lost, and the client links again with the keys that it has.
#[tokio::test]
async fn a_key_that_two_devices_of_an_account_upload_is_handed_out_once() {
    let server = TestServer::start().await;
    let alice = register(&server, 2, Some(2)).await;
    let mut link = Keys { one_time: 3, pq_one_time: Some(3) }.to_json(&alice.identity);
    let mut devices = Vec::new();
    for _ in 0..2 {
        link["linkSessionId"] = json!(alice.approved_link_session().await);
        let answer = server.client().post("/v1/devices").json(&link).send().await.expect(201).json();
        devices.push(Device::from_answer(&alice.client, alice.identity.clone(), alice.username.clone(), &answer));
    }
    let [ghost, tablet] = &devices[..] else { unreachable!("two were linked") };
    let mut body = keys(tablet, 2);
    body["oneTimePreKeys"] = json!([link["oneTimePreKeys"][0], one_time_key(9)]);
    for _ in 0..2 {
        upload(tablet, &body).await.expect(204);
    }
    let expected = [ids(&alice, [1, 2]), ids(ghost, [1, 2, 3]), ids(tablet, [9])];
    assert_eq!(handed_out(&[&alice, ghost, tablet]).await, expected.into());
}

#[tokio::test]
async fn a_key_of_every_bundle_is_no_one_time_key() {
    let server = TestServer::start().await;
    let alice = register(&server, 1, Some(1)).await;
    let stored = server.account().await.bundles(alice.user).await.remove(0);
    assert_eq!((&stored["oneTimePreKey"]["keyId"], &stored["pqPreKey"]["keyId"]), (&json!(1), &json!(1)));
    let (ec, pq) = (one_time_key(5), kyber_key(&alice.identity, 5));
    let mut body = keys(&alice, 2);
    body["pqLastResortPreKey"] = kyber_key(&alice.identity, 1_000_000);
    let (signed, last_resort) = (body["signedPreKey"].clone(), body["pqLastResortPreKey"].clone());
    let key = |of: &Value, id: i64| json!({"keyId": id, "publicKey": of["publicKey"]});
    body["oneTimePreKeys"] = json!([ec, key(&stored["signedPreKey"], 6), key(&signed, 7)]);
    body["pqPreKeys"] = json!([pq, renamed(&last_resort, 7)]);
    upload(&alice, &body).await.expect(204);
    assert_eq!(counts(&alice).await, json!({"oneTimePreKeyCount": 1, "pqPreKeyCount": 1}));
    // Nor becomes a one-time key one of every bundle.
    let mut body = keys(&alice, 3);
    body["pqLastResortPreKey"] = renamed(&pq, 1_000_000);
    upload(&alice, &body).await.expect(400);
    assert_eq!(handed_out(&[&alice]).await, [ids(&alice, [5])].into());
}

/// Versions before this one stored what is refused now.
#[tokio::test]
async fn a_key_that_the_database_has_twice_is_handed_out_once() {
    let server = TestServer::start().await;
    let alice = register(&server, 3, Some(3)).await;
    let database = server.database().await;
    for kind in [0, 1] {
        database
            .execute(&format!(
                "UPDATE one_time_prekeys SET public_key = \
                 (SELECT public_key FROM one_time_prekeys WHERE kind = {kind} AND key_id = 1) \
                 WHERE kind = {kind} AND key_id = 2"
            ))
            .await;
    }
    let bob = server.account().await;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let bundle = bundle(&bob, &alice).await;
        seen.push((bundle["oneTimePreKey"]["keyId"].as_i64(), bundle["pqPreKey"]["keyId"].as_i64().unwrap()));
    }
    assert_eq!(seen, [(Some(1), 1), (None, 1_000_000), (Some(3), 3), (None, 1_000_000)]);
}
