//! Limits of what makes accounts, guesses at them and fills them, with their defaults unless a test says otherwise.

use obscura_server::config::Config;
use serde_json::json;

use crate::harness::signer::Identity;
use crate::harness::{Client, Device, Keys, PASSWORD, Response, TestServer, unique_name};

/// A server with the limits of accounts as they are by default.
async fn server() -> TestServer {
    server_with(|_| {}).await
}

async fn server_with(change: impl FnOnce(&mut Config)) -> TestServer {
    let defaults = Config::embedded("unused".as_ref()).unwrap();
    TestServer::start_with(|config| {
        config.accounts = defaults.accounts;
        config.rate_limits = defaults.rate_limits;
        change(config);
    })
    .await
}

fn retry_after(refused: &Response) -> u64 {
    refused.header("retry-after").unwrap().parse().unwrap()
}

async fn sign_up(client: &Client, address: &str) -> Response {
    let mut body = Keys::default().to_json(&Identity::generate());
    body["username"] = json!(unique_name("bot"));
    body["password"] = json!(PASSWORD);
    client.post("/v1/users").header("x-forwarded-for", address).json(&body).send().await
}

/// A log-in from an address of its own, so that no limit of addresses is in the way.
async fn log_in(
    client: &Client,
    address: &str,
    username: &str,
    password: &str,
    proof: Option<(&Device, &str)>,
) -> Response {
    let device = proof.map_or_else(uuid::Uuid::new_v4, |(device, _)| device.id);
    let mut body = json!({"username": username, "password": password, "deviceId": device.to_string()});
    if let Some((_, token)) = proof.filter(|(_, token)| !token.is_empty()) {
        body["refreshToken"] = json!(token);
    }
    client.post("/v1/session").header("x-forwarded-for", address).json(&body).send().await
}

#[tokio::test]
async fn sign_ups_from_one_address_and_its_neighbours_have_a_limit_and_others_go_on() {
    let server = server_with(|config| {
        config.accounts.sign_ups_per_address = 3;
        config.accounts.sign_ups_per_network = 5;
        config.rate_limits.auth_burst = 100;
    })
    .await;
    let client = server.client();
    let made = async |addresses: Vec<String>| {
        let mut made = 0;
        for address in &addresses {
            made += usize::from(sign_up(&client, address).await.status == 201);
        }
        made
    };
    assert_eq!(made(vec!["198.18.0.1".into(); 6]).await, 3);
    let refused = sign_up(&client, "198.18.0.1").await.expect(429);
    let day = 24 * 60 * 60;
    assert!((day / 3 - 60..=day / 3 + 1).contains(&retry_after(&refused)), "{}", retry_after(&refused));
    assert_eq!(made((2..8).map(|n| format!("198.18.0.{n}")).collect()).await, 2, "the rest of the /24");
    assert_eq!(made((0..8).map(|n| format!("2001:db8:7:{n:x}::1")).collect()).await, 5, "neighbouring /64s of one /48");
    assert_eq!(made(vec!["198.18.1.1".into(), "2001:db8:8::1".into()]).await, 2, "other networks");
    // A name that is taken costs none.
    let alice = server.client();
    let first = sign_up(&alice, "198.18.2.1").await.expect(201);
    assert!(first.json()["userId"].is_string());
}

#[tokio::test]
async fn guesses_at_one_account_are_slowed_whether_or_not_it_exists() {
    let server = server().await;
    let client = server.client();
    let (alice, bob) = (server.account().await, server.account().await);
    for (network, name) in [(1, alice.username.clone()), (2, "nobody_has_this_name".to_owned())] {
        for n in 0..10 {
            log_in(&client, &format!("198.18.{network}.{n}"), &name, "not the password", None).await.expect(401);
        }
        for n in 10..20 {
            let refused = log_in(&client, &format!("198.18.{network}.{n}"), &name, "not the password", None).await;
            assert!((1..=61).contains(&retry_after(&refused.expect(429))));
        }
    }
    // Whoever holds the device is not kept out by that, and a device id alone proves nothing.
    let owner = |proof: &'static str| (&alice, if proof.is_empty() { "" } else { alice.refresh_token.as_str() });
    log_in(&client, "198.18.3.1", &alice.username, PASSWORD, Some(owner(""))).await.expect(429);
    log_in(&client, "198.18.3.2", &alice.username, PASSWORD, Some((&alice, "no such token"))).await.expect(429);
    log_in(&client, "198.18.3.3", &alice.username, PASSWORD, Some((&alice, &bob.refresh_token))).await.expect(429);
    // The other ways in that take a password share it.
    let opening = json!({"username": alice.username, "password": PASSWORD});
    let open = |body: serde_json::Value, address: &'static str| {
        client.post("/v1/link-sessions").header("x-forwarded-for", address).json(&body).send()
    };
    open(opening.clone(), "198.18.3.4").await.expect(429);
    let mut reset = Keys::default().to_json(&alice.identity);
    reset["username"] = json!(alice.username);
    reset["password"] = json!(PASSWORD);
    client.post("/v1/users/reset").header("x-forwarded-for", "198.18.3.5").json(&reset).send().await.expect(429);
    let mut proven = opening;
    proven["refreshToken"] = json!(alice.refresh_token);
    open(proven, "198.18.3.6").await.expect(201);
    log_in(&client, "198.18.3.7", &alice.username, PASSWORD, Some(owner("proof"))).await.expect(200);
    // Others notice nothing, however often they log in.
    for n in 0..15 {
        log_in(&client, &format!("198.18.4.{n}"), &bob.username, PASSWORD, Some((&bob, ""))).await.expect(200);
    }
    let page = server.management().get("/metrics").send().await.expect(200);
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(page.contains("obscura_passwords_wrong_total 20"), "{page}");
}

#[tokio::test]
async fn an_album_of_a_hundred_pictures_passes_and_a_flood_of_uploads_does_not() {
    let server = server().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload = async |device: &Device| device.request("POST", "/v1/attachments").body("a").send().await;
    for _ in 0..100 {
        upload(&alice).await.expect(201);
    }
    let mut more = 0;
    let refused = loop {
        let answer = upload(&alice).await;
        if answer.status != 201 {
            break answer;
        }
        more += 1;
        assert!(more < 5000, "nothing slows the flood");
    };
    assert_eq!(retry_after(&refused.expect(429)), 1);
    upload(&bob).await.expect(201);
}
