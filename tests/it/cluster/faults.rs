//! Parts of a deployment go away under load, and come back. Whatever was answered with 200 is delivered on the sockets
//! that were open all the time, nothing twice; what can't be taken meanwhile gets a 503.

use std::time::Duration;

use crate::cluster::traffic::Traffic;
use crate::harness::{
    Binary, Device, Fate, Postgres, Proxy, S3, S3Proxy, Socket, TestServer, Valkey, Way, deployment, eventually,
    within_time,
};

/// Two nodes on parts of their own.
struct Deployment {
    postgres: Postgres,
    valkey: Valkey,
    nodes: [Binary; 2],
    _attachments: tempfile::TempDir,
}

impl Deployment {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With these further options of both nodes.
    async fn start_with(more: &[&str]) -> Self {
        let valkey = Valkey::start().await;
        let url = valkey.url();
        Self::start_on(valkey, &url, more).await
    }

    /// The second node finds Valkey at another address.
    async fn start_on(valkey: Valkey, second_url: &str, more: &[&str]) -> Self {
        let postgres = Postgres::start().await;
        let attachments = tempfile::tempdir().unwrap();
        let options = |valkey: &str| {
            let mut options = vec![
                format!("--db-url={}", postgres.url()),
                format!("--pubsub-url={valkey}"),
                "--pubsub-max-backoff-secs=2".to_owned(),
                format!("--storage-endpoint=file:{}", attachments.path().display()),
                format!("--jwt-secret={}", deployment::SECRET),
                // No look of a session at its inbox comes to the aid of a lost signal.
                "--ws-look-interval-secs=86400".to_owned(),
            ];
            options.extend(more.iter().map(|option| (*option).to_owned()));
            options
        };
        let first = Binary::start_node(&options(&valkey.url())).await;
        let second = Binary::start_node(&options(second_url)).await;
        Self { postgres, valkey, nodes: [first, second], _attachments: attachments }
    }

