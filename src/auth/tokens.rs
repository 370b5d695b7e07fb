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

/// Makes and checks tokens. Cloning is cheap.
#[derive(Clone)]
pub struct Tokens {
    inner: Arc<Inner>,
}

struct Inner {
    signing: EncodingKey,
    /// What is accepted. The first one belongs to the secret that signs; a second one to a previous secret.
    accepted: Vec<Accepted>,
    validation: Validation,
    access_lifetime: Duration,
    refresh_lifetime: Duration,
}

/// What a secret is good for, beside signing.
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
    /// The Unix second in which it expires, but for the leeway.
    pub expires_at: i64,
}

/// The claims as they stand in the token.
#[derive(Deserialize, Serialize)]
struct Payload {
    sub: String,
    device_id: String,
    exp: i64,
}

/// A secret of 32 random bytes, in URL-safe base64: a gateway ticket or the id of a link session. Whoever has it may use
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
        };
        (now.seconds() <= claims.expires_at.saturating_add(LEEWAY_SECS)).then_some(claims)
    }

    /// A token for this device until the Unix second `expires_at`.
    pub fn issue_access_token(&self, user: UserId, device: DeviceId, expires_at: i64) -> String {
        let payload = Payload { sub: user.to_string(), device_id: device.to_string(), exp: expires_at };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &payload, &self.inner.signing)
            .expect("an HMAC key signs any claims")
    }

    /// The Unix second in which an access token made at `now` expires, on a device whose tokens up to `void_to` are void.
    pub fn access_expiry(&self, now: Timestamp, void_to: i64) -> i64 {
        self.latest_access_expiry(now).max(void_to.saturating_add(1))
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
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);
    const LIFETIME: Duration = Duration::from_mins(15);
    const KEY: &[u8] = b"a secret for these tests";

    fn tokens() -> Tokens {
        let secret = Secret::new(std::str::from_utf8(KEY).unwrap());
        Tokens::new(&secret, None, LIFETIME, Duration::from_hours(24))
    }

    /// Signs with another secret than `tokens()`, and accepts that one if `is_known`.
    fn later_tokens(is_known: bool) -> Tokens {
        let previous = Secret::new(std::str::from_utf8(KEY).unwrap());
        let previous = is_known.then_some(&previous);
        Tokens::new(&Secret::new("the next secret of this server"), previous, LIFETIME, LIFETIME)
    }

    #[test]
    fn a_previous_secret_is_accepted_and_no_longer_signs() {
        let (user, device, expires_at) = (UserId::random(), DeviceId::random(), NOW.seconds() + 900);
        let [before, after] = [tokens(), later_tokens(true)].map(|by| by.issue_access_token(user, device, expires_at));
        assert!(later_tokens(true).verify_access_token(&before, NOW).is_some());
        assert!(later_tokens(true).verify_access_token(&after, NOW).is_some());
        assert!(later_tokens(false).verify_access_token(&before, NOW).is_none());
        assert!(tokens().verify_access_token(&after, NOW).is_none(), "signed with the new one");
    }

    #[test]
    fn a_successor_is_found_under_the_secret_that_it_was_derived_from_or_not_at_all() {
        let (used, key) = (RefreshToken::random(), Some(IdempotencyKey::random()));
        for by in [tokens(), later_tokens(false)] {
            let next = by.successor(&used, key);
            assert!(later_tokens(true).successor_known_by(&used, key, &next.secret_hash()) == Some(next));
        }
        let (next, other) = (tokens().successor(&used, key), Some(IdempotencyKey::random()));
        assert!(later_tokens(false).successor_known_by(&used, key, &next.secret_hash()).is_none());
        assert!(later_tokens(true).successor_known_by(&used, other, &next.secret_hash()).is_none());
        assert!(later_tokens(true).successor_known_by(&used, None, &next.secret_hash()).is_none());
    }

    fn encoded(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    /// A token with this header and these claims, signed with HMAC-SHA256.
    fn signed(header: &Value, claims: &Value, key: &[u8]) -> String {
        let message = format!("{}.{}", encoded(header), encoded(claims));
        let signature = hmac(key).chain_update(&message).finalize().into_bytes();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn header() -> Value {
        json!({"typ": "JWT", "alg": "HS256"})
    }

    fn claims() -> Value {
        let (user, device) = (UserId::random().to_string(), DeviceId::random().to_string());
        json!({"sub": user, "device_id": device, "exp": NOW.seconds() + 900})
    }

    #[test]
    fn an_access_token_says_what_it_was_issued_for() {
        let (user, device, expires_at) = (UserId::random(), DeviceId::random(), NOW.seconds() + 900);
        let token = tokens().issue_access_token(user, device, expires_at);
        assert_eq!(tokens().verify_access_token(&token, NOW), Some(Claims { user, device, expires_at }));

        let parts: Vec<_> = token.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).unwrap()).collect();
        assert_eq!(parts[0], br#"{"typ":"JWT","alg":"HS256"}"#);
        let payload = format!(r#"{{"sub":"{user}","device_id":"{device}","exp":{expires_at}}}"#);
        assert_eq!(parts[1], payload.as_bytes());
        assert_eq!(token, tokens().issue_access_token(user, device, expires_at), "the same again");
    }

    #[test]
    fn an_access_token_is_good_for_a_minute_longer_than_it_says() {
        let expires_at = NOW.seconds();
        let token = tokens().issue_access_token(UserId::random(), DeviceId::random(), expires_at);
        let is_good = |millis| tokens().verify_access_token(&token, Timestamp::from_millis(millis)).is_some();
        assert!(is_good(expires_at * 1000));
        assert!(is_good((expires_at + 60) * 1000 + 999));
        assert!(!is_good((expires_at + 61) * 1000));
    }

    #[test]
    fn forged_access_tokens_are_refused() {
        let is_good = |token: &str| tokens().verify_access_token(token, NOW).is_some();
        let (header, claims) = (header(), claims());
        let good = signed(&header, &claims, KEY);
        assert!(is_good(&good), "the others differ from this one in one thing");

        assert!(!is_good(&signed(&header, &claims, b"another secret of somebody")), "another key");
        assert!(!is_good(&signed(&header, &claims, b"")), "an empty key");
        let message = good.rsplit_once('.').unwrap().0;
        assert!(!is_good(message), "no signature");
        assert!(!is_good(&format!("{message}.")), "an empty signature");
        let other_claims = encoded(&json!({"sub": claims["sub"], "device_id": claims["device_id"], "exp": i64::MAX}));
        let (head, tail) = (message.split_once('.').unwrap().0, good.rsplit_once('.').unwrap().1);
        assert!(!is_good(&format!("{head}.{other_claims}.{tail}")), "claims changed");

        for alg in ["none", "None", "HS384", "HS512", "RS256", "ES256", "EdDSA", "hs256", ""] {
            let other = json!({"typ": "JWT", "alg": alg});
            assert!(!is_good(&signed(&other, &claims, KEY)), "{alg}, signed");
            assert!(!is_good(&format!("{}.{}.", encoded(&other), encoded(&claims))), "{alg}, not signed");
        }
        let longer = jsonwebtoken::encode(&Header::new(Algorithm::HS512), &claims, &EncodingKey::from_secret(KEY));
        assert!(!is_good(&longer.unwrap()), "rightly signed with HS512");
        for text in ["", ".", "..", "a.b.c", "é", &format!("{good}."), &format!(" {good}")] {
            assert!(!is_good(text), "{text:?}");
        }
    }

    #[test]
    fn access_tokens_with_missing_or_odd_claims_are_refused() {
        for (member, value) in [
            ("exp", json!(null)),
            ("exp", json!("1800000900")),
            ("exp", json!(1_800_000_900.5)),
            ("exp", json!(-1)),
            ("sub", json!(null)),
            ("sub", json!("alice")),
            ("device_id", json!(1)),
            ("device_id", json!("")),
        ] {
            let mut claims = claims();
            claims[member] = value;
            assert_eq!(tokens().verify_access_token(&signed(&header(), &claims, KEY), NOW), None, "{claims}");
            claims.as_object_mut().unwrap().remove(member);
            assert_eq!(tokens().verify_access_token(&signed(&header(), &claims, KEY), NOW), None, "{claims}");
        }
    }

    #[test]
    fn access_tokens_outlast_those_that_were_made_void() {
        assert_eq!(tokens().access_expiry(NOW, 0), NOW.seconds() + 900);
        let void_to = tokens().latest_access_expiry(NOW);
        assert_eq!(tokens().access_expiry(NOW, void_to), void_to + 1);
        assert_eq!(tokens().refresh_expiry(NOW), NOW + Duration::from_hours(24));
    }

    #[test]
    fn a_refresh_token_is_43_url_safe_characters() {
        let token = RefreshToken::random();
        assert_eq!(token.text().len(), 43);
        assert!(RefreshToken::parse(&token.text()).unwrap() == token);
        assert!(token != RefreshToken::random());
        let plus = URL_SAFE_NO_PAD.encode([0xfb; 32]).replace('-', "+");
        for bad in ["", "x", &token.text()[..42], &format!("{}A", token.text()), &format!("{}=", token.text()), &plus] {
            assert!(RefreshToken::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_successor_keeps_the_family_and_is_the_same_again_only_under_one_key() {
        let (used, key) = (RefreshToken::random(), IdempotencyKey::random());
        let next = tokens().successor(&used, Some(key));
        assert_eq!(next.family(), used.family());
        assert_ne!(next.secret_hash(), used.secret_hash());
        assert!(next == tokens().successor(&used, Some(key)));
        assert!(next != tokens().successor(&used, Some(IdempotencyKey::random())));
        assert!(next != tokens().successor(&next, Some(key)));
        let other = Tokens::new(&Secret::new("the secret of another server"), None, LIFETIME, LIFETIME);
        assert!(next != other.successor(&used, Some(key)));
        assert!(tokens().successor(&used, None) != tokens().successor(&used, None));
    }

    #[test]
    fn a_secret_is_known_by_the_hash_of_its_text() {
        let secret = OpaqueSecret::random();
        assert_eq!(secret.text().len(), 43);
        assert_eq!(secret.hash(), OpaqueSecret::hash_of(secret.text()));
        assert_ne!(secret.hash(), OpaqueSecret::random().hash());
    }
}
