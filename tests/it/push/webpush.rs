//! What a Web Push service sees, and which are called at all.

use std::path::Path;

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use obscura_server::config::Config;
use obscura_server::telemetry::metrics::{PushProvider, PushStatus};
use serde_json::{Value, json};

use super::provider::{Answer, Provider};
use super::{Project, everything_due_is_pushed, quick, register, tokens};
use crate::harness::{Binary, Device, PATIENCE, TestServer, deployment, eventually};

/// A browser that has subscribed.
struct Browser {
    private: PrivateKey,
    public: Vec<u8>,
    auth: [u8; 16],
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn hkdf<const N: usize>(salt: &[u8], secret: &[u8], info: &[&[u8]]) -> [u8; N] {
    let mut derived = [0; N];
    let key = Salt::new(HKDF_SHA256, salt).extract(secret);
    key.expand(info, Length(N)).unwrap().fill(&mut derived).unwrap();
    derived
}

impl Browser {
    fn new() -> Self {
        let private = PrivateKey::generate(&ECDH_P256).unwrap();
        let public = private.compute_public_key().unwrap().as_ref().to_vec();
        Self { private, public, auth: rand::random() }
    }

    fn subscription(&self, endpoint: &str) -> Value {
        let keys = json!({"p256dh": URL_SAFE_NO_PAD.encode(&self.public), "auth": URL_SAFE_NO_PAD.encode(self.auth)});
        json!({"endpoint": endpoint, "expirationTime": null, "keys": keys})
    }

    /// Decrypts as RFC 8291 says.
    fn open(&self, body: &[u8]) -> Vec<u8> {
        let (salt, rest) = body.split_at(16);
        let (record_size, rest) = rest.split_at(4);
        assert_eq!(record_size, 4096_u32.to_be_bytes());
        let (server, sealed) = rest[1..].split_at(usize::from(rest[0]));
        let peer = UnparsedPublicKey::new(&ECDH_P256, server);
        let shared: [u8; 32] = agree(&self.private, peer, (), |secret| {
            Ok(hkdf(&self.auth, secret, &[b"WebPush: info\0", &self.public, server]))
        })
        .unwrap();
        let key: [u8; 16] = hkdf(salt, &shared, &[b"Content-Encoding: aes128gcm\0"]);
        let nonce: [u8; 12] = hkdf(salt, &shared, &[b"Content-Encoding: nonce\0"]);
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).unwrap());
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let text = key.open_in_place(nonce, Aad::empty(), &mut sealed).unwrap();
        let (last, text) = text.split_last().unwrap();
        assert_eq!(*last, 2, "the delimiter of the last record");
        text.to_vec()
    }
}

fn trust(config: &mut Config, authority: &Path) {
    config.web_push.ca_file = Some(authority.to_owned());
    config.web_push.allowed_networks = ["127.0.0.0/8", "::1/128"].map(|network| network.parse().unwrap()).to_vec();
    config.web_push.contact = Some("mailto:operator@example.org".to_owned());
    quick(config);
}

