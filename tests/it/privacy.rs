//! Nothing that the server writes to its output says who talked to whom, from where, or with what.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::harness::{
    Binary, Collector, Device, Keys, PASSWORD, PATIENCE, Socket, eventually, one_time_key, send_request,
    without_welcome,
};

/// A point of P-256, from RFC 8291.
const POINT: &str = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";

/// Everything that must not be seen, by what it is; ids also as they are in memory.
#[derive(Default)]
struct Secrets(BTreeMap<String, String>, Vec<[u8; 16]>);

impl Secrets {
    fn add(&mut self, what: &str, secret: impl ToString) {
        let secret = secret.to_string();
        assert!(secret.len() >= 4, "{what} is too short to be looked for");
        self.0.insert(secret, what.to_owned());
    }

    fn add_id(&mut self, what: &str, id: Uuid) {
        self.1.push(id.into_bytes());
        self.add(what, id.hyphenated());
        self.add(what, id.simple());
        self.add(what, format!("{:?}", &id.as_bytes()[..6]).trim_matches(['[', ']']));
    }

    fn add_device(&mut self, device: &Device) {
        self.add_id("a user id", device.user);
        self.add_id("a device id", device.id);
        self.add("a username", &device.username);
        self.add("an access token", &device.token);
        self.add("a part of an access token", device.token.split('.').nth(1).unwrap());
        self.add("a refresh token", &device.refresh_token);
        self.add("an identity key", device.identity.public_key_base64());
    }

    /// Fails if anything of this is in what a collector got, in whatever form.
    fn assert_not_collected(&self, collected: &[u8]) {
        let found = |id: &[u8; 16]| collected.windows(id.len()).any(|window| window == id);
        assert!(!self.1.iter().any(found), "the bytes of an id were sent to the collector");
        // Texts are UTF-8 between the numbers of protobuf, which make no text longer than these.
        self.assert_absent(&String::from_utf8_lossy(collected));
    }

    /// Fails if anything of this is in the output.
    fn assert_absent(&self, output: &str) {
        let lower = output.to_lowercase();
        for (secret, what) in &self.0 {
            assert!(!lower.contains(&secret.to_lowercase()), "{what} ({secret}) in:\n{output}");
        }
    }
}

/// One of everything that clients do, the right way and the wrong way.
async fn live(server: &Binary, secrets: &mut Secrets) {
    let client = server.client();
    let mut body = Keys { one_time: 3, pq_one_time: Some(2) }.to_json(&crate::harness::signer::Identity::generate());
    let name = "Sealed Phone of Somebody";
    (body["username"], body["password"], body["name"]) = (json!("Very_Private_Name"), json!(PASSWORD), json!(name));
    secrets.add("a device name", name);
    secrets.add("a username", "very_private_name");
    secrets.add("a password", PASSWORD);
    add_strings(secrets, "a key or signature", &body["signedPreKey"]);
    add_strings(secrets, "a key or signature", &body["pqPreKeys"][0]);
    client.post("/v1/users").json(&body).send().await.expect(201);
    client.post("/v1/users").json(&body).send().await.expect(409);

    let (alice, bob) = (Device::register(&client).await, Device::register(&client).await);
    let link = alice.approved_link_session().await;
    let tablet = alice.finish_link(&link, Keys { one_time: 1, pq_one_time: None }).await;
    secrets.add("a link session", link);
    for device in [&alice, &bob, &tablet] {
        secrets.add_device(device);
    }

    let bundle = bob.bundles(alice.user).await.remove(0);
    add_strings(secrets, "a part of a bundle", &bundle["oneTimePreKey"]);
    alice.refill(2, 500, 3).await;
    let token = "a-push-token-of-a-phone";
    secrets.add("a push token", token);
    alice.request("PUT", "/v1/push-token").json(&json!({"token": token})).send().await.expect(204);

    let endpoint = "https://localhost:9/a-secret-endpoint";
    secrets.add("an endpoint", endpoint);
    let keys = json!({"p256dh": POINT, "auth": "c2VjcmV0IG9mIHB1c2hlcw"});
    add_strings(secrets, "a key of a subscription", &keys);
    let body = json!({"provider": "webpush", "subscription": {"endpoint": endpoint, "keys": keys}});
    bob.request("PUT", "/v1/push-token").json(&body).send().await.expect(204);

    talk(server, secrets, &alice, &bob, &tablet).await;
    alice.send(&[(&bob, b"wake up")]).await;
    bob.send(&[(&alice, b"wake up"), (&tablet, b"you too")]).await;
    eventually("pushes", async || server.output().contains("devices were to be woken")).await;
    misbehave(secrets, &alice, &bob).await;

    alice.remove(&tablet).await;
    bob.log_out().await;
    let bob = bob.log_in().await;
    secrets.add_device(&bob);
    secrets.add_device(&alice.reset().await);
}

