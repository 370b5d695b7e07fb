//! Bundles, refill and counts, with and without post-quantum members.

mod fetching;
mod refilling;
mod signed;
mod twice;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::{Device, Keys, Response, TestServer, signed_key};

async fn upload(device: &Device, body: &Value) -> Response {
    device.request("POST", "/v1/keys").json(body).send().await
}

/// An upload that is in order, with nothing but a signed prekey.
fn keys(device: &Device, signed: u32) -> Value {
    json!({"signedPreKey": signed_key(&device.identity, signed), "oneTimePreKeys": []})
}

async fn counts(device: &Device) -> Value {
    device.request("GET", "/v1/keys").send().await.expect(200).json()
}

async fn bundle(asker: &Device, of: &Device) -> Value {
    asker.request("GET", &format!("/v1/keys/{}/devices/{}", of.user, of.id)).send().await.expect(200).json()
}

/// As in a bundle.
fn id(device: &Device) -> Value {
    json!(device.id.to_string())
}

/// The id of the one-time prekey in the next bundle of a device.
async fn next_one_time(device: &Device) -> Option<i64> {
    bundle(device, device).await["oneTimePreKey"]["keyId"].as_i64()
}

async fn next_pq(device: &Device) -> Option<i64> {
    bundle(device, device).await["pqPreKey"]["keyId"].as_i64()
}

/// Ids of all elliptic-curve one-time prekeys. Spends them.
async fn drain(device: &Device) -> BTreeSet<i64> {
    let mut ids = BTreeSet::new();
    while let Some(id) = next_one_time(device).await {
        assert!(ids.insert(id), "{id} was handed out twice");
    }
    ids
}

/// A device with these many one-time keys of each kind.
async fn register(server: &TestServer, one_time: u32, pq_one_time: Option<u32>) -> Device {
    Device::register_with(&server.client(), Keys { one_time, pq_one_time }).await
}

#[tokio::test]
async fn counts_are_those_of_the_calling_device_without_the_last_resort_key() {
    let server = TestServer::start().await;
    let alice = register(&server, 7, Some(3)).await;
    let second = alice.link_with(Keys { one_time: 1, pq_one_time: None }).await;
    let answer = alice.request("GET", "/v1/keys").send().await.expect(200);
    assert_eq!(answer.body, r#"{"oneTimePreKeyCount":7,"pqPreKeyCount":3}"#);
    assert_eq!(counts(&second).await, json!({"oneTimePreKeyCount": 1, "pqPreKeyCount": 0}));
    server.client().get("/v1/keys").send().await.expect(401);
}
