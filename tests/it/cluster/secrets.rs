//! The signing secret changes while nodes go on.

use obscura_server::config::{Config, Secret};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Client, Device, TestServer};

const OLD: &str = "the secret that signed so far";
const NEW: &str = "the secret that signs from now on";

/// Signs with the first secret and accepts the second one too.
fn secrets(signing: &'static str, accepted: Option<&'static str>) -> impl FnOnce(&mut Config) {
    move |config| {
        config.auth.jwt_secret = Secret::new(signing);
        config.auth.jwt_secret_previous = accepted.map(Secret::new);
    }
}

async fn is_known(device: &Device, client: &Client) -> bool {
    device.at(client).request("GET", "/v1/devices").send().await.status == 200
}

async fn refresh(client: &Client, token: &str, key: Uuid, status: u16) -> Value {
    let request = client.post("/v1/session/refresh").json(&json!({"refreshToken": token}));
    request.header("idempotency-key", key.to_string()).send().await.expect(status).json()
}

fn renewed(device: &Device, answer: &Value) -> Device {
    Device::from_answer(&device.client, device.identity.clone(), device.username.clone(), answer)
}

#[tokio::test]
async fn nodes_restarted_one_by_one_accept_each_others_tokens_and_repeat_each_others_refreshes() {
    let mut a = TestServer::start_node_with(secrets(OLD, None)).await;
    let mut b = a.start_beside().await;
    let clients = [a.client(), b.client()];
    let mut devices = [a.account().await, b.account().await];
    let mut sockets = [devices[0].connect().await, devices[1].connect().await];
    // First every node learns the new secret, then every node signs with it.
    for step in 0..4 {
        let node = if step % 2 == 0 { &mut a } else { &mut b };
        let (signing, accepted) = if step < 2 { (OLD, NEW) } else { (NEW, OLD) };
        // One refresh loses its answer before the node is restarted, and is repeated at both nodes afterwards.
        let key = Uuid::new_v4();
        let lost = refresh(&clients[step % 2], &devices[0].refresh_token, key, 200).await;
        node.restart_with(secrets(signing, Some(accepted))).await;
        for client in &clients {
            let again = refresh(client, &devices[0].refresh_token, key, 200).await;
            assert_eq!(again["refreshToken"], lost["refreshToken"], "step {step}");
            assert!(is_known(&renewed(&devices[0], &again), client).await, "step {step}");
        }
        devices[0] = renewed(&devices[0], &lost);
        let fresh = refresh(&clients[(step + 1) % 2], &devices[1].refresh_token, Uuid::new_v4(), 200).await;
        devices[1] = renewed(&devices[1], &fresh);
        for (device, client) in devices.iter().flat_map(|device| clients.iter().map(move |client| (device, client))) {
            assert!(is_known(device, client).await, "step {step}");
        }
    }
    // The sockets ended with their nodes; new ones open everywhere.
    for socket in &mut sockets {
        socket.until_end().await;
    }
    devices[0].at(&clients[1]).connect().await.until_pong().await;
}

#[tokio::test]
async fn a_refresh_that_is_repeated_at_a_node_with_another_secret_is_unauthorized_and_ends_no_session() {
    let a = TestServer::start_node_with(secrets(OLD, None)).await;
    let b = a.start_beside_with(secrets(NEW, None)).await;
    let (alice, key) = (a.account().await, Uuid::new_v4());
    let answer = refresh(&a.client(), &alice.refresh_token, key, 200).await;
    refresh(&b.client(), &alice.refresh_token, key, 401).await;
    let next = renewed(&alice, &answer);
    assert!(is_known(&next, &a.client()).await);
    let after = refresh(&b.client(), &next.refresh_token, Uuid::new_v4(), 200).await;
    assert!(is_known(&renewed(&alice, &after), &b.client()).await);
}
