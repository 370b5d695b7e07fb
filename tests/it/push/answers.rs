//! What the providers answer, and what comes of it.

use std::sync::Arc;
use std::time::Duration;

use obscura_server::telemetry::metrics::{PushOutcome, PushProvider};
use serde_json::json;
use tokio::sync::Semaphore;

use super::provider::{Answer, Provider};
use super::{Project, everything_due_is_pushed, phone, quick, register, tokens};
use crate::harness::{TestServer, eventually};

fn unregistered() -> Answer {
    let code = json!({"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": "UNREGISTERED"});
    Answer::Status(404, json!({"error": {"code": 404, "status": "NOT_FOUND", "details": [code]}}))
}

#[tokio::test]
async fn a_dead_token_is_deleted_within_the_interval_of_the_janitor() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    project.fcm.set(unregistered());
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    eventually("the token to go", async || tokens(&server).await == 0).await;
    let metrics = server.server().app().metrics.clone();
    assert!(metrics.pushes.value((PushProvider::Fcm, PushOutcome::TokenGone)) >= 1);
    eventually("the token to be counted", async || metrics.dead_tokens.value(()) == 1).await;
}

#[tokio::test]
async fn more_dead_tokens_than_the_janitor_can_hold_go_all_the_same() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.janitor_channel_capacity = 1;
        config.notifications.janitor_batch_size = 1;
        config.notifications.visibility_timeout = Duration::from_millis(200);
    })
    .await;
    let alice = server.account().await;
    project.fcm.set(unregistered());
    for n in 0..10 {
        let bob = phone(&server, &format!("phone{n}")).await;
        alice.send_to(&bob, "x").await;
    }
    eventually("all tokens to go", async || tokens(&server).await == 0).await;
}

#[tokio::test]
async fn a_wrong_configuration_deletes_nothing_and_pushes_go_out_once_it_is_right() {
    let project = Project::start().await;
    let server = project.server().await;
    let alice = server.account().await;
    let refusals = [
        Answer::Status(403, json!({"error": {"code": 403, "status": "PERMISSION_DENIED"}})),
        Answer::Status(404, json!({"error": {"code": 404, "status": "NOT_FOUND", "message": "no such project"}})),
        Answer::Status(401, json!({"error": {"code": 401, "status": "UNAUTHENTICATED"}})),
        Answer::Status(404, json!("not from FCM at all")),
    ];
    for (n, refusal) in refusals.into_iter().enumerate() {
        let token = format!("phone{n}");
        let bob = phone(&server, &token).await;
        project.fcm.set(refusal);
        alice.send_to(&bob, "x").await;
        project.fcm.pushed(&token, 1).await;
        project.fcm.set(Answer::Status(200, json!({})));
        project.fcm.pushed(&token, 2).await;
        assert_eq!(tokens(&server).await, n as i64 + 1);
    }
    let pushes = server.server().app().metrics.pushes.clone();
    eventually("the last push to be settled", async || pushes.value((PushProvider::Fcm, PushOutcome::Accepted)) == 4)
        .await;
    let refused = [PushOutcome::Refused, PushOutcome::Unavailable].map(|outcome| (PushProvider::Fcm, outcome));
    assert_eq!(refused.map(|labels| pushes.value(labels)).iter().sum::<u64>(), 4);
}

#[tokio::test]
async fn a_failed_push_is_tried_again_when_its_lease_is_over_and_then_no_more() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    project.fcm.set(Answer::Status(500, json!({})));
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    project.fcm.set(Answer::Status(200, json!({})));
    project.fcm.pushed("bob", 2).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 2);
}

#[tokio::test]
async fn a_provider_that_asks_to_wait_is_asked_no_sooner() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    let carol = phone(&server, "carol").await;
    project.fcm.set(Answer::RetryAfter(503, "3"));
    let before = std::time::Instant::now();
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    project.fcm.set(Answer::Status(200, json!({})));
    alice.send_to(&carol, "x").await;
    project.fcm.pushed("carol", 1).await;
    assert!(before.elapsed() >= Duration::from_secs(3));
    project.fcm.pushed("bob", 2).await;
}

