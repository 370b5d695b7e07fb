//! The way of one message, as one trace.

use std::time::Duration;

use super::attach;
use crate::harness::{Collector, Device, Seen, Socket, TestServer, eventually};

/// The one span of this name. Fails if there are none or several.
fn part<'a>(spans: &'a [Seen], name: &str) -> &'a Seen {
    let found: Vec<_> = spans.iter().filter(|seen| seen.span.name == name).collect();
    assert_eq!(found.len(), 1, "{name} among {:?}", spans.iter().map(|seen| &seen.span.name).collect::<Vec<_>>());
    found[0]
}

/// How long a trace may take to the collector, and how many messages may go by without one.
const TO_THE_COLLECTOR: Duration = Duration::from_secs(2);
const WITHOUT_TRACE: usize = 10;

/// Sends until a delivery belongs to the trace of its send. A look that comes by itself, such as the one when the account's
/// channel is confirmed, may find a message before the word of its trace is there; then another one is sent.
async fn send_traced(collector: &Collector, alice: &Device, bob: &Device, socket: &mut Socket) {
    for n in 0..WITHOUT_TRACE {
        let text = format!("hello {n}");
        alice.send_to(bob, &text).await;
        let envelope = socket.expect_message(&text).await;
        socket.ack(&[envelope]).await;
        if tokio::time::timeout(TO_THE_COLLECTOR, collector.await_spans("gateway.ack", 1)).await.is_ok() {
            return;
        }
    }
    panic!("no delivery belongs to a trace");
}

