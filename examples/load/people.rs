//! Accounts, and the sends that they make.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use obscura_server::wire::SendMessageRequest;
use obscura_server::wire::send_message_request::{Recipient, Submission};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::http::Connection;
use crate::signer::{Identity, ec_public_key};

/// Sign-ups at a time. Each costs the server a password hash, which is most of the time they take.
const AT_ONCE: usize = 4;
/// One-time prekeys of each device: so many that the server does not ask for more.
const PREKEYS: u64 = 25;

/// A device that is logged in, the only one of its account.
#[derive(Clone, Debug)]
pub struct Device {
    pub user: Bytes,
    pub id: Bytes,
    pub token: String,
}

/// Makes accounts.
pub async fn register(api: SocketAddr, count: usize) -> Result<Vec<Device>> {
    let run: u64 = rand::random();
    let one_time: Vec<Value> =
        (1..=PREKEYS).map(|id| json!({"keyId": id, "publicKey": STANDARD.encode(ec_public_key(id))})).collect();
    let one_time = Value::from(one_time);
    let mut work = JoinSet::new();
    for first in 0..AT_ONCE {
        let one_time = one_time.clone();
        work.spawn(async move {
            let mut connection = Connection::open(api).await?;
            let mut devices = Vec::new();
            for n in (first..count).step_by(AT_ONCE) {
                let account = account(&format!("load_{run:x}_{n}"), &one_time);
                let answer = connection.post_json("/v1/users", &account).await?.json(201)?;
                devices.push(device(&answer).context("not an AuthResponse")?);
            }
            anyhow::Ok(devices)
        });
    }
    Ok(work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

fn account(username: &str, one_time: &Value) -> Value {
    let identity = Identity::generate();
    let signed = ec_public_key(0);
    json!({
        "username": username,
        "password": "a password for measurements",
        "identityKey": identity.public_key_base64(),
        "registrationId": 1,
        "signedPreKey": {
            "keyId": 1,
            "publicKey": STANDARD.encode(signed),
            "signature": STANDARD.encode(identity.sign(&signed)),
        },
        "oneTimePreKeys": one_time,
    })
}

fn device(answer: &Value) -> Option<Device> {
    let id = |member: &str| {
        let id: Uuid = answer[member].as_str()?.parse().ok()?;
        Some(Bytes::copy_from_slice(id.as_bytes()))
    };
    Some(Device { user: id("userId")?, id: id("deviceId")?, token: answer["token"].as_str()?.to_owned() })
}

/// A device with a connection to send over.
pub struct Sender {
    connection: Connection,
    token: String,
    request: Vec<u8>,
}

impl Sender {
    pub async fn open(api: SocketAddr, device: &Device) -> Result<Self> {
        let connection = Connection::open(api).await?;
        Ok(Self { connection, token: device.token.clone(), request: Vec::new() })
    }

    /// Sends the same message to each of these devices, and makes sure that all of it was queued.
    pub async fn send(&mut self, to: &[&Device], message: Bytes) -> Result<()> {
        let submission = |device: &Device| vec![Submission { device_id: device.id.clone(), message: message.clone() }];
        let recipients =
            to.iter().map(|device| Recipient { user_id: device.user.clone(), submissions: submission(device) });
        let body = SendMessageRequest { recipients: recipients.collect() };
        let mut fields = String::with_capacity(512);
        let _ = write!(
            fields,
            "authorization: Bearer {}\r\nidempotency-key: {}\r\n",
            self.token,
            Uuid::from_bytes(rand::random()).hyphenated()
        );
        self.request.clear();
        self.request
            .extend_from_slice(crate::http::head("POST", "/v1/messages", &fields, body.encoded_len()).as_bytes());
        body.encode(&mut self.request)?;
        let answer = self.connection.call(&self.request).await?;
        if answer.status != 200 || !answer.body.is_empty() {
            bail!("a send was answered with {} and {} bytes", answer.status, answer.body.len());
        }
        Ok(())
    }
}

/// Fills the inboxes of these devices with `messages` of `size` bytes each.
pub async fn fill(api: SocketAddr, senders: &[Device], devices: &[Device], messages: usize, size: usize) -> Result<()> {
    let mut work = JoinSet::new();
    for (first, device) in senders.iter().enumerate() {
        let mut sender = Sender::open(api, device).await?;
        let (devices, step) = (devices.to_vec(), senders.len());
        work.spawn(async move {
            for _ in (first..messages).step_by(step) {
                for some in devices.chunks(100) {
                    sender.send(&some.iter().collect::<Vec<_>>(), random_bytes(size).into()).await?;
                }
            }
            anyhow::Ok(())
        });
    }
    work.join_all().await.into_iter().collect()
}

/// Sealed messages look random.
pub fn random_bytes(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    rand::fill(&mut bytes[..]);
    bytes
}
