//! Tokens: access tokens, which a signature proves, and secrets, which the store knows by their hash.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clock::Timestamp;
use crate::config::Secret;
use crate::model::ids::{DeviceId, IdempotencyKey, UserId};

/// An access token is good for this many seconds more, because clocks differ.
const LEEWAY_SECS: i64 = 60;

/// A token that expires this many seconds later than one that is made now was made by a wrong clock. Smaller differences may
/// come from a changed lifetime, or from log-outs, each of which lets the next token live for a second more.
pub const WRONG_BY_SECS: i64 = 48 * 60 * 60;

/// When the tokens of a device are void for so many seconds longer than a new one lives, that comes from a wrong clock. Sooner
/// voids are outlived by new tokens. An hour less than what makes a token itself look wrong.
const REVOKED_BY_WRONG_CLOCK_SECS: i64 = 47 * 60 * 60;

/// Makes and checks tokens. Cloning is cheap.
#[derive(Clone)]
pub struct Tokens {
    inner: Arc<Inner>,
}

struct Inner {
    signing: EncodingKey,
    /// The accepted keys. The first one belongs to the secret that signs; a second one to a previous secret.
    accepted: Vec<Accepted>,
    validation: Validation,
    access_lifetime: Duration,
    refresh_lifetime: Duration,
}

/// The keys that are derived from a secret.
struct Accepted {
    checking: DecodingKey,
    /// For refresh tokens whose successor can be made again.
    succession: Hmac<Sha256>,
}

/// What an access token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The account.
    pub user: UserId,
    /// The device.
    pub device: DeviceId,
    /// The Unix second in which it expires, without the leeway.
    pub expires_at: i64,
    /// The Unix second up to which the device's tokens were void when this one was made, if that lies too far ahead for the
    /// token to outlive it: a wrong clock has left it. The token is good until the second changes, which ends the session.
    pub epoch: Option<i64>,
}

impl Claims {
    /// True if the session in which the token was made has ended, for a device whose tokens are void up to `revoked_until`.
    pub fn is_revoked(&self, revoked_until: i64) -> bool {
        self.expires_at <= revoked_until && self.epoch != Some(revoked_until)
    }
}

/// The claims as they stand in the token.
#[derive(Deserialize, Serialize)]
struct Payload {
    sub: String,
    device_id: String,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch: Option<i64>,
}

/// A secret of 32 random bytes, in URL-safe base64: a gateway ticket or the id of a link session. Its holder may use
/// it; the store knows only its hash.
#[derive(Clone)]
pub struct OpaqueSecret {
    text: String,
}

impl OpaqueSecret {
    /// A new one.
    pub fn random() -> Self {
        Self { text: URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()) }
    }

    /// As clients see it: 43 characters.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the store knows it by.
    pub fn hash(&self) -> [u8; 32] {
        Self::hash_of(&self.text)
    }

    /// What the store would know by the text that a client sent, whatever that is.
    pub fn hash_of(text: &str) -> [u8; 32] {
        Sha256::digest(text).into()
    }
}

/// A refresh token: 32 random bytes, 43 characters in URL-safe base64.
///
/// Its first half stays through refreshes, so a token that was used already can be told from one that never was.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RefreshToken {
    family: [u8; 16],
    secret: [u8; 16],
}

impl RefreshToken {
    /// The first one of a new family.
    pub fn random() -> Self {
        Self { family: rand::random(), secret: rand::random() }
    }

    /// Reads what a client sent; `None` when it can't be a refresh token.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 32] = URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (family, secret) = bytes.split_at(16);
        Some(Self { family: family.try_into().ok()?, secret: secret.try_into().ok()? })
    }

    /// As clients see it.
    pub fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode([self.family, self.secret].concat())
    }

    /// The half that stays. The store keeps it as it is.
    pub fn family(&self) -> [u8; 16] {
        self.family
    }

    /// What the store knows the half by that changes.
    pub fn secret_hash(&self) -> [u8; 32] {
        Sha256::digest(self.secret).into()
    }
}

