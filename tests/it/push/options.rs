//! What the options of the push queue, of the janitor and of Firebase change.

use std::time::{Duration, Instant};

use serde_json::json;

use super::provider::Answer;
use super::{Project, phone, register, tokens};
use crate::harness::{Binary, Device, TestServer, eventually};

fn dead() -> Answer {
    let code = json!({"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": "UNREGISTERED"});
    Answer::Status(404, json!({"error": {"code": 404, "status": "NOT_FOUND", "details": [code]}}))
}

#[tokio::test]
async fn the_queue_is_looked_at_once_in_an_interval() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.push_delay = Duration::ZERO;
        config.notifications.worker_interval = Duration::from_secs(3);
    })
    .await;
    let alice = server.account().await;
    let (bob, carol) = (phone(&server, "bob").await, phone(&server, "carol").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let looked = Instant::now();
    alice.send_to(&carol, "x").await;
    project.fcm.pushed("carol", 1).await;
    let took = looked.elapsed();
    assert!(took > Duration::from_secs(2), "looked again after {took:?}");
}

#[tokio::test]
async fn the_janitor_comes_once_in_an_interval() {
    let project = Project::start().await;
    let start = async |interval: Duration| {
        let change = |config: &mut _| {
            project.configure(config);
            config.notifications.push_delay = Duration::ZERO;
            config.notifications.janitor_interval = interval;
        };
        TestServer::start_with(change).await
    };
    project.fcm.set(dead());
    for (interval, token) in [(Duration::from_millis(50), "soon"), (Duration::from_hours(1), "token-of-the-last")] {
        let server = start(interval).await;
        let (alice, bob) = (server.account().await, phone(&server, token).await);
        alice.send_to(&bob, "x").await;
        project.fcm.pushed(token, 1).await;
        let called_dead = Instant::now();
        if token == "soon" {
            eventually("the token to go", async || tokens(&server).await == 0).await;
            // The default is five seconds.
            assert!(called_dead.elapsed() < Duration::from_secs(4), "{:?}", called_dead.elapsed());
        } else {
            let database = server.database().await;
            let count = async || database.number("SELECT count(*) FROM push_tokens").await;
            tokio::time::sleep(Duration::from_millis(500)).await; // that nothing happens takes a while to see
            assert_eq!(count().await, 1);
        }
        server.stop().await;
    }
}

#[tokio::test]
async fn the_janitor_removes_so_many_tokens_at_a_time() {
    let (project, folder) = (Project::start().await, tempfile::tempdir().unwrap());
    let mut options = project.options();
    options.extend(["--janitor-interval-secs=4".to_owned(), "--janitor-batch-size=2".to_owned()]);
    let server = Binary::start(folder.path(), &options.iter().map(String::as_str).collect::<Vec<_>>()).await;
    project.fcm.set(dead());
    let alice = Device::register(&server.client()).await;
    let mut phones = Vec::new();
    for n in 0..5 {
        let bob = Device::register(&server.client()).await;
        register(&bob, json!({"token": format!("phone{n}")})).await;
        phones.push(bob);
    }
    for bob in &phones {
        alice.send_to(bob, "x").await;
    }
    // The log says how many were removed at a time.
    let removed = || -> Vec<usize> {
        let output = server.output();
        let lines = output.lines().filter(|line| line.contains("dead push tokens removed"));
        lines.filter_map(|line| line.split("count=").nth(1)?.split_whitespace().next()?.parse().ok()).collect()
    };
    eventually("the tokens to go", async || removed().iter().sum::<usize>() == 5).await;
    assert!(removed().iter().all(|count| *count <= 2) && removed().contains(&2), "{:?}", removed());
}

/// With room for more, each of the three would be asked for once, or once more by a look through all inboxes.
#[tokio::test]
async fn a_dead_token_that_the_janitor_has_no_room_for_is_asked_for_again() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.notifications.push_delay = Duration::ZERO;
        config.notifications.visibility_timeout = Duration::from_millis(200);
        config.notifications.janitor_interval = Duration::from_hours(1);
        config.notifications.janitor_channel_capacity = 1;
    })
    .await;
    project.fcm.set(dead());
    let alice = server.account().await;
    for n in 0..3 {
        let bob = phone(&server, &format!("phone{n}")).await;
        alice.send_to(&bob, "x").await;
    }
    eventually("the provider to be asked again", async || project.fcm.pushes().len() >= 10).await;
}

#[tokio::test]
async fn a_push_goes_to_the_project_and_lives_as_long_as_the_options_say() {
    let project = Project::start().await;
    let server = TestServer::start_with(|config| {
        project.configure(config);
        config.fcm.project_id = Some("another".to_owned());
        config.fcm.ttl = Duration::from_mins(2);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let push = &project.fcm.pushes()[0];
    assert_eq!(push.path, "/v1/projects/another/messages:send");
    assert_eq!(push.json()["message"]["android"]["ttl"], "120s");
}
