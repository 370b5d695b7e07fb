//! What the management port says about the wire.

use std::time::{Duration, Instant};

use obscura_server::config::Secret;
use serde_json::json;

use crate::harness::{Binary, Proxy, TestServer, Valkey, eventually, within};

#[tokio::test]
async fn a_node_starts_without_valkey_serves_and_is_ready_once_it_is_there() {
    let mut valkey = Valkey::start().await;
    valkey.kill();
    let server = TestServer::start_with(|config| {
        config.pubsub.url = Secret::new(valkey.url());
        config.pubsub.min_backoff = Duration::from_millis(20);
        config.health.pubsub_timeout = Duration::from_millis(500);
    })
    .await;
    let ready = async || server.management().get("/readyz").send().await;
    let answer = ready().await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.json(), json!({"status": "error", "database": "ok", "storage": "ok", "pubsub": "error"}));
    server.account().await;

    valkey.restart().await;
    eventually("the node to be ready", async || ready().await.status == 200).await;

    valkey.freeze();
    let frozen = within("an answer", ready()).await;
    assert_eq!(frozen.json()["pubsub"], "error");
    valkey.thaw();
    eventually("the node to be ready again", async || ready().await.status == 200).await;
    within("the stop", server.stop()).await;
}

#[tokio::test]
async fn an_outage_is_told_once_and_its_end_too_and_waiting_for_it_costs_nothing() {
    let valkey = Valkey::start_with(&["--requirepass", "hunter2"]).await;
    let proxy = Proxy::start(valkey.address()).await;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("--pubsub-url=redis://:hunter2@{}", proxy.address());
    proxy.refuse(true);
    let server = Binary::start(folder.path(), &[&url]).await;
    eventually("a second attempt", async || proxy.accepted() >= 2).await;
    let (used, start) = (server.cpu_time(), Instant::now());
    eventually("a third attempt", async || proxy.accepted() >= 3).await;
    let share = (server.cpu_time() - used).as_secs_f64() / start.elapsed().as_secs_f64();
    assert!(share < 0.05, "{share} of a processor");
    proxy.refuse(false);
    eventually("the end of the outage", async || server.output().contains("connected to Valkey")).await;
    proxy.cut();
    let times = |sentence: &str| server.output().matches(sentence).count();
    eventually("the next outage", async || times("there is no connection to Valkey") == 2).await;
    eventually("its end", async || times("connected to Valkey") == 2).await;
    assert_eq!(times("there is no connection to Valkey"), 2);
    assert_eq!(times("hunter2"), 0, "{}", server.output());
}

#[tokio::test]
async fn a_url_that_is_no_address_of_a_valkey_ends_the_start_and_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let finished = Binary::run(
        &["--data-dir", folder.path().to_str().unwrap(), "--pubsub-url=redis://:hunter2@host:port", "--server-port=0"],
        &[],
    )
    .await;
    assert!(!finished.status.success());
    assert!(finished.output.contains("--pubsub-url: this is not the address of a Valkey"), "{}", finished.output);
    assert!(!finished.output.contains("hunter2"), "{}", finished.output);
}
