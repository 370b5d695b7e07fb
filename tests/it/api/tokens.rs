//! Who is let in with an access token.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Device, TestServer};

async fn status_of(device: &Device, token: &str) -> u16 {
    let response = device.client.get("/v1/devices").token(token).send().await;
    if response.status == 401 {
        assert_eq!(response.error(), "Unauthorized", "it must not say why");
    }
    response.status
}

fn parts(token: &str) -> Vec<Value> {
    let decoded = token.split('.').take(2).map(|part| URL_SAFE_NO_PAD.decode(part).unwrap());
    decoded.map(|part| serde_json::from_slice(&part).unwrap()).collect()
}

fn claims(device: &Device, expires_at: i64) -> Value {
    json!({"sub": device.user.to_string(), "device_id": device.id.to_string(), "exp": expires_at})
}

/// A token signed with this key, as the library that makes ours would.
fn signed(algorithm: Algorithm, claims: &Value, key: &str) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(key.as_bytes())).unwrap()
}

fn secret(server: &TestServer) -> &str {
    server.server().app().config.auth.jwt_secret.expose()
}

#[tokio::test]
async fn an_access_token_says_exactly_what_the_contract_says() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let answer = alice.client.post("/v1/session/refresh").json(&json!({"refreshToken": alice.refresh_token}));
    let answer = answer.send().await.expect(200).json();
    let token = answer["token"].as_str().unwrap();
    let header = token.split('.').next().unwrap();
    assert_eq!(URL_SAFE_NO_PAD.decode(header).unwrap(), br#"{"typ":"JWT","alg":"HS256"}"#);
    assert_eq!(parts(token)[1], claims(&alice, answer["expiresAt"].as_i64().unwrap()));
}

#[tokio::test]
async fn only_the_exact_bearer_scheme_is_taken() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let token = &alice.token;
    for header in [
        format!("bearer {token}"),
        format!("BEARER {token}"),
        format!("Bearer  {token}"),
        format!("Bearer\t{token}"),
        format!("Bearer{token}"),
        format!("Basic {token}"),
        format!("Bearer {token}, Bearer {token}"),
        format!("Bearer \"{token}\""),
        format!("Bearer {token} x"),
        token.clone(),
        "Bearer ".to_owned(),
        "Bearer".to_owned(),
        String::new(),
    ] {
        alice.client.get("/v1/devices").header("authorization", &header).send().await.expect(401);
    }
    alice.client.get("/v1/devices").send().await.expect(401);
    alice.client.get(&format!("/v1/devices?access_token={token}")).send().await.expect(401);
    alice.client.get("/v1/devices").header("authorization", format!("Bearer {token}")).send().await.expect(200);
}

#[tokio::test]
async fn forged_access_tokens_are_refused() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (good, secret) = (claims(&alice, server.clock.now().seconds() + 900), secret(&server));
    assert_eq!(
        status_of(&alice, &signed(Algorithm::HS256, &good, secret)).await,
        200,
        "the others differ in one thing"
    );

    for other in ["change_me_in_production", "", "secret", &secret[1..]] {
        assert_eq!(status_of(&alice, &signed(Algorithm::HS256, &good, other)).await, 401, "another key");
    }
    for algorithm in [Algorithm::HS384, Algorithm::HS512] {
        assert_eq!(status_of(&alice, &signed(algorithm, &good, secret)).await, 401, "{algorithm:?}");
    }
    let (message, signature) = alice.token.rsplit_once('.').unwrap();
    for alg in ["none", "None", "NONE", ""] {
        let header = URL_SAFE_NO_PAD.encode(json!({"typ": "JWT", "alg": alg}).to_string());
        let payload = URL_SAFE_NO_PAD.encode(good.to_string());
        for signature in ["", signature] {
            assert_eq!(status_of(&alice, &format!("{header}.{payload}.{signature}")).await, 401, "{alg:?}");
        }
    }
    let (header, payload) = message.split_once('.').unwrap();
    let bobs = bob.token.split('.').nth(1).unwrap();
    assert_eq!(status_of(&alice, &format!("{header}.{bobs}.{signature}")).await, 401, "another's claims");
    assert_eq!(status_of(&alice, &format!("{header}.{payload}.")).await, 401, "no signature");
    assert_eq!(status_of(&alice, message).await, 401, "two parts");
    assert_eq!(status_of(&alice, &alice.refresh_token).await, 401, "a refresh token");
}

