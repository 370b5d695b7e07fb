//! Limits of what makes accounts, guesses at them and fills them, with their defaults unless a test says otherwise.

use obscura_server::config::Config;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::signer::Identity;
use crate::harness::{Binary, Client, Device, Keys, PASSWORD, PATIENCE, Response, TestServer, eventually, unique_name};

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
    let tablet = alice.link().await;
    for (network, name) in [(1, alice.username.clone()), (2, "nobody_has_this_name".to_owned())] {
        // Ten at the name, and three more of this network.
        for n in 0..13 {
            log_in(&client, &format!("198.18.{network}.{n}"), &name, "not the password", None).await.expect(401);
        }
        for n in 13..20 {
            let refused = log_in(&client, &format!("198.18.{network}.{n}"), &name, "not the password", None).await;
            assert!((1..=61).contains(&retry_after(&refused.expect(429))));
        }
    }
    // Whoever holds the device is not kept out by that, and a device id alone proves nothing.
    let owner = |proof: &'static str| (&alice, if proof.is_empty() { "" } else { alice.refresh_token.as_str() });
    log_in(&client, "198.18.1.31", &alice.username, PASSWORD, Some(owner(""))).await.expect(429);
    log_in(&client, "198.18.1.32", &alice.username, PASSWORD, Some((&alice, "no such token"))).await.expect(429);
    log_in(&client, "198.18.1.33", &alice.username, PASSWORD, Some((&alice, &bob.refresh_token))).await.expect(429);
    let of_another_device = Some((&alice, tablet.refresh_token.as_str()));
    log_in(&client, "198.18.1.38", &alice.username, PASSWORD, of_another_device).await.expect(429);
    // The other ways in that take a password share it.
    let opening = json!({"username": alice.username, "password": PASSWORD});
    let open = |body: serde_json::Value, address: &'static str| {
        client.post("/v1/link-sessions").header("x-forwarded-for", address).json(&body).send()
    };
    open(opening.clone(), "198.18.1.34").await.expect(429);
    let mut reset = Keys::default().to_json(&alice.identity);
    reset["username"] = json!(alice.username);
    reset["password"] = json!(PASSWORD);
    client.post("/v1/users/reset").header("x-forwarded-for", "198.18.1.35").json(&reset).send().await.expect(429);
    let mut proven = opening;
    proven["refreshToken"] = json!(alice.refresh_token);
    open(proven, "198.18.1.36").await.expect(201);
    log_in(&client, "198.18.1.37", &alice.username, PASSWORD, Some(owner("proof"))).await.expect(200);
    // Others notice nothing, however often they log in.
    for n in 0..15 {
        log_in(&client, &format!("198.18.4.{n}"), &bob.username, PASSWORD, Some((&bob, ""))).await.expect(200);
    }
    let page = server.management().get("/metrics").send().await.expect(200);
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(page.contains("obscura_passwords_wrong_total 26"), "{page}");
}

#[tokio::test]
async fn that_passwords_are_guessed_is_logged_once_and_without_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_limited(folder.path(), &[]).await;
    let (client, name) = (server.client(), unique_name("guessed"));
    let mut refused = 0;
    for n in 0..20 {
        let answer = log_in(&client, &format!("198.18.1.{n}"), &name, "not the password", None).await;
        refused += usize::from(answer.status == 429);
    }
    assert_eq!(refused, 7, "10 at the name and 3 more of the network");
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    let output = server.output();
    assert_eq!(output.matches("passwords are being guessed").count(), 1, "{output}");
    assert!(!output.contains(&name), "{output}");
}

/// The owner has nothing but the name and the password: a new phone, or a session that was ended.
#[tokio::test]
async fn an_owner_without_a_token_gets_in_while_another_address_guesses() {
    let server = server().await;
    let client = server.client();
    let alice = server.account().await;
    let guess =
        async |n: u8| log_in(&client, &format!("198.18.1.{n}"), &alice.username, "not the password", None).await.status;
    let mut refused = 0;
    for n in 0..40 {
        refused += usize::from(guess(n).await == 429);
    }
    assert!(refused >= 20, "{refused}");
    // As often as it is right, and a typing error or two don't matter.
    for n in 0..8 {
        log_in(&client, &format!("198.18.2.{n}"), &alice.username, PASSWORD, Some((&alice, ""))).await.expect(200);
    }
    for n in 8..10 {
        log_in(&client, &format!("198.18.2.{n}"), &alice.username, "a typing error", None).await.expect(401);
    }
    let opening = json!({"username": alice.username, "password": PASSWORD});
    client.post("/v1/link-sessions").header("x-forwarded-for", "198.18.2.10").json(&opening).send().await.expect(201);
    assert_eq!(guess(40).await, 429);
}

/// An upload of two bytes, of which one comes.
async fn half_an_upload(device: &Device, address: &str) -> TcpStream {
    let mut stream = TcpStream::connect(device.client.address()).await.unwrap();
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nx-forwarded-for: {address}\r\nauthorization: Bearer {}\r\n\
         content-length: 2\r\n\r\na",
        device.token
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn uploads_under_way_of_one_address_leave_places_to_others() {
    let server = server().await;
    let (one, other, honest) = (server.account().await, server.account().await, server.account().await);
    let mut held = Vec::new();
    for n in 0..128 {
        held.push(half_an_upload(if n % 2 == 0 { &one } else { &other }, "198.51.100.1").await);
    }
    let database = server.database().await;
    let pending = "SELECT count(*) FROM attachments WHERE stored = 0";
    eventually("the uploads to be under way", async || database.number(pending).await == 128).await;
    let upload = async |address: &str| {
        honest.request("POST", "/v1/attachments").header("x-forwarded-for", address).body("ab").send().await
    };
    assert!(retry_after(&upload("198.51.100.1").await.expect(429)) <= 2);
    upload("198.51.100.2").await.expect(201);
    drop(held);
    eventually("room to be there again", async || upload("198.51.100.1").await.status == 201).await;
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