async fn talk(server: &Binary, secrets: &mut Secrets, alice: &Device, bob: &Device, tablet: &Device) {
    let (message, attachment) = ("sealed-message-body-1234", "sealed-attachment-body-5678");
    secrets.add("a message", message);
    secrets.add("a message in base64", STANDARD.encode(message));
    secrets.add("an attachment", attachment);
    let ticket = alice.ticket().await;
    secrets.add("a ticket", &ticket);
    let mut socket = Socket::open(server.address(), &ticket).await.ok().unwrap();
    assert_eq!(Socket::open(server.address(), &ticket).await.err(), Some(401));
    // Behind its first look, so that what comes is delivered by its signal, and so within a trace.
    socket.until_pong().await;

    let key = Uuid::new_v4();
    secrets.add_id("an idempotency key", key);
    let request = send_request(&[(alice, message.as_bytes()), (tablet, message.as_bytes())]);
    bob.post_messages(key, &request).await.expect(200);
    bob.post_messages(key, &request).await.expect(200);
    bob.post_messages(Uuid::new_v4(), &send_request(&[(tablet, b"mismatch")])).await.expect(200);
    let envelope = socket.expect_message(message).await;
    secrets.add_id("a message id", Uuid::from_slice(&envelope.id).unwrap());
    socket.ack(&[envelope]).await;
    let text = "text frames are none of our business".repeat(5000);
    secrets.add("a text frame", &text[..36]);
    socket.send(Message::text(text)).await;
    socket.send(Message::Binary(b"garbage that is no frame"[..].into())).await;
    socket.until_pong().await;
    socket.send(Message::Binary(vec![b'x'; 300 * 1024].into())).await; // too large
    socket.until_end().await;

    let upload = bob.request("POST", "/v1/attachments").body(attachment).send().await.expect(201).json();
    let id = upload["id"].as_str().unwrap();
    secrets.add("an attachment id", id);
    secrets.add("an attachment id", id.replace('-', ""));
    alice.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200);
}

/// Requests that fail in as many ways as possible.
async fn misbehave(secrets: &mut Secrets, alice: &Device, bob: &Device) {
    let client = &alice.client;
    let request_id = "a-request-id-of-a-client";
    secrets.add("a request id", request_id);
    secrets.add("a forwarded address", "198.51.100.77");
    secrets.add("a user agent", "Private-Agent/1.0");
    let wrong =
        json!({"username": alice.username, "password": "a wrong password 42", "deviceId": alice.id.to_string()});
    secrets.add("a wrong password", "a wrong password 42");
    let odd = |method: &str, path: &str| {
        let request = client.request(method, path).header("x-request-id", request_id);
        request.header("x-forwarded-for", "198.51.100.77").header("user-agent", "Private-Agent/1.0")
    };
    odd("POST", "/v1/session").json(&wrong).send().await.expect(401);
    odd("POST", "/v1/users/reset").json(&wrong).send().await.expect(422);
    odd("POST", "/v1/session")
        .body("{\"username\":\"very_private_name")
        .header("content-type", "application/json")
        .send()
        .await
        .expect(400);
    odd("POST", "/v1/session/refresh").json(&json!({"refreshToken": bob.refresh_token})).send().await.expect(200);
    odd("POST", "/v1/session/refresh").json(&json!({"refreshToken": bob.refresh_token})).send().await.expect(401);
    odd("GET", "/v1/devices").token("forged.token.secret").send().await.expect(401);
    secrets.add("a forged token", "forged.token.secret");
    odd("GET", &format!("/v1/nowhere/{}", alice.id)).send().await.expect(404);
    odd("PATCH", &format!("/v1/devices/{}", alice.id)).send().await.expect(405);
    alice.request("GET", "/v1/keys/not-an-id-at-all").send().await.expect(400);
    secrets.add("a wrong path", "not-an-id-at-all");
    alice.request("GET", &format!("/v1/attachments/{}", Uuid::new_v4())).send().await.expect(404);
    alice.messages_request(Uuid::new_v4(), "no-protobuf-at-all").send().await.expect(400);
    secrets.add("a wrong body", "no-protobuf-at-all");
    let mut keys = json!({"signedPreKey": one_time_key(1), "oneTimePreKeys": []});
    keys["signedPreKey"]["signature"] = json!(STANDARD.encode([9; 64]));
    add_strings(secrets, "a refused key", &keys["signedPreKey"]);
    alice.request("POST", "/v1/keys").json(&keys).send().await.expect(400);
}

