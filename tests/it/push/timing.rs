//! When a phone is woken, and how often.

use std::time::Duration;

use serde_json::json;

use super::{Project, everything_due_is_pushed, phone, register};
use crate::harness::{Device, TestServer, eventually};

#[tokio::test]
async fn a_burst_is_one_push_and_later_mail_another() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    for _ in 0..20 {
        alice.send_to(&bob, "x").await;
    }
    project.fcm.pushed("bob", 1).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
    alice.send_to(&bob, "later").await;
    project.fcm.pushed("bob", 2).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 2);
}

#[tokio::test]
async fn a_device_that_acknowledged_in_time_gets_no_push() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    let mut socket = bob.connect().await;
    alice.send_to(&bob, "x").await;
    let envelope = socket.expect_message("x").await;
    socket.ack(&[envelope]).await;
    // The ack is written within the grace only if it does not wait for company.
    socket.close().await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 0);
}

#[tokio::test]
async fn a_connection_alone_or_an_ack_of_something_else_cancels_nothing() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "one").await;
    alice.send_to(&bob, "two").await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(2).await;
    socket.ack(&envelopes[..1]).await;
    project.fcm.pushed("bob", 1).await;
}

#[tokio::test]
async fn a_socket_that_ends_with_mail_left_has_its_phone_woken_again() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let mut socket = bob.connect().await;
    socket.expect_message("x").await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
    socket.close().await;
    project.fcm.pushed("bob", 2).await;
}

#[tokio::test]
async fn a_socket_that_ends_with_an_empty_inbox_causes_no_push() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let mut socket = bob.connect().await;
    let envelope = socket.expect_message("x").await;
    socket.ack(&[envelope]).await;
    socket.close().await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
}

#[tokio::test]
async fn no_push_comes_before_the_grace_is_over() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.push_delay = Duration::from_secs(2);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    let before = std::time::Instant::now();
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    assert!(before.elapsed() >= Duration::from_secs(2));
}

#[tokio::test]
async fn each_device_of_an_account_is_woken_for_its_own_mail() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "phone").await);
    let tablet = bob.link().await;
    register(&tablet, json!({"token": "tablet", "provider": "fcm"})).await;
    let desktop = bob.link().await;
    alice.send(&[(&bob, b"x"), (&tablet, b"y"), (&desktop, b"z")]).await;
    project.fcm.pushed("phone", 1).await;
    project.fcm.pushed("tablet", 1).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.pushes().len(), 3);
}

#[tokio::test]
async fn a_device_that_has_withdrawn_its_token_gets_no_push() {
    let project = Project::start().await;
    let server = project.server().await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    let withdraw = async || bob.request("DELETE", "/v1/push-token").send().await.expect(204);
    withdraw().await;
    withdraw().await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 0);
    server.client().delete("/v1/push-token").send().await.expect(401);
}

#[tokio::test]
async fn a_new_token_is_told_of_mail_that_the_old_one_was_told_of() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.gc_interval = Duration::from_millis(100);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "old").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("old", 1).await;
    register(&bob, json!({"token": "new"})).await;
    project.fcm.pushed("new", 1).await;
}

#[tokio::test]
async fn a_device_whose_prekeys_run_low_is_woken_once() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.prekeys.refill_threshold = 100;
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    let fetch = async |by: &Device| drop(by.bundles(bob.user).await);
    fetch(&alice).await;
    project.fcm.pushed("bob", 1).await;
    fetch(&alice).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
    // A quarter of an hour later it is told again.
    server.clock.advance(Duration::from_mins(16));
    let alice = alice.log_in().await;
    eventually("another push", async || {
        fetch(&alice).await;
        project.fcm.count("bob") == 2
    })
    .await;
}

#[tokio::test]
async fn a_push_after_which_no_client_came_is_repeated_after_a_day() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.gc_interval = Duration::from_millis(100);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
    server.clock.advance(Duration::from_hours(25));
    project.fcm.pushed("bob", 2).await;
}
