//! What costs much is done last: an upload of keys that comes to nothing anyway doesn't cost a hundred checks of signatures.

use serde_json::{Value, json};

use crate::harness::signer::Identity;
use crate::harness::{Device, Keys, PASSWORD, TestServer, kyber_key};

/// Keys of this identity. The signature of one of its eight Kyber keys is by another identity key.
fn keys_with_a_wrong_signature(identity: &Identity) -> Value {
    let mut keys = Keys { one_time: 2, pq_one_time: Some(8) }.to_json(identity);
    keys["pqPreKeys"][7] = kyber_key(&Identity::generate(), 9);
    keys
}

#[tokio::test]
async fn an_unknown_link_session_costs_no_check_of_many_signatures() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let session = alice.approved_link_session().await;
    let link = async |session: &str, keys: Value| {
        let mut body = keys;
        body["linkSessionId"] = json!(session);
        server.client().post("/v1/devices").json(&body).send().await
    };
    let wrong = || keys_with_a_wrong_signature(&alice.identity);
    assert_eq!(link("made up", wrong()).await.expect(403).error(), "Invalid link session");
    assert!(link(&session, wrong()).await.expect(400).error().contains("pqPreKeys"));
    // A link session that waits for its approval is as good as none.
    let credentials = json!({"username": alice.username, "password": PASSWORD});
    let waiting = server.client().post("/v1/link-sessions").json(&credentials).send().await.expect(201).json();
    let waiting = waiting["id"].as_str().unwrap();
    assert_eq!(link(waiting, wrong()).await.expect(403).error(), "Invalid link session");
    let right = Keys { one_time: 2, pq_one_time: Some(8) }.to_json(&alice.identity);
    link(&session, right).await.expect(201);
}

#[tokio::test]
async fn a_taken_name_or_a_wrong_password_costs_no_check_of_many_signatures() {
    let server = TestServer::start().await;
    let (alice, stranger) = (server.account().await, Identity::generate());
    let post = async |path: &str, username: &str, password: &str| {
        let mut body = keys_with_a_wrong_signature(&stranger);
        body["username"] = json!(username);
        body["password"] = json!(password);
        server.client().post(path).json(&body).send().await
    };
    post("/v1/users", &alice.username, PASSWORD).await.expect(409);
    post("/v1/users/reset", &alice.username, "another password").await.expect(401);
    assert!(post("/v1/users", "somebody_new", PASSWORD).await.expect(400).error().contains("pqPreKeys"));
    assert!(post("/v1/users/reset", &alice.username, PASSWORD).await.expect(400).error().contains("pqPreKeys"));
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test]
async fn a_linked_device_is_refused_before_its_parcel_is_read() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let second: Device = alice.link().await;
    let parcel = vec![7; 1 << 20];
    let answer = second.request("PUT", "/v1/link-sessions/unknown").body(parcel).send().await.expect(403);
    assert_eq!(answer.error(), "Primary device required");
}
