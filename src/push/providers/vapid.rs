//! How push services know this server: RFC 8292.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::clock::Timestamp;

/// A day is the most that is allowed.
const LIFETIME_SECONDS: i64 = 12 * 3600;

/// The key with which the server says who it is. Clients name its public half when they subscribe, and the subscription
/// then takes pushes of this server alone.
pub struct VapidKey {
    pair: EcdsaKeyPair,
    public: String,
    random: SystemRandom,
}

impl VapidKey {
    /// A new key, in the form in which it is kept.
    pub fn make() -> Option<Vec<u8>> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).ok()?;
        let kept = pair.to_pkcs8v1().ok()?;
        Some(kept.as_ref().to_vec())
    }

    /// Reads a key that was kept.
    pub fn read(kept: &[u8]) -> Option<Self> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, kept).ok()?;
        let public = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
        Some(Self { pair, public, random: SystemRandom::new() })
    }

    /// The public half, as a client gives it to its push service.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// What the header `authorization` says to the push service of this origin.
    pub(super) fn authorization(&self, origin: &str, contact: Option<&str>, now: Timestamp) -> Option<String> {
        let mut claims = json!({ "aud": origin, "exp": now.seconds() + LIFETIME_SECONDS });
        if let Some(contact) = contact {
            claims["sub"] = Value::from(contact);
        }
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "typ": "JWT", "alg": "ES256" })), part(&claims));
        let signature = self.pair.sign(&self.random, signed.as_bytes()).ok()?;
        Some(format!("vapid t={signed}.{}, k={}", URL_SAFE_NO_PAD.encode(signature), self.public))
    }
}
