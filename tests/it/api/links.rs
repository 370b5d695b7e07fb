//! Link sessions: open, approve and read. Using one is tested with the devices.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::{Client, Device, PASSWORD, Response, TestServer};

async fn open(device: &Device) -> Response {
    let body = json!({"username": device.username, "password": PASSWORD});
    device.client.post("/v1/link-sessions").json(&body).send().await
}

/// The id of a link session that waits for its approval.
async fn opened(device: &Device) -> String {
    let answer = open(device).await.expect(201).json();
    answer["id"].as_str().unwrap().to_owned()
}

async fn approve(device: &Device, id: &str, parcel: impl Into<reqwest::Body>) -> Response {
    device.request("PUT", &format!("/v1/link-sessions/{id}")).body(parcel).send().await
}

async fn read(client: &Client, id: &str) -> Response {
    client.get(&format!("/v1/link-sessions/{id}")).send().await
}

#[tokio::test]
async fn opening_gives_a_secret_the_user_and_ten_minutes() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let answer = open(&alice).await.expect(201);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let answer = answer.json();
    assert_eq!(answer.as_object().unwrap().len(), 3);
    let id = answer["id"].as_str().unwrap();
    assert_eq!(id.len(), 43);
    assert!(id.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_'), "URL-safe base64: {id}");
    assert_eq!(answer["userId"], alice.user.to_string());
    let ahead = answer["expiresAt"].as_i64().unwrap() - server.clock.now().seconds();
    assert!((590..=600).contains(&ahead), "{ahead}");
}

#[tokio::test]
async fn the_id_is_not_in_the_database() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let id = opened(&alice).await;
    let database = server.database().await;
    let found = |column| format!("SELECT count(*) FROM link_sessions WHERE CAST({column} AS TEXT) LIKE '%{id}%'");
    assert_eq!(database.number(&found("hash")).await, 0);
    assert_eq!(database.number("SELECT max(length(hash)) FROM link_sessions").await, 32);
}

#[tokio::test]
async fn the_username_is_taken_in_any_case_and_wrong_credentials_give_401() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let client = server.client();
    let post = |body: Value| client.post("/v1/link-sessions").json(&body).send();
    post(json!({"username": alice.username.to_uppercase(), "password": PASSWORD})).await.expect(201);
    for body in [
        json!({"username": alice.username, "password": "wrong horse battery staple"}),
        json!({"username": "nobody_here", "password": PASSWORD}),
        json!({"username": "", "password": ""}),
        json!({"username": alice.username, "password": "x".repeat(1025)}),
    ] {
        assert_eq!(post(body).await.expect(401).error(), "Unauthorized");
    }
    for body in [json!({"username": alice.username}), json!({"password": PASSWORD}), json!([])] {
        post(body).await.expect(422);
    }
}

#[tokio::test]
async fn a_waiting_session_is_204_and_an_approved_one_gives_the_parcel_as_often_as_asked() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let client = server.client();
    let id = opened(&alice).await;
    read(&client, &id).await.expect(204);
    let parcel: Vec<u8> = (0..=255).collect();
    approve(&alice, &id, parcel.clone()).await.expect(204);
    for _ in 0..2 {
        let answer = read(&client, &id).await.expect(200);
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
        assert_eq!(answer.body, parcel);
    }
    let head = client.request("HEAD", &format!("/v1/link-sessions/{id}")).send().await.expect(200);
    assert_eq!(head.header("content-length"), Some("256"));
    assert!(head.body.is_empty());
}

#[tokio::test]
async fn a_parcel_has_0_to_65536_bytes_of_any_type() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let client = server.client();
    let id = opened(&alice).await;
    approve(&alice, &id, vec![7; 65_537]).await.expect(413);
    read(&client, &id).await.expect(204);
    let request = alice.request("PUT", &format!("/v1/link-sessions/{id}")).header("content-type", "text/x-anything");
    request.body(vec![7; 65_536]).send().await.expect(204);
    assert_eq!(read(&client, &id).await.expect(200).body.len(), 65_536);

    let id = opened(&alice).await;
    alice.request("PUT", &format!("/v1/link-sessions/{id}")).send().await.expect(204);
    assert!(read(&client, &id).await.expect(200).body.is_empty(), "nothing at all approves too");
}

