//! Health of the real program: while it starts, while parts are away, and while it leaves. It needs the services in every
//! run: start the tests by `scripts/services`.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::harness::{
    Binary, Device, Event, Fate, Finished, Postgres, S3, S3Proxy, TestServer, Valkey, deployment, eventually, within,
};

const SECOND: Duration = Duration::from_secs(1);

/// A node on this database, with attachments in this folder and no wire to others.
fn node_options(database: &str, folder: &Path) -> Vec<String> {
    vec![
        format!("--db-url={database}"),
        "--pubsub-url=local:".to_owned(),
        format!("--storage-endpoint=file:{}", folder.display()),
        format!("--jwt-secret={}", deployment::SECRET),
    ]
}

fn with(mut options: Vec<String>, more: &[&str]) -> Vec<String> {
    let flag = |option: &str| option.split('=').next().unwrap_or_default().to_owned();
    options.retain(|option| more.iter().all(|other| flag(option) != flag(other)));
    options.extend(more.iter().map(|option| (*option).to_owned()));
    options
}

/// Code and body of the readiness.
async fn ready(node: &Binary) -> (u16, Value) {
    let answer = within("an answer", node.management().get("/readyz").send()).await;
    (answer.status, answer.json())
}

async fn healthcheck(node: &Binary) -> Finished {
    let port = format!("--mgmt-port={}", node.management().address().port());
    Binary::run(&["healthcheck", &port], &[]).await
}

