//! Another session of the database holds rows of one account: an operator's `SELECT … FOR UPDATE`, or a frozen node. That
//! delays this account, and no other.

use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt, join_all};
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Database, Device, Event, Response, TestServer, eventually, send_request, within};
use crate::metrics::page::Page;

/// Requests of the held account at one time: twice as many as the pool has connections.
const OWN: usize = 40;
/// How long the others go on meanwhile. A lock is waited for up to 5 s, a connection of the pool up to 3 s.
const MEANWHILE: Duration = Duration::from_secs(4);

/// A node with the limits of time that servers have, which are longer in other tests.
async fn node() -> TestServer {
    TestServer::start_node_with(|config| {
        config.database.acquire_timeout = Duration::from_secs(3);
        config.database.lock_timeout = Duration::from_secs(5);
        config.database.statement_timeout = Duration::from_secs(10);
        config.database.max_connections = 20;
    })
    .await
}

async fn until_one_waits(database: &Database) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually("something to wait for the row", async || database.number(waiting).await > 0).await;
}

/// Devices of other accounts send, upload and ask for tickets, again and again, and every request succeeds. Returns the
/// duration of the slowest one.
async fn others(pairs: &[(Device, Device)]) -> Duration {
    let begin = Instant::now();
    let go_on = async |(from, to): &(Device, Device)| {
        let mut slowest = Duration::ZERO;
        while begin.elapsed() < MEANWHILE {
            let since = Instant::now();
            from.post_messages(Uuid::new_v4(), &send_request(&[(to, b"y")])).await.expect(200);
            let sent = Instant::now();
            from.request("POST", "/v1/attachments").body("y").send().await.expect(201);
            let uploaded = Instant::now();
            to.ticket().await;
            slowest = slowest.max(sent - since).max(uploaded - sent).max(uploaded.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        slowest
    };
    join_all(pairs.iter().map(go_on)).await.into_iter().max().expect("there are some")
}

async fn pairs(node: &TestServer) -> Vec<(Device, Device)> {
    let mut pairs = Vec::new();
    for _ in 0..4 {
        pairs.push((node.account().await, node.account().await));
    }
    pairs
}

/// While these rows of bob are held, many requests have to do with him: the n-th one is made of alice and bob.
async fn many_requests_delay_nobody_else(
    rows: &str,
    request: impl Fn(usize, Device, Device) -> BoxFuture<'static, Response>,
) {
    let node = node().await;
    let (pairs, alice, bob) = (pairs(&node).await, node.account().await, node.account().await);
    let database = node.database().await;
    let held = database.hold(&rows.replace("BOB", &bob.user.to_string())).await;
    let own = (0..OWN).map(|n| tokio::spawn(request(n, alice.clone(), bob.clone()))).collect::<Vec<_>>();
    until_one_waits(&database).await;
    let slowest = others(&pairs).await;
    held.release().await;
    for answer in within("the held account's requests to end", join_all(own)).await {
        let answer = answer.expect("it doesn't panic");
        assert!(answer.status < 300 || answer.status == 503, "{}", answer.status);
        if answer.status == 503 {
            assert_eq!(answer.header("retry-after"), Some("2"));
        }
    }
    request(0, alice, bob).await.expect(201);
    assert!(slowest < Duration::from_secs(3), "another account waited for {slowest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_wait_for_a_held_account_delay_no_other() {
    many_requests_delay_nobody_else("SELECT 1 FROM account_locks WHERE user_id = 'BOB' FOR UPDATE", |_, _, bob| {
        async move { bob.request("POST", "/v1/attachments").body("x").send().await }.boxed()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_wait_for_a_held_user_device_or_key_delay_no_other() {
    let rows = "SELECT 1 FROM users u JOIN devices d ON d.user_id = u.id JOIN device_keys k ON k.device_no = d.no
                WHERE u.id = 'BOB' FOR UPDATE";
    many_requests_delay_nobody_else(rows, |n, alice, bob| {
        let request = match n % 3 {
            0 => bob.request("POST", "/v1/gateway/ticket"),
            1 => bob.request("PUT", "/v1/push-token").json(&json!({"token": "a token"})),
            _ => alice.request("GET", &format!("/v1/keys/{}", bob.user)),
        };
        async move { request.send().await }.boxed()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_message_delays_only_the_acks_of_its_device() {
    let node = node().await;
    let (pairs, alice, bob) = (pairs(&node).await, node.account().await, node.account().await);
    alice.send_to(&bob, "held").await;
    alice.send_to(&bob, "free").await;
    let mut socket = bob.connect().await;
    let mail = socket.messages(2).await;
    let database = node.database().await;
    let messages = format!("messages m JOIN devices d ON d.no = m.device_no WHERE d.id = '{}'", bob.id);
    let held = database.hold(&format!("SELECT 1 FROM {messages} AND m.body = 'held'::bytea FOR UPDATE OF m")).await;
    let before = Page::of(&node).await;
    socket.ack(&mail).await;
    let slowest = others(&pairs).await;
    let still = format!("SELECT count(*) FROM {messages} AND m.body =");
    assert_eq!(database.number(&format!("{still} 'free'::bytea")).await, 0, "its ack didn't wait for the other one");
    assert_eq!(database.number(&format!("{still} 'held'::bytea")).await, 1);
    // A pause of half a second lies between two tries.
    let acks = |page: &Page| page.sum("obscura_store_group_size_sum", &[("content", "acks")]);
    let tried = acks(&Page::of(&node).await) - acks(&before);
    assert!((4.0..40.0).contains(&tried), "{tried}");
    // New mail comes by the same socket, and nothing a second time.
    alice.send_to(&bob, "meanwhile").await;
    let envelope = socket.expect_message("meanwhile").await;
    held.release().await;
    socket.ack(&[envelope]).await;
    eventually("all acks to be written", async || database.queued(&bob).await == 0).await;
    let events = socket.until_pong().await;
    assert!(!events.iter().any(|event| matches!(event, Event::Mail(_))), "{events:?}");
    assert!(slowest < Duration::from_secs(3), "another account waited for {slowest:?}");
}