async fn vapid_key(device: &Device) -> String {
    let answer = device.request("GET", "/v1/push/vapid-key").send().await.expect(200).json();
    answer["publicKey"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_browser_can_read_its_push_and_knows_who_sent_it() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let server = TestServer::start_with(|config| trust(config, &authority)).await;
    let (alice, browser) = (server.account().await, Browser::new());
    let mut lengths = Vec::new();
    for (n, message) in ["x".to_owned(), "long ".repeat(1000)].into_iter().enumerate() {
        let bob = server.account().await;
        let endpoint = format!("https://localhost:{}/push/bob{n}?a=b", service.port());
        register(&bob, json!({"provider": "webpush", "subscription": browser.subscription(&endpoint)})).await;
        alice.send_to(&bob, message).await;
        service.pushed(&format!("bob{n}"), 1).await;
        let push = service.pushes()[n].clone();
        assert_eq!(browser.open(&push.body), br#"{"action":"check"}"#);
        lengths.push(push.body.len());
        for (name, value) in
            [("content-encoding", "aes128gcm"), ("ttl", "604800"), ("urgency", "high"), ("topic", "obscura_check")]
        {
            assert_eq!(push.header(name), value);
        }
        let key = vapid_key(&bob).await;
        let authorization = push.header("authorization").strip_prefix("vapid t=").unwrap();
        let (token, k) = authorization.split_once(", k=").unwrap();
        assert_eq!(k, key);
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[format!("https://localhost:{}", service.port())]);
        let key = DecodingKey::from_ec_der(&URL_SAFE_NO_PAD.decode(key).unwrap());
        let claims = jsonwebtoken::decode::<Value>(token, &key, &validation).unwrap().claims;
        assert_eq!(claims["sub"], "mailto:operator@example.org");
    }
    assert_eq!(lengths[0], lengths[1], "the length tells nothing");
}

#[tokio::test]
async fn a_subscription_that_has_ended_is_deleted_and_one_that_was_refused_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let server = TestServer::start_with(|config| trust(config, &authority)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let endpoint = format!("https://127.0.0.1:{}/bob", service.port());
    register(&bob, json!({"subscription": Browser::new().subscription(&endpoint)})).await;
    service.set(Answer::Status(403, json!({})));
    alice.send_to(&bob, "x").await;
    service.pushed("bob", 1).await;
    service.set(Answer::RetryAfter(429, "1"));
    service.pushed("bob", 2).await;
    assert_eq!(tokens(&server).await, 1);
    service.set(Answer::Status(410, json!({})));
    eventually("the subscription to go", async || tokens(&server).await == 0).await;
}

#[tokio::test]
async fn a_push_that_is_refused_again_and_again_is_logged_once_with_a_hint() {
    let (folder, certificates) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let authority = certificates.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let ca_file = format!("--push-ca-file={}", authority.display());
    let options = [
        &ca_file[..],
        "--webpush-allowed-networks=127.0.0.0/8,::1/128",
        "--push-delay-secs=0",
        "--visibility-timeout-secs=1",
    ];
    let mut server = Binary::start(folder.path(), &options).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let endpoint = format!("https://localhost:{}/bob", service.port());
    register(&bob, json!({"subscription": Browser::new().subscription(&endpoint)})).await;
    service.set(Answer::Status(403, json!({})));
    alice.send_to(&bob, "x").await;
    service.pushed("bob", 3).await;
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    let output = server.output();
    let lines: Vec<&str> = output.lines().filter(|line| line.contains("refuses a push")).collect();
    assert_eq!(lines.len(), 1, "{output}");
    assert!(lines[0].contains("403") && lines[0].contains("--webpush-contact"), "{output}");
    assert!(!output.contains("/bob"), "{output}");
    deployment::drop_state(folder.path());
}

#[tokio::test]
async fn a_404_deletes_a_subscription_only_when_it_lasts_for_hours_and_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let server = TestServer::start_with(|config| {
        trust(config, &authority);
        // A device that is left alone is found again.
        config.notifications.gc_interval = std::time::Duration::from_millis(100);
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let endpoint = format!("https://127.0.0.1:{}/bob", service.port());
    register(&bob, json!({"subscription": Browser::new().subscription(&endpoint)})).await;
    let database = server.database().await;
    let is_missing = async || database.number("SELECT count(*) FROM push_tokens WHERE missing_since > 0").await == 1;
    service.set(Answer::Status(404, json!({})));
    alice.send_to(&bob, "x").await;
    service.pushed("bob", 2).await;
    eventually("the 404 to be written down", is_missing).await;
    assert_eq!(tokens(&server).await, 1, "one page of a proxy deletes nothing");
    let refused = (PushProvider::WebPush, PushStatus::NotFound);
    assert!(server.server().app().metrics.push_refusals.value(refused) >= 1);

    // The service is found again, so the next 404 is a first one.
    service.set(Answer::Status(201, json!({})));
    eventually("the service to be found", async || !is_missing().await).await;
    server.clock.advance(std::time::Duration::from_hours(25));
    let alice = alice.log_in().await;
    service.set(Answer::Status(404, json!({})));
    alice.send_to(&bob, "y").await;
    eventually("the next 404 to be written down", is_missing).await;
    assert_eq!(tokens(&server).await, 1);
    server.clock.advance(std::time::Duration::from_hours(13));
    eventually("the subscription to go", async || tokens(&server).await == 0).await;
}

/// The phone fetched its mail after the first one, so the service was not asked again.
#[tokio::test]
async fn single_404s_days_apart_do_not_delete_a_subscription() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let server = TestServer::start_with(|config| {
        trust(config, &authority);
        config.notifications.gc_interval = std::time::Duration::from_millis(100);
    })
    .await;
    let (mut alice, mut bob) = (server.account().await, server.account().await);
    let endpoint = format!("https://127.0.0.1:{}/bob", service.port());
    register(&bob, json!({"subscription": Browser::new().subscription(&endpoint)})).await;
    service.set(Answer::Status(404, json!({})));
    let database = server.database().await;
    let since = async || database.number("SELECT coalesce(max(missing_since), -1) FROM push_tokens").await;
    let mut before = 0;
    for _ in 0..3 {
        alice.send_to(&bob, "x").await;
        eventually("the 404 to be written down", async || since().await > before).await;
        before = since().await;
        let mut socket = bob.connect().await;
        let mail = socket.messages(1).await;
        socket.ack(&mail).await;
        socket.until_pong().await;
        drop(socket);
        server.clock.advance(std::time::Duration::from_hours(72));
        (alice, bob) = (alice.log_in().await, bob.log_in().await);
    }
    assert_eq!(tokens(&server).await, 1);
}

#[tokio::test]
async fn an_endpoint_in_our_own_network_is_not_called() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        trust(config, &authority);
        config.web_push.allowed_networks = Vec::new();
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let put = async |endpoint: &str| {
        let body = json!({"provider": "webpush", "subscription": Browser::new().subscription(endpoint)});
        bob.request("PUT", "/v1/push-token").json(&body).send().await
    };
    for endpoint in [
        format!("https://127.0.0.1:{}/", service.port()),
        format!("https://[::1]:{}/", service.port()),
        format!("https://[::ffff:127.0.0.1]:{}/", service.port()),
        format!("https://2130706433:{}/", service.port()),
        "https://10.0.0.1/".to_owned(),
        "https://169.254.169.254/latest/meta-data/".to_owned(),
        "http://push.example/".to_owned(),
        "https://user@push.example/".to_owned(),
        "gopher://push.example/".to_owned(),
    ] {
        put(&endpoint).await.expect(400);
    }
    // What a name leads to is seen when it is called.
    put(&format!("https://localhost:{}/bob", service.port())).await.expect(204);
    alice.send_to(&bob, "x").await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert!(service.pushes().is_empty());
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let service = Provider::start_encrypted(&authority).await;
    let server = TestServer::start_with(|config| trust(config, &authority)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let endpoint = format!("https://localhost:{}/first", service.port());
    register(&bob, json!({"subscription": Browser::new().subscription(&endpoint)})).await;
    service.set(Answer::Redirect("/second"));
    alice.send_to(&bob, "x").await;
    service.pushed("first", 2).await;
    assert_eq!(service.count("second"), 0);
}

#[tokio::test]
async fn the_key_of_the_server_stays_and_only_a_client_may_read_it() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    let key = vapid_key(&alice).await;
    assert_eq!(URL_SAFE_NO_PAD.decode(&key).unwrap().len(), 65);
    server.restart().await;
    assert_eq!(vapid_key(&alice).await, key);
    server.client().get("/v1/push/vapid-key").send().await.expect(401);
}
