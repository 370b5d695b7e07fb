//! What Apple sees.

use std::path::Path;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use obscura_server::clock::Clock;
use obscura_server::config::Config;
use serde_json::{Value, json};

use super::provider::{Answer, Provider};
use super::{file, pem, quick, register, tokens};
use crate::harness::server::try_to_start;
use crate::harness::{TestServer, eventually};

/// Lets a server in. Answers what its tokens are checked with.
pub fn configure(config: &mut Config, apns: &Provider, folder: &Path) -> DecodingKey {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let key = pem("PRIVATE KEY", pair.to_pkcs8v1().unwrap().as_ref());
    config.apns.key_file = Some(file(folder, "AuthKey.p8", &key));
    config.apns.key_id = Some("KEYID12345".to_owned());
    config.apns.team_id = Some("TEAMID6789".to_owned());
    config.apns.topic = Some("example.obscura.app".to_owned());
    config.apns.endpoint = apns.url();
    quick(config);
    DecodingKey::from_ec_der(pair.public_key().as_ref())
}

#[tokio::test]
async fn a_push_says_that_it_is_time_to_connect_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("ca.pem");
    let apns = Provider::start_encrypted_http2(&authority).await;
    let mut key = None;
    let server = TestServer::start_with(|config| {
        key = Some(configure(config, &apns, folder.path()));
        config.web_push.ca_file = Some(authority.clone());
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    register(&bob, json!({"provider": "apns", "token": "00fc13adff78"})).await;
    alice.send_to(&bob, "a long and secret message").await;
    apns.pushed("00fc13adff78", 1).await;
    let push = &apns.pushes()[0];
    assert_eq!(push.path, "/3/device/00fc13adff78");
    assert_eq!(push.json(), json!({"aps": {"content-available": 1}, "action": "check"}));
    for (name, value) in [
        ("apns-push-type", "background"),
        ("apns-priority", "5"),
        ("apns-collapse-id", "obscura_check"),
        ("apns-topic", "example.obscura.app"),
    ] {
        assert_eq!(push.header(name), value);
    }
    let token = push.header("authorization").strip_prefix("bearer ").unwrap();
    let header = jsonwebtoken::decode_header(token).unwrap();
    assert_eq!((header.alg, header.kid.as_deref()), (Algorithm::ES256, Some("KEYID12345")));
    let mut validation = Validation::new(Algorithm::ES256);
    validation.required_spec_claims.clear();
    let claims = jsonwebtoken::decode::<Value>(token, &key.unwrap(), &validation).unwrap().claims;
    assert_eq!(claims["iss"], "TEAMID6789");
}

#[tokio::test]
async fn a_token_is_deleted_when_it_is_unregistered_and_not_for_a_wrong_environment_or_topic() {
    let (apns, folder) = (Provider::start_http2().await, tempfile::tempdir().unwrap());
    let server = TestServer::start_with(|config| drop(configure(config, &apns, folder.path()))).await;
    let alice = server.account().await;
    let answers = [
        (400, "BadDeviceToken"),
        (400, "DeviceTokenNotForTopic"),
        (403, "InvalidProviderToken"),
        (410, "Unregistered"),
    ];
    for (n, (status, reason)) in answers.into_iter().enumerate() {
        let bob = server.account().await;
        let token = format!("abc{n}");
        register(&bob, json!({"provider": "apns", "token": token})).await;
        apns.set(Answer::Status(status, json!({"reason": reason})));
        alice.send_to(&bob, "x").await;
        apns.pushed(&token, 1).await;
        if status == 410 {
            eventually("the token to go", async || tokens(&server).await == n as i64).await;
        } else {
            apns.set(Answer::Status(200, json!({})));
            apns.pushed(&token, 2).await;
            assert_eq!(tokens(&server).await, n as i64 + 1);
        }
    }
}

#[tokio::test]
async fn the_four_options_come_together() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::embedded(folder.path()).unwrap();
    (config.server.port, config.server.management_port) = (0, 0);
    config.apns.topic = Some("example.obscura.app".to_owned());
    let error = try_to_start(config, Clock::system()).await.err().unwrap().to_string();
    assert!(error.contains("--apns-topic come together"), "{error}");
}
