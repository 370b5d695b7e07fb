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

/// What an ordinary token says.
fn until(expires_at: i64) -> Claims {
    Claims { user: UserId::random(), device: DeviceId::random(), expires_at, epoch: None }
}

#[test]
fn a_previous_secret_is_accepted_and_no_longer_signs() {
    let claims = until(NOW.seconds() + 900);
    let [before, after] = [tokens(), later_tokens(true)].map(|by| by.issue_access_token(&claims));
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
    let claims = until(NOW.seconds() + 900);
    let Claims { user, device, expires_at, .. } = claims;
    let token = tokens().issue_access_token(&claims);
    assert_eq!(tokens().verify_access_token(&token, NOW), Some(claims));

    let parts: Vec<_> = token.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).unwrap()).collect();
    assert_eq!(parts[0], br#"{"typ":"JWT","alg":"HS256"}"#);
    let payload = format!(r#"{{"sub":"{user}","device_id":"{device}","exp":{expires_at}}}"#);
    assert_eq!(parts[1], payload.as_bytes());
    assert_eq!(token, tokens().issue_access_token(&claims), "the same again");
}

#[test]
fn an_access_token_is_good_for_a_minute_longer_than_it_says() {
    let expires_at = NOW.seconds();
    let token = tokens().issue_access_token(&until(expires_at));
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
    let made = |revoked_until| {
        let claims = tokens().claims(UserId::random(), DeviceId::random(), NOW, revoked_until);
        assert!(!claims.is_revoked(revoked_until) && claims.is_revoked(revoked_until.max(claims.expires_at) + 1));
        (claims.expires_at, claims.epoch)
    };
    let latest = tokens().latest_access_expiry(NOW);
    assert_eq!(latest, NOW.seconds() + 900);
    assert_eq!(made(0), (latest, None));
    assert_eq!(made(latest), (latest + 1, None));
    let hours = |hours: i64| latest + hours * 60 * 60;
    assert_eq!(made(hours(47)), (hours(47) + 1, None));
    assert_eq!(made(hours(48)), (latest, Some(hours(48))), "a wrong clock has left that second");
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

#[test]
fn an_access_token_that_a_clock_far_ahead_has_made_is_refused() {
    let made = |ahead: Duration| tokens().issue_access_token(&until(tokens().latest_access_expiry(NOW + ahead)));
    let is_good = |token: String| tokens().verify_access_token(&token, NOW).is_some();
    assert!(is_good(made(Duration::from_hours(48))), "clocks and lifetimes may differ");
    assert!(!is_good(made(Duration::from_hours(49))));
}