// ---- the start ----

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_waits_for_its_database_is_alive_and_starting_and_refuses_connections() {
    let mut postgres = Postgres::start().await;
    postgres.stop().await;
    let folder = tempfile::tempdir().unwrap();
    let mut node = Binary::begin_node(&node_options(&postgres.url(), folder.path())).await;
    eventually("the wait to be told", async || node.output().contains("waiting for the database")).await;
    let live = node.management().get("/livez").send().await.expect(200);
    assert!(live.body.is_empty());
    let starting = json!({"status": "starting", "database": "starting", "storage": "starting", "pubsub": "starting"});
    assert_eq!(ready(&node).await, (503, starting));
    let refused = TcpStream::connect(node.address()).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "whoever connects must not hang");
    let finished = healthcheck(&node).await;
    assert!(!finished.status.success() && finished.output.contains("it is starting"), "{}", finished.output);

    postgres.start_again().await;
    node.started().await;
    let ok = json!({"status": "ok", "database": "ok", "storage": "ok", "pubsub": "ok"});
    assert_eq!(ready(&node).await, (200, ok));
    assert!(healthcheck(&node).await.status.success());
    Device::register(&node.client()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_waits_for_its_storage_says_that_the_database_is_open() {
    let (folder, bucket) = (tempfile::tempdir().unwrap(), S3::shared().await.bucket().await);
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    proxy.rule(|_, _| Fate::Answer(503));
    let options = [deployment::embedded_options(folder.path()), bucket.at(&proxy.endpoint).options()].concat();
    let mut node = Binary::begin_node(&options).await;
    eventually("the wait to be told", async || node.output().contains("storage is waited for")).await;
    let starting = json!({"status": "starting", "database": "ok", "storage": "starting", "pubsub": "starting"});
    assert_eq!(ready(&node).await, (503, starting));
    proxy.rule(|_, _| Fate::Pass);
    node.started().await;
    assert_eq!(ready(&node).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_waits_ends_at_once_when_it_is_told_to() {
    let mut postgres = Postgres::start().await;
    postgres.stop().await;
    let folder = tempfile::tempdir().unwrap();
    let options = with(node_options(&postgres.url(), folder.path()), &["--shutdown-drain-delay-secs=3600"]);
    let mut node = Binary::begin_node(&options).await;
    eventually("the wait to be told", async || node.output().contains("waiting for the database")).await;
    node.terminate();
    assert_eq!(node.exit(SECOND * 3).await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_may_do_without_its_storage_starts_without_it_and_uses_it_once_it_is_there() {
    let (folder, bucket) = (tempfile::tempdir().unwrap(), S3::shared().await.missing_bucket());
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    proxy.rule(|_, _| Fate::Answer(503));
    let more = ["--health-optional=storage", "--storage-timeout-ms=300", "--storage-create-bucket"];
    let options = with(bucket.at(&proxy.endpoint).options(), &more);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let node = within("the start", Binary::start_embedded(folder.path(), &options)).await;
    let degraded = json!({"status": "degraded", "database": "ok", "storage": "error", "pubsub": "ok"});
    assert_eq!(ready(&node).await, (200, degraded));
    let alice = Device::register(&node.client()).await;
    let upload = async || alice.request("POST", "/v1/attachments").body(vec![7; 100]).send().await;

    proxy.rule(|_, _| Fate::Pass);
    eventually("the bucket to be made", async || ready(&node).await.1["status"] == "ok").await;
    upload().await.expect(201);
}

// ---- parts that are away ----

#[tokio::test(flavor = "multi_thread")]
async fn optional_parts_degrade_a_node_and_the_database_is_never_one() {
    let (mut postgres, mut valkey) = (Postgres::start().await, Valkey::start().await);
    let folder = tempfile::tempdir().unwrap();
    let (attachments, away) = (folder.path().join("attachments"), folder.path().join("away"));
    let wire = format!("--pubsub-url={}", valkey.url());
    let options = with(node_options(&postgres.url(), &attachments), &[&wire, "--pubsub-max-backoff-secs=1"]);
    let strict = Binary::start_node(&options).await;
    let lenient = Binary::start_node(&with(options, &["--health-optional=pubsub,storage"])).await;
    let say = async |code: u16, word: &str, parts: [&str; 3], node: &Binary| {
        let [database, storage, pubsub] = parts;
        let expected = json!({"status": word, "database": database, "storage": storage, "pubsub": pubsub});
        eventually("the outage to be noticed", async || ready(node).await == (code, expected.clone())).await;
    };
    say(200, "ok", ["ok", "ok", "ok"], &lenient).await;
    let (alice, bob) = (Device::register(&lenient.client()).await, Device::register(&lenient.client()).await);
    valkey.kill();
    say(503, "error", ["ok", "ok", "error"], &strict).await;
    say(200, "degraded", ["ok", "ok", "error"], &lenient).await;
    std::fs::rename(&attachments, &away).unwrap();
    std::fs::write(&attachments, "no folder").unwrap();
    say(503, "error", ["ok", "error", "error"], &strict).await;
    say(200, "degraded", ["ok", "error", "error"], &lenient).await;
    let finished = healthcheck(&lenient).await;
    assert!(finished.status.success() && finished.output.contains("pubsub, storage"), "{}", finished.output);
    alice.send_to(&bob, "all the same").await;
    bob.connect().await.expect_message("all the same").await;

    valkey.restart().await;
    postgres.stop().await;
    say(503, "error", ["error", "error", "ok"], &lenient).await;
    postgres.start_again().await;
    std::fs::remove_file(&attachments).unwrap();
    std::fs::rename(&away, &attachments).unwrap();
    say(200, "ok", ["ok", "ok", "ok"], &strict).await;
    say(200, "ok", ["ok", "ok", "ok"], &lenient).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_part_is_asked_within_a_limit_of_its_own_that_holds_up_no_other() {
    let (postgres, valkey) = (Postgres::start().await, Valkey::start().await);
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let mut options = node_options(&postgres.url(), Path::new(""));
    options.retain(|option| !option.starts_with("--storage"));
    options.extend(bucket.at(&proxy.endpoint).options());
    let options = with(options, &[&format!("--pubsub-url={}", valkey.url())]);
    let limits = ["db-timeout-ms", "storage-timeout-ms", "pubsub-timeout-ms"];
    for (part, word) in ["database", "storage", "pubsub"].into_iter().enumerate() {
        // The part that is frozen has a short limit, the others have one that nobody would wait for.
        let given = limits.iter().enumerate().map(|(other, limit)| {
            let milliseconds = if other == part { 700 } else { 60_000 };
            format!("--{limit}={milliseconds}")
        });
        let node = Binary::start_node(&options.iter().cloned().chain(given).collect::<Vec<_>>()).await;
        assert_eq!(ready(&node).await.0, 200);
        match word {
            "database" => postgres.freeze(),
            "storage" => proxy.rule(|_, _| Fate::Stall),
            _ => valkey.freeze(),
        }
        let asked = Instant::now();
        let (code, body) = ready(&node).await;
        let took = asked.elapsed();
        match word {
            "database" => postgres.thaw(),
            "storage" => proxy.rule(|_, _| Fate::Pass),
            _ => valkey.thaw(),
        }
        let mut expected = json!({"status": "error", "database": "ok", "storage": "ok", "pubsub": "ok"});
        expected[word] = "error".into();
        assert_eq!((code, body), (503, expected));
        assert!(took >= Duration::from_millis(700) && took < SECOND * 5, "{word}: {took:?}");
    }
}

/// Somebody else is in the middle of a write for longer than the limit.
#[tokio::test]
async fn a_database_that_is_busy_for_too_long_is_not_ready_in_embedded_mode_either() {
    let server = TestServer::start_embedded_with(|config| {
        config.health.database_timeout = Duration::from_millis(300);
    })
    .await;
    let database = server.database().await;
    let held = database.hold_write().await;
    let (asked, client) = (Instant::now(), server.management());
    let answer = client.get("/readyz").send().await.expect(503).json();
    assert_eq!(answer, json!({"status": "error", "database": "error", "storage": "ok", "pubsub": "ok"}));
    assert!(asked.elapsed() < SECOND * 3, "{:?}", asked.elapsed());
    held.release().await;
    eventually("the database to be free", async || client.get("/readyz").send().await.status == 200).await;
}

// ---- the end ----

#[tokio::test(flavor = "multi_thread")]
async fn readiness_goes_down_before_anything_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--shutdown-drain-delay-secs=3", "--shutdown-timeout-secs=3"];
    let mut server = Binary::start(folder.path(), &options).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let mut socket = bob.connect().await;
    let told = Instant::now();
    server.terminate();
    eventually("readiness to go down", async || ready(&server).await.0 == 503).await;
    let noticed = told.elapsed();
    assert!(noticed < SECOND, "{noticed:?}");
    let leaving = json!({"status": "error", "database": "ok", "storage": "ok", "pubsub": "ok"});
    assert_eq!(ready(&server).await.1, leaving);
    server.management().get("/livez").send().await.expect(200);
    let finished = healthcheck(&server).await;
    assert!(!finished.status.success() && finished.output.contains("it is stopping"), "{}", finished.output);
    // Whoever is still sent here is served: on connections that are open and on new ones.
    alice.at(&server.client()).send_to(&bob, "late").await;
    socket.expect_message("late").await;
    let mut second = bob.connect().await;
    second.until_pong().await;

    assert_eq!(socket.until_end().await, [Event::Close(Some((1001, "Server shutting down".to_owned()))), Event::End]);
    let delayed = told.elapsed();
    assert!(delayed >= SECOND * 3, "sockets were told after {delayed:?}");
    assert_eq!(server.exit(SECOND * 4).await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_delay_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &["--shutdown-drain-delay-secs=3600"]).await;
    server.terminate();
    eventually("readiness to go down", async || ready(&server).await.0 == 503).await;
    server.terminate();
    server.exit(SECOND * 3).await;
}
