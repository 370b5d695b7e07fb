//! Phones are woken: when, how often, by whom, and what the providers see of it.

mod answers;
mod apns;
mod fcm;
mod nodes;
mod options;
pub mod provider;
mod rebuilt;
mod timing;
mod webpush;

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::DecodingKey;
use obscura_server::config::Config;
use serde_json::{Value, json};

use self::provider::{Provider, TOKEN_PATH};
use crate::harness::{Device, TestServer};

/// Long enough for what a test does before it is over, on a busy machine.
const GRACE: Duration = Duration::from_secs(2);

/// A project at Firebase: the service, and the file that lets a server in.
struct Project {
    fcm: Provider,
    folder: tempfile::TempDir,
    key: DecodingKey,
}

impl Project {
    async fn start() -> Self {
        let fcm = Provider::start().await;
        let folder = tempfile::tempdir().unwrap();
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let private: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let account = json!({
            "type": "service_account",
            "project_id": "obscura",
            "client_email": "pusher@obscura.example",
            "private_key": pem("PRIVATE KEY", private.as_ref()),
            "token_uri": format!("{}{TOKEN_PATH}", fcm.url()),
        });
        std::fs::write(folder.path().join("account.json"), account.to_string()).unwrap();
        let key = DecodingKey::from_rsa_der(pair.public_key().as_ref());
        Self { fcm, folder, key }
    }

    /// What a server is told about it.
    fn configure(&self, config: &mut Config) {
        config.fcm.credentials_file = Some(self.folder.path().join("account.json"));
        config.fcm.endpoint = self.fcm.url();
        quick(config);
    }

    /// The same as arguments of the program, with times in whole seconds.
    fn options(&self) -> Vec<String> {
        vec![
            format!("--fcm-credentials-file={}", self.folder.path().join("account.json").display()),
            format!("--fcm-endpoint={}", self.fcm.url()),
            "--push-delay-secs=1".to_owned(),
            "--visibility-timeout-secs=2".to_owned(),
            "--gc-interval-secs=1".to_owned(),
        ]
    }

    async fn server(&self) -> TestServer {
        TestServer::start_with(|config| self.configure(config)).await
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let lines: Vec<_> =
        STANDARD.encode(der).as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Everything happens soon.
fn quick(config: &mut Config) {
    let notifications = &mut config.notifications;
    notifications.push_delay = GRACE;
    notifications.worker_interval = Duration::from_millis(30);
    notifications.visibility_timeout = Duration::from_secs(1);
    notifications.janitor_interval = Duration::from_millis(100);
    // Nothing is found by looking through all inboxes, unless a test is about that.
    notifications.gc_interval = Duration::from_hours(1);
}

async fn register(device: &Device, body: Value) {
    device.request("PUT", "/v1/push-token").json(&body).send().await.expect(204);
}

/// A new account whose phone has this token of FCM.
async fn phone(server: &TestServer, token: &str) -> Device {
    let device = server.account().await;
    register(&device, json!({"token": token})).await;
    device
}

/// Waits until everything that was due when this was called has been pushed: mail to somebody else comes after it.
async fn everything_due_is_pushed(server: &TestServer, fcm: &Provider, from: &Device) {
    let token = crate::harness::unique_name("sentinel");
    let sentinel = phone(server, &token).await;
    from.send_to(&sentinel, "x").await;
    fcm.pushed(&token, 1).await;
}

async fn tokens(server: &TestServer) -> i64 {
    server.database().await.number("SELECT count(*) FROM push_tokens").await
}

fn file(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}