#[tokio::test]
async fn an_approval_is_checked_in_order() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let second = alice.link().await;
    let id = opened(&alice).await;
    let (small, large, huge) = (|| vec![1; 10], || vec![1; 65_537], || vec![1; (2 << 20) + 1]);
    let anonymous = server.client().put(&format!("/v1/link-sessions/{id}")).body(huge()).send().await;
    anonymous.expect(401);
    approve(&second, "unknown", huge()).await.expect(413);
    assert_eq!(approve(&second, "unknown", large()).await.expect(403).error(), "Primary device required");
    approve(&alice, "unknown", large()).await.expect(413);
    approve(&alice, "unknown", small()).await.expect(404);
    approve(&alice, &id, small()).await.expect(204);
    assert_eq!(approve(&alice, &id, small()).await.expect(409).error(), "Link session already approved");
    approve(&alice, &id, large()).await.expect(413);
    assert_eq!(read(&server.client(), &id).await.expect(200).body, small());
}

#[tokio::test]
async fn another_account_cannot_approve() {
    let server = TestServer::start().await;
    let (alice, mallory) = (server.account().await, server.account().await);
    let id = opened(&alice).await;
    approve(&mallory, &id, "mine").await.expect(404);
    read(&server.client(), &id).await.expect(204);
}

#[tokio::test]
async fn a_new_session_replaces_the_waiting_one_and_approved_ones_stay() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let client = server.client();
    let (approved, of_bob) = (opened(&alice).await, opened(&bob).await);
    approve(&alice, &approved, "first").await.expect(204);
    let replaced = opened(&alice).await;
    let newest = opened(&alice).await;
    read(&client, &replaced).await.expect(404);
    approve(&alice, &replaced, "late").await.expect(404);
    assert_eq!(read(&client, &approved).await.expect(200).body, "first");
    read(&client, &of_bob).await.expect(204);
    approve(&alice, &newest, "second").await.expect(204);
    assert_eq!(read(&client, &newest).await.expect(200).body, "second");
    assert_eq!(read(&client, &approved).await.expect(200).body, "first");
}

#[tokio::test]
async fn sessions_opened_at_the_same_instant_leave_one() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let ids = join_all((0..8).map(|_| opened(&alice))).await;
    let answers = join_all(ids.iter().map(|id| read(&alice.client, id))).await;
    let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 404, 404, 404, 404, 404, 404, 404]);
}

#[tokio::test]
async fn a_session_ends_after_600_seconds() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let client = server.client();
    let approved = opened(&alice).await;
    approve(&alice, &approved, "parcel").await.expect(204);
    let waiting = opened(&alice).await;
    server.clock.advance(Duration::from_secs(590));
    read(&client, &waiting).await.expect(204);
    read(&client, &approved).await.expect(200);
    server.clock.advance(Duration::from_secs(10));
    for id in [&waiting, &approved] {
        read(&client, id).await.expect(404);
        approve(&alice, id, "late").await.expect(404);
    }
}

#[tokio::test]
async fn whatever_is_no_id_is_unknown() {
    let server = TestServer::start().await;
    let client = server.client();
    for id in ["x", "%00", "%2F", "a%20b", &"A".repeat(43), &"x".repeat(3000)] {
        read(&client, id).await.expect(404);
    }
    read(&client, "%FF").await.expect(400);
}

#[tokio::test]
async fn sessions_outlive_a_restart() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    let id = opened(&alice).await;
    server.restart().await;
    approve(&alice, &id, "parcel").await.expect(204);
    server.restart().await;
    assert_eq!(read(&alice.client, &id).await.expect(200).body, "parcel");
}
