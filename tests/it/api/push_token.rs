//! Push tokens.

use serde_json::{Value, json};

use crate::harness::{Device, Response, TestServer};

async fn put(device: &Device, body: Value) -> Response {
    device.request("PUT", "/v1/push-token").json(&body).send().await
}

/// How many tokens are stored, and how long they are altogether.
async fn stored(server: &TestServer) -> (i64, i64) {
    let database = server.database().await;
    let count = database.number("SELECT count(*) FROM push_tokens").await;
    (count, database.number("SELECT COALESCE(sum(length(token)), 0) FROM push_tokens").await)
}

#[tokio::test]
async fn a_token_is_trimmed_and_the_last_one_wins() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    put(&alice, json!({"token": "first token"})).await.expect(204);
    put(&alice, json!({"token": " \n last\t "})).await.expect(204);
    assert_eq!(stored(&server).await, (1, 4));
}

#[tokio::test]
async fn a_token_has_1_to_4096_bytes_after_trimming() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for bad in ["", " \t\n ", &"x".repeat(4097), &"ä".repeat(2049)] {
        put(&alice, json!({"token": bad})).await.expect(400);
    }
    assert_eq!(stored(&server).await, (0, 0));
    put(&alice, json!({"token": format!(" {} ", "x".repeat(4096))})).await.expect(204);
    assert_eq!(stored(&server).await, (1, 4096));
}

#[tokio::test]
async fn a_nul_character_is_refused() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    put(&alice, json!({"token": "to\0ken"})).await.expect(400);
}

#[tokio::test]
async fn the_body_is_read_strictly_and_after_the_access_token() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for bad in [json!({}), json!({"token": null}), json!({"token": 1}), json!([]), json!("token")] {
        put(&alice, bad).await.expect(422);
    }
    let request = || alice.request("PUT", "/v1/push-token");
    let json = "application/json";
    request().header("content-type", json).body(r#"{"token":"a","token":"b"}"#).send().await.expect(422);
    request().header("content-type", json).body(r#"{"token":"a""#).send().await.expect(400);
    request().header("content-type", json).send().await.expect(400);
    request().body(r#"{"token":"a"}"#).send().await.expect(415);
    request().json(&json!({"token": "x".repeat(2 << 20)})).send().await.expect(413);
    server.client().put("/v1/push-token").json(&json!({})).send().await.expect(401);
    request()
        .header("content-type", "application/vnd.x+json; a=b")
        .body(r#"{"token":"a","more":1}"#)
        .send()
        .await
        .expect(204);
}

#[tokio::test]
async fn each_device_has_its_own_token_and_it_goes_with_the_device() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let second = alice.link().await;
    put(&alice, json!({"token": "phone"})).await.expect(204);
    put(&second, json!({"token": "tablet"})).await.expect(204);
    assert_eq!(stored(&server).await, (2, 11));
    alice.remove(&second).await;
    assert_eq!(stored(&server).await, (1, 5));
    put(&second, json!({"token": "late"})).await.expect(401);
}

#[tokio::test]
async fn a_provider_goes_with_a_token_or_a_subscription() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    // A point of P-256, from RFC 8291.
    let point = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
    let keys = json!({"p256dh": point, "auth": "AAAAAAAAAAAAAAAAAAAAAA"});
    let subscription = json!({"endpoint": "https://push.example/1", "expirationTime": null, "keys": keys});
    for good in [
        json!({"token": "t", "provider": "fcm"}),
        json!({"token": "t", "provider": "apns"}),
        json!({"token": "t", "provider": null, "subscription": null}),
        json!({"subscription": subscription}),
        json!({"subscription": subscription, "provider": "webpush", "token": null}),
    ] {
        put(&alice, good).await.expect(204);
    }
    assert_eq!(stored(&server).await, (1, "https://push.example/1".len() as i64));
    for (status, bad) in [
        (400, json!({"token": "t", "provider": "pigeon"})),
        (400, json!({"token": "t", "subscription": subscription})),
        (422, json!({"token": "t", "provider": "webpush"})),
        (422, json!({"provider": "fcm", "subscription": subscription})),
        (422, json!({"provider": "webpush"})),
        (422, json!({"provider": "webpush", "subscription": {"endpoint": "https://push.example/1"}})),
        (422, json!({"provider": "webpush", "subscription": "https://push.example/1"})),
    ] {
        put(&alice, bad).await.expect(status);
    }
    for (member, bad) in [("p256dh", "AAAA"), ("p256dh", &"B".repeat(87)), ("auth", "AAAA"), ("auth", "+/+/")] {
        let mut subscription = subscription.clone();
        subscription["keys"][member] = json!(bad);
        put(&alice, json!({"subscription": subscription})).await.expect(400);
    }
    for bad in ["", " https://push.example/", "http://push.example/", "https://127.0.0.1/", "https://push.example/#a"] {
        let subscription = json!({"endpoint": bad, "keys": keys});
        put(&alice, json!({"subscription": subscription})).await.expect(400);
    }
}
