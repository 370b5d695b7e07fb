//! Repeated cleaning: whatever has an age goes by itself.

use std::time::Duration;

use serde_json::json;

use crate::harness::{PASSWORD, TestServer, eventually};

#[tokio::test]
async fn everything_that_expires_is_forgotten() {
    let mut server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "acknowledged").await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    drop(socket);
    alice.send_to(&bob, "never fetched").await;
    alice.ticket().await;
    let client = server.client();
    let credentials = json!({"username": alice.username, "password": PASSWORD});
    client.post("/v1/link-sessions").json(&credentials).send().await.expect(201);
    client.post("/v1/session/refresh").json(&json!({"refreshToken": bob.refresh_token})).send().await.expect(200);
    alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);

    let tables = ["messages", "gateway_tickets", "link_sessions", "refresh_uses", "sessions", "attachments"];
    let database = server.database().await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    for table in tables {
        assert!(rows(table).await > 0, "{table} is empty from the start");
    }
    // Every job has a round soon after the start.
    server.clock.advance(Duration::from_hours(24 * 31));
    server.restart().await;
    for table in tables {
        eventually(&format!("{table} to be swept"), async || rows(table).await == 0).await;
    }
    // The outcome of the send whose message waited may take a day longer; that of the other goes at once.
    eventually("sends to be swept", async || rows("sends").await <= 1).await;
    assert_eq!(rows("devices").await, 2, "devices do not expire");
}
