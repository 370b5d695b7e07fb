//! A new device proves that it holds the identity key of the account that it joins.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Device, Keys, PASSWORD, Response, TestServer};

const WITH_PQ: Keys = Keys { one_time: 2, pq_one_time: Some(2) };

/// A link session that waits for its approval.
async fn opened(device: &Device) -> String {
    let body = json!({"username": device.username, "password": PASSWORD});
    let answer = device.client.post("/v1/link-sessions").json(&body).send().await.expect(201).json();
    answer["id"].as_str().unwrap().to_owned()
}

/// Approves with this wish for a proof, by the header that keeps the id out of the path.
async fn approve(device: &Device, id: &str, proof: Option<&str>) -> Response {
    let request = device.request("PUT", "/v1/link-sessions").header("obscura-link-id", id).body("parcel");
    match proof {
        Some(proof) => request.header("obscura-require-proof", proof).send().await,
        None => request.send().await,
    }
}

fn bytes(key: &Value, member: &str) -> Vec<u8> {
    STANDARD.decode(key[member].as_str().unwrap()).unwrap()
}

fn int(value: &Value) -> [u8; 4] {
    i32::try_from(value.as_i64().unwrap()).unwrap().to_be_bytes()
}

/// What a client signs, put together from the request alone, as the document says.
fn signed_bytes(body: &Value) -> Vec<u8> {
    let id_and_key = |key: &Value| [&int(&key["keyId"])[..], &bytes(key, "publicKey")].concat();
    let list = |member: &str| {
        let keys = body[member].as_array().cloned().unwrap_or_default();
        let count = u32::try_from(keys.len()).unwrap().to_be_bytes();
        [&count[..], &keys.iter().flat_map(id_and_key).collect::<Vec<u8>>()].concat()
    };
    let last_resort = match &body["pqLastResortPreKey"] {
        Value::Null => vec![0],
        key => [&[1][..], &id_and_key(key)].concat(),
    };
    [
        &b"obscura.v1 link proof\0"[..],
        &Sha256::digest(body["linkSessionId"].as_str().unwrap()),
        &bytes(body, "identityKey"),
        &int(&body["registrationId"]),
        &id_and_key(&body["signedPreKey"]),
        &list("oneTimePreKeys"),
        &last_resort,
        &list("pqPreKeys"),
    ]
    .concat()
}

/// The last step of linking without a proof.
fn unproven(device: &Device, id: &str, keys: Keys) -> Value {
    let mut body = keys.to_json(&device.identity);
    body["linkSessionId"] = json!(id);
    body
}

/// The same with one.
fn proven(device: &Device, id: &str, keys: Keys) -> Value {
    let mut body = unproven(device, id, keys);
    body["identitySignature"] = json!(STANDARD.encode(device.identity.sign(&signed_bytes(&body))));
    body
}

async fn link(device: &Device, body: &Value) -> Response {
    device.client.post("/v1/devices").json(body).send().await
}

#[tokio::test]
async fn where_the_approving_device_asks_for_a_proof_a_signature_from_a_bundle_links_nothing() {
    let server = TestServer::start().await;
    let alice = Device::register_with(&server.client(), WITH_PQ).await;
    let id = opened(&alice).await;
    approve(&alice, &id, Some("true")).await.expect(204);
    // All that a thief of the link id has: the public keys and the signature of the account's own bundle.
    let mut stolen = unproven(&alice, &id, Keys { one_time: 1, pq_one_time: None });
    stolen["signedPreKey"] = alice.bundles(alice.user).await[0]["signedPreKey"].clone();
    let refused = link(&alice, &stolen).await.expect(403);
    assert_eq!(refused.error(), "A proof of the identity key is required");
    // The prekey's signature is no proof either.
    stolen["identitySignature"] = stolen["signedPreKey"]["signature"].clone();
    link(&alice, &stolen).await.expect(400);
    link(&alice, &proven(&alice, &id, WITH_PQ)).await.expect(201);
    link(&alice, &proven(&alice, &id, WITH_PQ)).await.expect(403);
}

#[tokio::test]
async fn a_proof_is_checked_whenever_it_is_given_and_covers_the_link_and_all_keys() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let other = alice.approved_link_session().await;
    let id = alice.approved_link_session().await;
    let good = proven(&alice, &id, WITH_PQ);
    let of_another_link = proven(&alice, &other, WITH_PQ)["identitySignature"].clone();
    let changes: [(&str, Value); 7] = [
        ("identitySignature", of_another_link),
        ("identitySignature", json!("AAAA")),
        ("registrationId", json!(4712)),
        ("oneTimePreKeys", json!([])),
        ("pqPreKeys", json!([])),
        ("signedPreKey", crate::harness::signed_key(&alice.identity, 1)),
        ("pqLastResortPreKey", crate::harness::kyber_key(&alice.identity, 1_000_000)),
    ];
    for (member, value) in changes {
        let mut body = good.clone();
        body[member] = value;
        link(&alice, &body).await.expect(400);
    }
    link(&alice, &good).await.expect(201);
    let few = proven(&alice, &other, Keys { one_time: 0, pq_one_time: None });
    link(&alice, &few).await.expect(201);
}

#[tokio::test]
async fn without_the_wish_a_device_links_as_ever() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for wish in [None, Some("false")] {
        let id = opened(&alice).await;
        approve(&alice, &id, wish).await.expect(204);
        link(&alice, &unproven(&alice, &id, WITH_PQ)).await.expect(201);
    }
    let id = opened(&alice).await;
    for misspelled in ["", "TRUE", "1", "yes"] {
        approve(&alice, &id, Some(misspelled)).await.expect(400);
    }
    approve(&alice, &id, Some("true")).await.expect(204);
}

#[tokio::test]
async fn an_option_makes_the_proof_mandatory_for_all() {
    let server = TestServer::start_with(|config| config.auth.require_link_proof = true).await;
    let alice = server.account().await;
    let id = alice.approved_link_session().await;
    link(&alice, &unproven(&alice, &id, WITH_PQ)).await.expect(403);
    link(&alice, &proven(&alice, &id, WITH_PQ)).await.expect(201);
}

#[tokio::test]
async fn a_wish_for_a_proof_outlives_a_restart() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    let id = opened(&alice).await;
    approve(&alice, &id, Some("true")).await.expect(204);
    server.restart().await;
    link(&alice, &unproven(&alice, &id, WITH_PQ)).await.expect(403);
    link(&alice, &proven(&alice, &id, WITH_PQ)).await.expect(201);
}

#[tokio::test]
async fn an_id_in_a_header_does_what_one_in_the_path_does() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let id = opened(&alice).await;
    let read = |id: &str| server.client().get("/v1/link-sessions").header("obscura-link-id", id).send();
    read(&id).await.expect(204);
    approve(&alice, &id, None).await.expect(204);
    approve(&alice, &id, None).await.expect(409);
    assert_eq!(read(&id).await.expect(200).body, "parcel");
    assert_eq!(server.client().get(&format!("/v1/link-sessions/{id}")).send().await.expect(200).body, "parcel");
    read("nothing").await.expect(404);
    server.client().get("/v1/link-sessions").send().await.expect(400);
    alice.request("PUT", "/v1/link-sessions").send().await.expect(400);
    server.client().request("PUT", "/v1/link-sessions").send().await.expect(401);
}