impl Tokens {
    /// Signs with `jwt_secret`; tokens live for the given times. What was signed with `previous` is accepted too.
    pub fn new(
        jwt_secret: &Secret,
        previous: Option<&Secret>,
        access_lifetime: Duration,
        refresh_lifetime: Duration,
    ) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        // The library would read the system's clock. `exp` is a member of `Payload`, and checked against ours.
        validation.validate_exp = false;
        validation.required_spec_claims.clear();
        let secrets = [jwt_secret].into_iter().chain(previous);
        Self {
            inner: Arc::new(Inner {
                signing: EncodingKey::from_secret(jwt_secret.expose().as_bytes()),
                accepted: secrets.map(|secret| Accepted::of(secret.expose().as_bytes())).collect(),
                validation,
                access_lifetime,
                refresh_lifetime,
            }),
        }
    }

    /// What the token says, if it was signed with an accepted secret and has not expired.
    pub fn verify_access_token(&self, token: &str, now: Timestamp) -> Option<Claims> {
        let read = |key: &Accepted| jsonwebtoken::decode(token, &key.checking, &self.inner.validation).ok();
        let payload: Payload = self.inner.accepted.iter().find_map(read)?.claims;
        let claims = Claims {
            user: UserId::parse(&payload.sub)?,
            device: DeviceId::parse(&payload.device_id)?,
            expires_at: payload.exp,
            epoch: payload.epoch,
        };
        let is_alive = now.seconds() <= claims.expires_at.saturating_add(LEEWAY_SECS);
        // A clock that was wrong may have made tokens that expire in weeks.
        let is_honest = claims.expires_at <= self.latest_access_expiry(now).saturating_add(WRONG_BY_SECS);
        (is_alive && is_honest).then_some(claims)
    }

    /// The token that says this.
    pub fn issue_access_token(&self, claims: &Claims) -> String {
        let Claims { user, device, expires_at: exp, epoch } = *claims;
        let payload = Payload { sub: user.to_string(), device_id: device.to_string(), exp, epoch };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &payload, &self.inner.signing)
            .expect("an HMAC key signs any claims")
    }

    /// What an access token says that is made at `now` for a device whose tokens up to the Unix second `revoked_until` are void.
    pub fn claims(&self, user: UserId, device: DeviceId, now: Timestamp, revoked_until: i64) -> Claims {
        let expires_at = self.latest_access_expiry(now);
        if revoked_until > expires_at.saturating_add(REVOKED_BY_WRONG_CLOCK_SECS) {
            return Claims { user, device, expires_at, epoch: Some(revoked_until) };
        }
        Claims { user, device, expires_at: expires_at.max(revoked_until.saturating_add(1)), epoch: None }
    }

    /// Access tokens that exist at `now` expire in this Unix second or before, unless the device has been logged out.
    pub fn latest_access_expiry(&self, now: Timestamp) -> i64 {
        (now + self.inner.access_lifetime).seconds()
    }

    /// When a refresh token made at `now` expires.
    pub fn refresh_expiry(&self, now: Timestamp) -> Timestamp {
        now + self.inner.refresh_lifetime
    }

    /// The token that takes the place of `used`. With a key it is the same one each time.
    pub fn successor(&self, used: &RefreshToken, key: Option<IdempotencyKey>) -> RefreshToken {
        let Some(key) = key else { return RefreshToken { family: used.family, secret: rand::random() } };
        let [current, ..] = &self.inner.accepted[..] else { unreachable!("there is a secret that signs") };
        current.successor(used, key)
    }

    /// The token that took the place of `used` under this key, if the store knows it by `secret_hash`: it may have been
    /// derived from either accepted secret.
    pub fn successor_known_by(
        &self,
        used: &RefreshToken,
        key: Option<IdempotencyKey>,
        secret_hash: &[u8; 32],
    ) -> Option<RefreshToken> {
        let key = key?;
        let mut successors = self.inner.accepted.iter().map(|accepted| accepted.successor(used, key));
        successors.find(|token| token.secret_hash() == *secret_hash)
    }
}

impl Accepted {
    fn of(secret: &[u8]) -> Self {
        let derived = hmac(secret).chain_update(b"obscura: successors of refresh tokens").finalize().into_bytes();
        Self { checking: DecodingKey::from_secret(secret), succession: hmac(&derived) }
    }

    fn successor(&self, used: &RefreshToken, key: IdempotencyKey) -> RefreshToken {
        let mac = self.succession.clone();
        let derived = mac.chain_update(used.family).chain_update(used.secret).chain_update(key.as_bytes()).finalize();
        let derived: [u8; 32] = derived.into_bytes().into();
        let (secret, _) = derived.split_first_chunk().expect("32 bytes begin with 16");
        RefreshToken { family: used.family, secret: *secret }
    }
}

fn hmac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

#[cfg(test)]
mod tests;