#[tokio::test]
async fn free_slots_are_used_at_once_by_those_who_wait_for_one() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.worker_concurrency = 10;
        config.notifications.worker_interval = Duration::from_secs(1);
        config.notifications.visibility_timeout = Duration::from_secs(30);
    })
    .await;
    let alice = server.account().await;
    let mut phones = Vec::new();
    for n in 0..60 {
        phones.push(phone(&server, &format!("phone{n}")).await);
    }
    project.fcm.set(Answer::Late(Duration::from_millis(200)));
    let all: Vec<_> = phones.iter().map(|phone| (phone, &b"x"[..])).collect();
    alice.send(&all).await;
    eventually("the first push", async || !project.fcm.pushes().is_empty()).await;
    let since = std::time::Instant::now();
    eventually("all to be pushed", async || project.fcm.pushes().len() == 60).await;
    // Six rounds of 200 ms; with a look in three seconds for each ten it was twelve seconds.
    assert!(since.elapsed() < Duration::from_secs(4), "it took {:?}", since.elapsed());
}

#[tokio::test]
async fn a_provider_that_hangs_does_not_stop_another() {
    let project = Project::start().await;
    let apns = Provider::start_http2().await;
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(|config| {
        project.configure(config);
        super::apns::configure(config, &apns, folder.path());
        config.notifications.worker_concurrency = 2;
        // So long a push may hang, nearly.
        config.notifications.visibility_timeout = Duration::from_secs(30);
    })
    .await;
    let alice = server.account().await;
    project.fcm.set(Answer::Nothing);
    for n in 0..6 {
        let bob = phone(&server, &format!("phone{n}")).await;
        alice.send_to(&bob, "x").await;
    }
    eventually("all slots to be taken", async || project.fcm.pushes().len() == 2).await;
    let carol = server.account().await;
    register(&carol, json!({"provider": "apns", "token": "c0ffee"})).await;
    alice.send_to(&carol, "x").await;
    apns.pushed("c0ffee", 1).await;
    assert_eq!(project.fcm.pushes().len(), 2, "no more than the concurrency");
}

#[tokio::test]
async fn without_a_provider_a_push_is_logged_once_and_holds_up_nothing() {
    let server = TestServer::start_with(quick).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    let database = server.database().await;
    let told = "SELECT count(*) FROM push_tokens WHERE pushed_to > 0";
    eventually("the push to be settled", async || database.number(told).await == 1).await;
    assert_eq!(tokens(&server).await, 1);
}

#[tokio::test]
async fn mail_that_comes_while_its_device_is_being_woken_is_pushed_for_too() {
    let project = Project::start().await;
    let apns = Provider::start_http2().await;
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(|config| {
        project.configure(config);
        super::apns::configure(config, &apns, folder.path());
        config.notifications.visibility_timeout = Duration::from_secs(30);
    })
    .await;
    let (alice, bob, carol) = (server.account().await, phone(&server, "bob").await, server.account().await);
    register(&carol, json!({"provider": "apns", "token": "c0ffee"})).await;
    let gate = Arc::new(Semaphore::new(0));
    project.fcm.set(Answer::After(gate.clone()));
    alice.send_to(&bob, "one").await;
    project.fcm.pushed("bob", 1).await;
    alice.send_to(&bob, "two").await;
    // When this has been pushed for, the mail before it has reached the queue, where it met the job that is leased.
    alice.send_to(&carol, "x").await;
    apns.pushed("c0ffee", 1).await;
    gate.add_permits(10);
    project.fcm.pushed("bob", 2).await;
}

#[tokio::test]
async fn a_push_under_way_does_not_hold_up_the_end_of_the_server_and_is_made_up_for() {
    let project = Project::start().await;
    let mut server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.visibility_timeout = Duration::from_secs(5);
        config.notifications.gc_interval = Duration::from_millis(200);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    project.fcm.set(Answer::Nothing);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let before = std::time::Instant::now();
    server.restart().await;
    assert!(before.elapsed() < server.config().server.shutdown_timeout, "it took {:?}", before.elapsed());
    project.fcm.set(Answer::Status(200, json!({})));
    project.fcm.pushed("bob", 2).await;
}
