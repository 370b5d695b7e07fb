//! What the queue has lost is found in the inboxes again.

use std::time::Duration;

use obscura_server::config::Secret;
use serde_json::json;

use super::provider::Answer;
use super::{Project, everything_due_is_pushed, phone};
use crate::bus::cluster::cluster;
use crate::harness::{TestServer, Valkey, eventually};

const KEY: &str = "jobs:push_notifications";

/// A server whose queue is in this Valkey.
async fn server_on(project: &Project, valkey: &Valkey, look: Duration) -> TestServer {
    TestServer::start_with(|config| {
        project.configure(config);
        config.pubsub.url = Secret::new(valkey.url());
        config.pubsub.min_backoff = Duration::from_millis(20);
        config.pubsub.max_backoff = Duration::from_millis(200);
        config.notifications.push_queue_key = KEY.to_owned();
        config.notifications.gc_interval = look;
    })
    .await
}

const NEVER: Duration = Duration::from_hours(1);
const SOON: Duration = Duration::from_millis(200);

async fn waiting(valkey: &Valkey) -> i64 {
    redis::cmd("ZCARD").arg(KEY).query_async(&mut valkey.connection().await).await.unwrap()
}

#[tokio::test]
async fn the_queue_in_valkey_wakes_once_and_is_empty_then() {
    let (project, valkey) = (Project::start().await, Valkey::start().await);
    let server = server_on(&project, &valkey, NEVER).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    for _ in 0..10 {
        alice.send_to(&bob, "x").await;
    }
    project.fcm.pushed("bob", 1).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
    eventually("an empty queue", async || waiting(&valkey).await == 0).await;
}

#[tokio::test]
async fn a_lease_that_was_lost_runs_out() {
    let (project, valkey) = (Project::start().await, Valkey::start().await);
    let server = server_on(&project, &valkey, NEVER).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    // As if a node had leased the job and died: it is in the queue, due in a second.
    let device = server.database().await.number("SELECT device_no FROM push_tokens").await;
    let mut connection = valkey.connection().await;
    let (seconds, _): (i64, i64) = redis::cmd("TIME").query_async(&mut connection).await.unwrap();
    let add = redis::cmd("ZADD").arg(KEY).arg((seconds + 2) * 1000).arg(device).to_owned();
    let () = add.query_async(&mut connection).await.unwrap();
    let before = std::time::Instant::now();
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    assert!(before.elapsed() >= Duration::from_millis(900), "the lease was not over");
}

#[tokio::test]
async fn a_valkey_that_was_emptied_costs_time_and_no_push() {
    let (project, valkey) = (Project::start().await, Valkey::start().await);
    let server = server_on(&project, &valkey, SOON).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    project.fcm.set(Answer::Status(500, json!({})));
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    let () = redis::cmd("FLUSHALL").query_async(&mut valkey.connection().await).await.unwrap();
    project.fcm.set(Answer::Status(200, json!({})));
    project.fcm.pushed("bob", 2).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 2);
}

#[tokio::test]
async fn sends_do_not_wait_for_a_valkey_that_is_away_and_pushes_go_out_when_it_is_back() {
    let (project, mut valkey) = (Project::start().await, Valkey::start().await);
    let server = server_on(&project, &valkey, NEVER).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    valkey.kill();
    let before = std::time::Instant::now();
    for _ in 0..20 {
        alice.send_to(&bob, "x").await;
    }
    assert!(before.elapsed() < Duration::from_secs(3), "sends wait");
    assert_eq!(project.fcm.count("bob"), 0);
    valkey.restart().await;
    project.fcm.pushed("bob", 1).await;
    everything_due_is_pushed(&server, &project.fcm, &alice).await;
    assert_eq!(project.fcm.count("bob"), 1);
}

#[tokio::test]
async fn what_another_server_left_in_the_queue_is_removed() {
    let (project, valkey) = (Project::start().await, Valkey::start().await);
    let mut connection = valkey.connection().await;
    let add = redis::cmd("ZADD").arg(KEY).arg(0).arg("67e55044-10b1-426f-9247-bb680e5fe0c8").to_owned();
    let () = add.query_async(&mut connection).await.unwrap();
    let server = server_on(&project, &valkey, NEVER).await;
    eventually("the queue to be clean", async || waiting(&valkey).await == 0).await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
}

#[tokio::test]
async fn a_push_that_was_due_when_the_server_stopped_goes_out_after_the_start() {
    let project = Project::start().await;
    let mut server = TestServer::start_embedded_with(|config| {
        project.configure(config);
        config.notifications.push_delay = Duration::from_hours(1);
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    alice.send_to(&bob, "x").await;
    server
        .restart_with(|config| {
            config.notifications.push_delay = super::GRACE;
            config.notifications.gc_interval = SOON;
        })
        .await;
    project.fcm.pushed("bob", 1).await;
}

#[tokio::test]
async fn the_inboxes_are_looked_through_once_in_an_interval() {
    let project = Project::start().await;
    let server = TestServer::start_embedded_with(|config| {
        project.configure(config);
        config.notifications.push_delay = Duration::ZERO;
        config.notifications.gc_interval = SOON;
    })
    .await;
    let (alice, bob) = (server.account().await, phone(&server, "bob").await);
    let database = server.database().await;
    alice.send_to(&bob, "x").await;
    // The first look comes soon after the start in any case; the second only when the interval is over.
    for pushes in 1..=3 {
        project.fcm.pushed("bob", pushes).await;
        let recorded = "SELECT count(*) FROM push_tokens WHERE pushed_to > 0";
        eventually("the push to be settled", async || database.number(recorded).await == 1).await;
        // As if nobody had been woken for what waits, and the queue were lost.
        database.execute("UPDATE push_tokens SET pushed_to = 0").await;
    }
}

#[tokio::test]
async fn the_queue_is_found_in_a_cluster_whichever_member_is_asked() {
    let (project, members) = (Project::start().await, cluster().await);
    for (n, member) in members.iter().enumerate() {
        let server = TestServer::start_with(|config| {
            project.configure(config);
            config.pubsub.url = Secret::new(format!("redis-cluster://{}", member.address()));
        })
        .await;
        let token = format!("phone{n}");
        let (alice, bob) = (server.account().await, phone(&server, &token).await);
        alice.send_to(&bob, "x").await;
        project.fcm.pushed(&token, 1).await;
        // It would go on beside the next one, take its jobs, and find nobody to wake in a database of its own.
        server.stop().await;
    }
}