#[tokio::test]
async fn all_claims_are_needed_and_have_to_fit_each_other() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let expires_at = server.clock.now().seconds() + 900;
    let good = claims(&alice, expires_at);
    for missing in ["sub", "device_id", "exp"] {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(missing);
        assert_eq!(status_of(&alice, &signed(Algorithm::HS256, &claims, secret(&server))).await, 401, "no {missing}");
    }
    for (member, wrong) in [
        ("sub", json!(bob.user.to_string())),
        ("sub", json!(Uuid::new_v4().to_string())),
        ("sub", json!("alice")),
        ("device_id", json!(bob.id.to_string())),
        ("device_id", json!(Uuid::new_v4().to_string())),
        ("device_id", json!(null)),
        ("exp", json!(expires_at.to_string())),
        ("exp", json!(null)),
        ("exp", json!(0)),
        ("exp", json!(-1)),
    ] {
        let mut claims = good.clone();
        claims[member] = wrong;
        assert_eq!(status_of(&alice, &signed(Algorithm::HS256, &claims, secret(&server))).await, 401, "{claims}");
    }
}

#[tokio::test]
async fn an_access_token_expires_a_minute_after_its_time() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let now = server.clock.now().seconds();
    for (ago, status) in [(0, 200), (30, 200), (90, 401), (1_000_000, 401)] {
        let token = signed(Algorithm::HS256, &claims(&alice, now - ago), secret(&server));
        assert_eq!(status_of(&alice, &token).await, status, "{ago} s ago");
    }
    server.clock.advance(Duration::from_secs(900 + 40));
    assert_eq!(status_of(&alice, &alice.token).await, 200, "within the leeway");
    server.clock.advance(Duration::from_secs(21));
    assert_eq!(status_of(&alice, &alice.token).await, 401);
}

#[tokio::test]
async fn a_log_out_voids_tokens_in_their_leeway_too() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    server.clock.advance(Duration::from_secs(900 + 30));
    alice.log_out().await;
    assert_eq!(status_of(&alice, &alice.token).await, 401);
}

#[tokio::test]
async fn the_token_of_a_removed_device_is_void_at_once() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let linked = alice.link().await;
    assert_eq!(status_of(&alice, &linked.token).await, 200);
    alice.remove(&linked).await;
    assert_eq!(status_of(&alice, &linked.token).await, 401);
    assert_eq!(status_of(&alice, &alice.token).await, 200);
}

#[tokio::test]
async fn the_token_is_looked_at_before_path_headers_and_body() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let requests = [
        ("GET", "/v1/devices"),
        ("DELETE", "/v1/devices/not-a-uuid"),
        ("DELETE", "/v1/session"),
        ("POST", "/v1/keys"),
        ("GET", "/v1/keys"),
        ("GET", "/v1/keys/not-a-uuid"),
        ("GET", "/v1/keys/not-a-uuid/devices/neither"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/gateway/ticket"),
        ("PUT", "/v1/push-token"),
        ("PUT", "/v1/link-sessions/unknown"),
        ("POST", "/v1/attachments"),
        ("GET", "/v1/attachments/not-a-uuid"),
    ];
    for (method, path) in requests {
        for token in ["nonsense", &format!("{}x", alice.token)] {
            let request = alice.client.request(method, path).token(token).header("content-type", "text/plain");
            let response = request.header("idempotency-key", "not a uuid").body("{").send().await.expect(401);
            assert_eq!(response.error(), "Unauthorized");
        }
        alice.client.request(method, path).send().await.expect(401);
    }
}
