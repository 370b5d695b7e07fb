//! A signed prekey that the account has had is refused, on whichever device, since anyone may have its signature.

use futures_util::future::join_all;
use serde_json::json;

use super::{bundle, counts, drain, keys, register, upload};
use crate::harness::{Device, Keys, PASSWORD, TestServer, one_time_key};

#[tokio::test]
async fn the_stored_signed_prekey_under_another_id_is_refused_and_the_next_refill_works() {
    let server = TestServer::start().await;
    let alice = register(&server, 2, None).await;
    let tablet = alice.link().await;
    // A thief of the access token can fetch every bundle, but has no identity key to sign with.
    let of_alice = bundle(&alice, &alice).await["signedPreKey"].clone();
    let of_tablet = bundle(&alice, &tablet).await["signedPreKey"].clone();
    upload(&alice, &keys(&alice, 2)).await.expect(204);
    let current = bundle(&alice, &alice).await["signedPreKey"].clone();
    for (stolen, what) in [(&current, "its own"), (&of_alice, "a former one"), (&of_tablet, "that of another device")] {
        for replace in [false, true] {
            let mut body = json!({"signedPreKey": stolen, "oneTimePreKeys": [one_time_key(9)], "replace": replace});
            body["signedPreKey"]["keyId"] = json!(i32::MAX);
            assert_eq!(upload(&alice, &body).await.status, 400, "{what}");
        }
    }
    // Under its own id it brings no invented one-time keys in.
    for replace in [false, true] {
        let body = json!({"signedPreKey": current, "oneTimePreKeys": [one_time_key(9)], "replace": replace});
        upload(&alice, &body).await.expect(400);
    }
    assert_eq!(counts(&alice).await["oneTimePreKeyCount"], 0);
    upload(&alice, &keys(&alice, 3)).await.expect(204);
}

/// A client that once fetched the device's bundle still has its signed prekey and the signature.
#[tokio::test]
async fn the_signed_prekey_of_a_removed_device_is_refused_and_the_next_refill_works() {
    let server = TestServer::start().await;
    let alice = register(&server, 2, None).await;
    let (phone, tablet) = (alice.link().await, alice.link().await);
    let former = bundle(&alice, &tablet).await["signedPreKey"].clone();
    upload(&tablet, &keys(&tablet, 2)).await.expect(204);
    let last = bundle(&alice, &tablet).await;
    alice.remove(&tablet).await;
    for device in [&alice, &phone] {
        for stolen in [&former, &last["signedPreKey"]] {
            let mut body = json!({"signedPreKey": stolen, "oneTimePreKeys": [one_time_key(9)]});
            body["signedPreKey"]["keyId"] = json!(i32::MAX);
            upload(device, &body).await.expect(400);
        }
        upload(device, &keys(device, 2)).await.expect(204);
    }
    let mut body = keys(&phone, 3);
    body["oneTimePreKeys"] = json!([last["oneTimePreKey"], one_time_key(99)]);
    let before = counts(&phone).await["oneTimePreKeyCount"].as_i64().unwrap();
    upload(&phone, &body).await.expect(204);
    assert_eq!(counts(&phone).await["oneTimePreKeyCount"], before + 1, "without the used one");
}

#[tokio::test]
async fn the_signed_prekeys_of_before_a_reset_with_the_same_identity_key_are_refused() {
    let server = TestServer::start().await;
    let alice = register(&server, 2, None).await;
    let tablet = alice.link().await;
    let stolen = [&alice, &tablet].map(async |device| bundle(&alice, device).await["signedPreKey"].clone());
    let [of_alice, of_tablet] = join_all(stolen).await.try_into().unwrap();
    upload(&alice, &keys(&alice, 2)).await.expect(204);
    let current = bundle(&alice, &alice).await;
    let mut body = Keys::default().to_json(&alice.identity);
    body["username"] = json!(alice.username);
    body["password"] = json!(PASSWORD);
    body["oneTimePreKeys"] = json!([current["oneTimePreKey"], one_time_key(99)]);
    let answer = server.client().post("/v1/users/reset").json(&body).send().await.expect(200).json();
    let alice = Device::from_answer(&alice.client, alice.identity.clone(), alice.username.clone(), &answer);
    for stolen in [of_alice, of_tablet, current["signedPreKey"].clone()] {
        let mut body = json!({"signedPreKey": stolen, "oneTimePreKeys": [one_time_key(9)]});
        body["signedPreKey"]["keyId"] = json!(i32::MAX);
        upload(&alice, &body).await.expect(400);
    }
    assert_eq!(drain(&alice).await, [99].into(), "the used one is left out");
    upload(&alice, &keys(&alice, 2)).await.expect(204);
}