fn add_strings(secrets: &mut Secrets, what: &str, object: &Value) {
    for text in object.as_object().expect("an object").values().filter_map(Value::as_str) {
        secrets.add(what, text);
    }
}

/// What was used, and all that was said of it: by the program itself, on the page of metrics, and to a collector.
struct Said {
    secrets: Secrets,
    output: String,
    metrics: String,
    collected: Vec<u8>,
}

impl Said {
    /// Fails if anything that was used was said.
    fn assert_discreet(&self) {
        self.secrets.assert_absent(&without_welcome(&self.output));
        self.secrets.assert_absent(&self.metrics);
        self.secrets.assert_not_collected(&self.collected);
    }
}

async fn run_with(variables: &[(&str, &str)], options: &[&str]) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let collector = Collector::start().await;
    let endpoint = format!("--otlp-endpoint={}", collector.url());
    let telemetry = [&*endpoint, "--metrics-export-interval-secs=1"];
    let cleaning = ["--ttl-days=1", "--messaging-cleanup-interval-secs=1", "--push-delay-secs=0"];
    let options = [options, &telemetry, &cleaning].concat();
    let mut server = Binary::start_with(folder.path(), &options, variables).await;
    let mut secrets = Secrets::default();
    live(&server, &mut secrets).await;
    secrets.add("the signing secret", crate::harness::deployment::signing_secret(folder.path()));
    let metrics = server.management().get("/metrics").send().await.expect(200).body;
    server.terminate();
    assert!(server.exit(PATIENCE + Duration::from_secs(5)).await.success());
    assert!(server.output().contains("the server has stopped"), "nothing is logged at all: {}", server.output());
    for name in ["POST /v1/messages", "gateway.deliver", "mailroom.ack", "push.send"] {
        assert!(!collector.named(name).is_empty(), "there are no spans of {name} in which anything could be found");
    }
    assert!(collector.has_line("the server has stopped") && !collector.metric_names().is_empty());
    let (output, metrics) = (server.output(), String::from_utf8_lossy(&metrics).into_owned());
    Said { secrets, output, metrics, collected: collector.bytes() }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_about_clients_is_told_by_default() {
    let mut said = run_with(&[], &[]).await;
    said.secrets.add("a client's address", "127.0.0.1");
    said.assert_discreet();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_about_clients_is_told_at_info_in_json() {
    let mut said = run_with(&[("RUST_LOG", "info")], &["--log-format=json"]).await;
    said.secrets.add("a client's address", "127.0.0.1");
    said.assert_discreet();
}

/// More than is promised: even who debugs sees no content and no secrets.
#[tokio::test(flavor = "multi_thread")]
async fn no_content_and_no_credentials_are_told_even_at_trace() {
    run_with(&[("RUST_LOG", "obscura_server=trace")], &[]).await.assert_discreet();
}
