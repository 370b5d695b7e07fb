//! Accounts and their devices.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::http::{Connection, bearer};
use crate::signer::{Identity, ec_public_key};

/// Sign-ups at a time. Each costs the server a password hash, which is most of the time they take.
const AT_ONCE: usize = 4;
/// One-time prekeys of each device: so many that the server does not ask for more.
const PREKEYS: u64 = 25;
/// Of every account.
pub const PASSWORD: &str = "a password for measurements";

/// A device that is logged in.
#[derive(Clone, Debug)]
pub struct Device {
    pub user: [u8; 16],
    pub id: [u8; 16],
    pub token: String,
    pub refresh_token: String,
}

/// Makes sign-ups with names that no other run has.
#[derive(Clone)]
pub struct Registrar {
    run: u64,
    one_time: Value,
}

impl Registrar {
    pub fn new() -> Self {
        let key = |id| json!({"keyId": id, "publicKey": STANDARD.encode(ec_public_key(id))});
        Self { run: rand::random(), one_time: (1..=PREKEYS).map(key).collect::<Vec<_>>().into() }
    }

    /// Signs up account number `n`.
    pub async fn sign_up(&self, connection: &mut Connection, n: usize) -> Result<Device> {
        let answer = connection.post_json("/v1/users", &self.account(n, &Identity::generate())).await?.json(201)?;
        device(&answer).context("not an AuthResponse")
    }

    /// Signs up account number `n` with `devices` devices.
    pub async fn sign_up_with(&self, connection: &mut Connection, n: usize, devices: usize) -> Result<Vec<Device>> {
        let identity = Identity::generate();
        let account = self.account(n, &identity);
        let primary = device(&connection.post_json("/v1/users", &account).await?.json(201)?);
        let mut all = vec![primary.context("not an AuthResponse")?];
        for _ in 1..devices {
            let asked = json!({"username": account["username"], "password": PASSWORD});
            let session = connection.post_json("/v1/link-sessions", &asked).await?.json(201)?;
            let id = session["id"].as_str().context("no link session")?;
            let (path, field) = (format!("/v1/link-sessions/{id}"), bearer(&all[0].token));
            connection.request("PUT", &path, &field, b"yes").await?.expect(204)?;
            let mut keys = self.keys(&identity);
            keys["linkSessionId"] = id.into();
            let linked = device(&connection.post_json("/v1/devices", &keys).await?.json(201)?);
            all.push(linked.context("not an AuthResponse")?);
        }
        Ok(all)
    }

    /// The user name of account number `n`.
    pub fn name(&self, n: usize) -> String {
        format!("load_{:x}_{n}", self.run)
    }

    /// What account number `n` signs up with.
    pub fn account(&self, n: usize, identity: &Identity) -> Value {
        let mut account = self.keys(identity);
        account["username"] = self.name(n).into();
        account["password"] = PASSWORD.into();
        account
    }

    /// The members of a new device's keys, for an account with this identity.
    pub fn keys(&self, identity: &Identity) -> Value {
        let signed = ec_public_key(0);
        json!({
            "identityKey": identity.public_key_base64(),
            "registrationId": 1,
            "signedPreKey": {
                "keyId": 1,
                "publicKey": STANDARD.encode(signed),
                "signature": STANDARD.encode(identity.sign(&signed)),
            },
            "oneTimePreKeys": self.one_time,
        })
    }
}

/// Makes accounts with one device each.
pub async fn register(api: SocketAddr, count: usize) -> Result<Vec<Device>> {
    Ok(register_with(api, count, 1).await?.concat())
}

/// Makes accounts with so many devices each.
pub async fn register_with(api: SocketAddr, count: usize, devices: usize) -> Result<Vec<Vec<Device>>> {
    let registrar = Registrar::new();
    let mut work = JoinSet::new();
    for first in 0..AT_ONCE.min(count) {
        let registrar = registrar.clone();
        work.spawn(async move {
            let mut connection = Connection::open(api).await?;
            let mut accounts = Vec::new();
            for n in (first..count).step_by(AT_ONCE) {
                accounts.push(registrar.sign_up_with(&mut connection, n, devices).await?);
            }
            anyhow::Ok(accounts)
        });
    }
    Ok(work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// The device that an `AuthResponse` is for.
pub fn device(answer: &Value) -> Option<Device> {
    let id = |member: &str| Some(answer[member].as_str()?.parse::<Uuid>().ok()?.into_bytes());
    let text = |member: &str| Some(answer[member].as_str()?.to_owned());
    Some(Device {
        user: id("userId")?,
        id: id("deviceId")?,
        token: text("token")?,
        refresh_token: text("refreshToken")?,
    })
}
