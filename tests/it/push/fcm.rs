//! What Firebase sees.

use jsonwebtoken::{Algorithm, Validation};
use serde_json::{Value, json};

use super::{Project, phone};
use crate::harness::server::try_to_start;

#[tokio::test]
async fn a_push_says_that_it_is_time_to_connect_and_nothing_else() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bobs-phone").await);
    alice.send_to(&bob, "a long and secret message").await;
    project.fcm.pushed("bobs-phone", 1).await;
    let push = &project.fcm.pushes()[0];
    assert_eq!(push.path, "/v1/projects/obscura/messages:send");
    assert_eq!(push.header("authorization"), "Bearer granted");
    let message = json!({"message": {
        "token": "bobs-phone",
        "data": {"action": "check"},
        "android": {"collapseKey": "obscura_check", "priority": "HIGH", "ttl": "604800s"},
        "apns": {
            "headers": {"apns-push-type": "background", "apns-priority": "5", "apns-collapse-id": "obscura_check"},
            "payload": {"aps": {"content-available": 1}},
        },
    }});
    assert_eq!(push.json(), message);
}

#[tokio::test]
async fn the_access_token_is_asked_for_once_with_a_signed_assertion() {
    let project = Project::start().await;
    let server = project.server().await;
    let alice = server.account().await;
    for n in 0..5 {
        let token = format!("phone{n}");
        let bob = phone(&server, &token).await;
        alice.send_to(&bob, "x").await;
    }
    for n in 0..5 {
        project.fcm.pushed(&format!("phone{n}"), 1).await;
    }
    let requests = project.fcm.token_requests();
    assert_eq!(requests.len(), 1);
    let form = String::from_utf8(requests[0].body.to_vec()).unwrap();
    let grant = "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=";
    let assertion = form.strip_prefix(grant).unwrap();
    let mut validation = Validation::new(Algorithm::RS256);
    validation.set_audience(&[format!("{}/token", project.fcm.url())]);
    let claims = jsonwebtoken::decode::<Value>(assertion, &project.key, &validation).unwrap().claims;
    assert_eq!(claims["iss"], "pusher@obscura.example");
    assert_eq!(claims["scope"], "https://www.googleapis.com/auth/firebase.messaging");
}

#[tokio::test]
async fn credentials_that_are_none_stop_the_start_with_a_sentence() {
    use obscura_server::clock::Clock;
    use obscura_server::config::Config;

    let folder = tempfile::tempdir().unwrap();
    let file = super::file(folder.path(), "account.json", r#"{"private_key": "hunter2"}"#);
    let mut config = Config::embedded(folder.path()).unwrap();
    (config.server.port, config.server.management_port) = (0, 0);
    config.fcm.credentials_file = Some(file.clone());
    let error = try_to_start(config, Clock::system()).await.err().unwrap().to_string();
    let expected = "can't be used: it is not the JSON file of a service account";
    assert_eq!(error, format!("--fcm-credentials-file: \"{}\" {expected}", file.display()));
}