/// Checks the trace of the one send whose delivery was traced, and answers it and its group.
async fn journey(collector: &Collector) -> (Vec<Seen>, Seen) {
    let last = collector.await_spans("mailroom.ack", 1).await.remove(0);
    let of_trace = |seen: &Seen| seen.span.trace_id == last.span.trace_id;
    let request = || collector.named("POST /v1/messages").into_iter().find(of_trace);
    eventually("the send of what was delivered", async || request().is_some()).await;
    let request = request().unwrap();
    let spans: Vec<_> = collector.spans().into_iter().filter(of_trace).collect();
    let [send, deliver] = ["mailroom.send", "gateway.deliver"].map(|name| part(&spans, name));
    let [ack, stored] = ["gateway.ack", "mailroom.ack"].map(|name| part(&spans, name));
    assert!(send.is_part_of(&request) && deliver.is_part_of(send) && ack.is_part_of(deliver) && stored.is_part_of(ack));
    assert_eq!(deliver.get("obscura.batch.messages").as_deref(), Some("1"));
    assert_eq!(spans.len(), 5);

    let groups = collector.named("store.settle");
    let group = groups.iter().find(|group| group.is_linked_with(send)).expect("a group that holds the send");
    assert!(send.is_linked_with(group), "both ways");
    assert_ne!(group.span.trace_id, request.span.trace_id, "a group belongs to all of its sends");
    assert_eq!(group.get("obscura.group.sends").as_deref(), Some("1"));
    let parts = ["store.begin", "store.write", "store.commit"];
    for name in parts {
        assert!(collector.named(name).iter().any(|seen| seen.is_part_of(group)), "{name} is no part of the group");
    }
    assert!(groups.iter().any(|group| group.is_linked_with(stored)), "the ack was stored by a group as well");
    (spans, group.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_message_over_two_nodes_is_one_trace() {
    let collector = Collector::start().await;
    let a = TestServer::start_node_with(|config| {
        attach(config, &collector);
        config.gateway.resync_interval = Duration::from_hours(24);
        // Or the picture would show nothing but the time in which acks are gathered.
        config.gateway.ack_flush_interval = Duration::from_millis(20);
    })
    .await;
    let b = a.start_beside().await;
    let (alice, bob) = (a.account().await, a.account().await);
    let mut socket = bob.at(&b.client()).connect().await;
    socket.until_pong().await;
    send_traced(&collector, &alice, &bob, &mut socket).await;

    let (spans, group) = journey(&collector).await;
    let here = &part(&spans, "mailroom.send").node;
    let there = &part(&spans, "gateway.deliver").node;
    assert_ne!(here, there);
    assert_eq!((&part(&spans, "POST /v1/messages").node, &group.node), (here, here));
    assert_eq!((&part(&spans, "gateway.ack").node, &part(&spans, "mailroom.ack").node), (there, there));
    let commit = collector.named("store.commit").into_iter().find(|seen| seen.is_part_of(&group)).unwrap();
    let delivery = part(&spans, "gateway.deliver");
    assert!(delivery.span.start_time_unix_nano >= commit.span.end_time_unix_nano, "nobody hears of it before");
    draw(&collector, &spans, &group);
}

/// For the picture in the documents: `scripts/draw-trace` makes it from this.
fn draw(collector: &Collector, spans: &[Seen], group: &Seen) {
    let Ok(file) = std::env::var("OBSCURA_WRITE_TRACE") else { return };
    let parts = collector.spans().into_iter().filter(|seen| seen.is_part_of(group));
    let all: Vec<_> = spans.iter().cloned().chain([group.clone()]).chain(parts).collect();
    let line = |seen: &Seen| {
        let (span, node) = (&seen.span, if seen.node == group.node { "A" } else { "B" });
        format!("{}\t{node}\t{}\t{}\n", span.name, span.start_time_unix_nano, span.end_time_unix_nano)
    };
    std::fs::write(file, all.iter().map(line).collect::<String>()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_message_on_one_node_is_one_trace() {
    let collector = Collector::start().await;
    let server = TestServer::start_with(|config| attach(config, &collector)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    send_traced(&collector, &alice, &bob, &mut socket).await;
    let (spans, _) = journey(&collector).await;
    assert!(spans.iter().all(|seen| seen.node == spans[0].node));
}

/// A crowd of sends on its way to one socket.
#[tokio::test(flavor = "multi_thread")]
async fn many_messages_at_once_make_no_more_than_a_few_deliveries_and_each_is_a_part_of_a_send() {
    let collector = Collector::start().await;
    let server = TestServer::start_with(|config| attach(config, &collector)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    socket.until_pong().await;
    let sends = (0..100).map(|number: u32| alice.send_owned(vec![(bob.clone(), number.to_string().into())]));
    futures_util::future::join_all(sends).await;
    let envelopes = socket.messages(100).await;
    socket.ack(&envelopes).await;
    let sends = collector.await_spans("mailroom.send", 100).await;
    let deliveries = collector.await_spans("gateway.deliver", 1).await;
    assert!(deliveries.len() <= 100);
    assert!(deliveries.iter().all(|delivery| sends.iter().any(|send| delivery.is_part_of(send))));
    for group in collector.named("store.settle") {
        assert!(group.span.links.len() <= 32, "a group links to {} sends", group.span.links.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attachments_sweeps_and_pushes_are_traced() {
    let collector = Collector::start().await;
    let server = TestServer::start_with(|config| {
        attach(config, &collector);
        config.notifications.push_delay = Duration::ZERO;
        config.notifications.worker_interval = Duration::from_millis(100);
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload = alice.request("POST", "/v1/attachments").body("sealed bytes").send().await.expect(201).json();
    let id = upload["id"].as_str().unwrap();
    bob.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200);
    let token = serde_json::json!({"token": "a-token-of-a-phone"});
    bob.request("PUT", "/v1/push-token").json(&token).send().await.expect(204);
    alice.send_to(&bob, "wake up").await;

    let push = collector.await_spans("push.send", 1).await.remove(0);
    assert_eq!(push.get("obscura.push.provider").as_deref(), Some("fcm"));
    assert_eq!(push.get("obscura.push.outcome").as_deref(), Some("accepted"));
    assert!(push.span.parent_span_id.is_empty(), "who is woken is not told together with who sent");
    let upload = collector.await_spans("POST /v1/attachments", 1).await.remove(0);
    let download = collector.await_spans("GET /v1/attachments/{id}", 1).await.remove(0);
    for (name, whole) in [("blobs.stage", &upload), ("blobs.publish", &upload), ("blobs.read", &download)] {
        assert!(collector.await_spans(name, 1).await[0].is_part_of(whole), "{name}");
    }
    collector.await_spans("sweep.expired_messages", 1).await;
}