    /// Messages from both nodes to receivers at both nodes.
    async fn traffic(&self) -> Traffic {
        let clients = [self.nodes[0].client(), self.nodes[1].client()];
        Traffic::start(&clients, &clients).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_that_is_restarted_or_killed_loses_nothing_that_was_answered() {
    let mut deployment = Deployment::start().await;
    let traffic = deployment.traffic().await;
    for _ in 0..2 {
        deployment.postgres.stop().await;
        deployment.postgres.start_again().await;
        traffic.goes_on(100).await;
    }
    deployment.postgres.kill().await;
    deployment.postgres.start_again().await;
    traffic.goes_on(100).await;
    assert!(traffic.finish().await.answered > 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgresql_is_away_sends_are_refused_and_afterwards_they_go_on() {
    let mut deployment = Deployment::start().await;
    let traffic = deployment.traffic().await;
    deployment.postgres.stop().await;
    // Traffic goes on against a database that isn't there.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(traffic.refused() > 0, "nobody was told");
    deployment.postgres.start_again().await;
    traffic.goes_on(100).await;
    assert!(traffic.finish().await.refused > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgresql_is_frozen_sends_are_refused_in_time_and_afterwards_they_go_on() {
    let deployment = Deployment::start_with(&["--db-statement-timeout-ms=2000"]).await;
    let traffic = deployment.traffic().await;
    deployment.postgres.freeze();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(traffic.refused() > 0, "nobody was told");
    deployment.postgres.thaw();
    traffic.goes_on(100).await;
    assert!(traffic.finish().await.refused > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_is_killed_and_comes_back_empty_refuses_and_loses_nothing() {
    let mut deployment = Deployment::start().await;
    let traffic = deployment.traffic().await;
    deployment.valkey.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    deployment.valkey.restart().await;
    traffic.goes_on(100).await;
    assert_eq!(traffic.finish().await.refused, 0, "nobody needs Valkey to send");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valkey_that_is_frozen_for_five_seconds_refuses_and_loses_nothing() {
    let deployment = Deployment::start().await;
    let traffic = deployment.traffic().await;
    deployment.valkey.freeze();
    tokio::time::sleep(Duration::from_secs(5)).await;
    deployment.valkey.thaw();
    traffic.goes_on(100).await;
    assert_eq!(traffic.finish().await.refused, 0, "nobody needs Valkey to send");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_broker_connection_is_cut_or_swallowed_refuses_and_loses_nothing() {
    let valkey = Valkey::start().await;
    let proxy = Proxy::start(valkey.address()).await;
    let url = format!("redis://{}", proxy.address());
    let deployment = Deployment::start_on(valkey, &url, &[]).await;
    let traffic = deployment.traffic().await;
    for _ in 0..3 {
        proxy.cut();
        traffic.goes_on(50).await;
    }
    for way in [Way::Up, Way::Down] {
        proxy.freeze(way);
        tokio::time::sleep(Duration::from_secs(1)).await;
        traffic.goes_on(50).await;
    }
    proxy.refuse(true);
    proxy.cut();
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.refuse(false);
    traffic.goes_on(50).await;
    assert_eq!(traffic.finish().await.refused, 0, "nobody needs Valkey to send");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_refuses_writes_and_then_deletions_disturbs_no_messages_and_is_tidied_up_later() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let behind = bucket.at(&proxy.endpoint);
    let node = TestServer::start_node_with(|config| {
        behind.configure(&mut config.attachments);
        config.attachments.cleanup_interval = Duration::from_secs(1);
    })
    .await;
    let other = node.start_beside().await;
    let traffic = Traffic::start(&[node.client()], &[other.client()]).await;
    let alice = node.account().await;
    let upload = |size: usize| alice.request("POST", "/v1/attachments").body(vec![7; size]).send();
    upload(1000).await.expect(201);

    proxy.rule(|method, _| if method == "GET" { Fate::Pass } else { Fate::Answer(503) });
    for size in [1000, 6_000_000] {
        assert!(upload(size).await.expect(503).header("retry-after").is_some());
    }
    traffic.goes_on(50).await;
    proxy.rule(|_, _| Fate::Pass);
    upload(6_000_000).await.expect(201);
    traffic.goes_on(50).await;
    assert_eq!(traffic.finish().await.refused, 0, "messages need no bucket");

    let is_deletion = |method: &str, target: &str| method == "DELETE" || target.contains("delete");
    proxy.rule(move |method, target| if is_deletion(method, target) { Fate::Answer(503) } else { Fate::Pass });
    node.clock.advance(Duration::from_hours(31 * 24));
    let asked =
        || proxy.seen().iter().filter(|request| request.contains("delete") || request.starts_with("DELETE")).count();
    eventually("a deletion to be tried", async || asked() > 0).await;
    let (before, watched) = (asked(), 3);
    tokio::time::sleep(Duration::from_secs(watched)).await;
    let tried = asked() - before;
    assert!(tried <= 20 * watched as usize, "{tried} deletions in {watched} s are a loop");
    proxy.rule(|_, _| Fate::Pass);
    let database = node.database().await;
    let is_gone = async || bucket.is_empty().await && database.number("SELECT count(*) FROM attachments").await == 0;
    eventually("everything to be gone", is_gone).await;
}

/// How long news of another node may take while Valkey is away. Sessions look at their inbox once in 10 to 14 s.
const WITHOUT_VALKEY: Duration = Duration::from_secs(16);

/// A device with a socket at the second node of a deployment whose Valkey is gone. The nodes know that.
async fn connected_without_valkey() -> (Deployment, Device, Socket) {
    let mut deployment = Deployment::start().await;
    let [first, second] = &deployment.nodes;
    let bob = Device::register(&first.client()).await;
    let mut socket = bob.at(&second.client()).connect().await;
    socket.until_pong().await;
    deployment.valkey.kill();
    for node in &deployment.nodes {
        let management = node.management();
        let is_known = async || management.get("/readyz").send().await.status == 503;
        eventually("the outage to be noticed", is_known).await;
    }
    (deployment, bob, socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn while_valkey_is_away_a_log_out_closes_the_socket_at_another_node_within_sixteen_seconds() {
    let (_deployment, bob, mut socket) = connected_without_valkey().await;
    bob.log_out().await;
    within_time(WITHOUT_VALKEY, "the socket to be closed", socket.until_end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_valkey_is_away_mail_reaches_another_node_within_sixteen_seconds() {
    let (deployment, bob, mut socket) = connected_without_valkey().await;
    let alice = Device::register(&deployment.nodes[0].client()).await;
    // The second one comes when the session has just looked.
    for text in ["first", "second"] {
        alice.send_to(&bob, text).await;
        within_time(WITHOUT_VALKEY, "the message", socket.expect_message(text)).await;
    }
}

/// Sockets are open and nobody says anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_nothing_to_do_is_quiet_while_its_parts_are_away() {
    let mut deployment = Deployment::start().await;
    let node = &deployment.nodes[0];
    let mut sockets = Vec::new();
    for _ in 0..10 {
        let mut socket = Device::register(&node.client()).await.connect().await;
        socket.until_pong().await;
        sockets.push(socket);
    }
    deployment.valkey.kill();
    deployment.postgres.stop().await;
    let management = node.management();
    let is_known = async || management.get("/readyz").send().await.status == 503;
    eventually("the outage to be noticed", is_known).await;
    let (before, watched) = (node.cpu_time(), Duration::from_secs(6));
    tokio::time::sleep(watched).await;
    let spent = node.cpu_time() - before;
    assert!(spent < watched / 20, "{spent:?} of processor time in {watched:?}");
    deployment.postgres.start_again().await;
    deployment.valkey.restart().await;
    let management = deployment.nodes[0].management();
    let is_well = async || management.get("/readyz").send().await.status == 200;
    eventually("the node to be ready again", is_well).await;
}

/// The database comes up after the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_waits_for_its_database_and_says_so() {
    let mut postgres = Postgres::start().await;
    postgres.stop().await;
    let attachments = tempfile::tempdir().unwrap();
    let options = [
        format!("--db-url={}", postgres.url()),
        "--pubsub-url=local:".to_owned(),
        format!("--storage-endpoint=file:{}", attachments.path().display()),
        format!("--jwt-secret={}", deployment::SECRET),
    ];
    let starting = tokio::spawn(async move { Binary::start_node(&options).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!starting.is_finished(), "it gave up or it started without a database");
    postgres.start_again().await;
    let node = starting.await.unwrap();
    assert!(node.output().contains("waiting for the database"), "{}", node.output());
    assert!(!node.output().contains("only%20for"), "the password was logged");
    Device::register(&node.client()).await;
}
