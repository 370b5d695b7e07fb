//! Another session of the database holds rows of one account: an operator's `SELECT … FOR UPDATE`, or a frozen node. That
//! delays this account, and no other.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use uuid::Uuid;

use crate::harness::{Device, Event, TestServer, eventually, send_request};
use crate::metrics::page::Page;

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
