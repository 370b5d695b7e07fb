//! The span of a request: what it says, whose trace it is a part of, and who decides whether it is kept.

use std::time::Duration;

use obscura_server::config::Config;
use uuid::Uuid;

use super::attach;
use crate::harness::{Collector, Device, Seen, TestServer};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn server(collector: &Collector, change: impl FnOnce(&mut Config)) -> TestServer {
    TestServer::start_with(|config| {
        attach(config, collector);
        change(config);
    })
    .await
}

/// Asks for its devices within a trace, and answers whether the server has kept that.
async fn asks_within(device: &Device, collector: &Collector, headers: &[(&str, &str)]) -> Option<Seen> {
    let before = collector.named("GET /v1/devices").len();
    let mut request = device.request("GET", "/v1/devices");
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let answer = request.send().await.expect(200);
    for header in ["traceparent", "tracestate", "traceresponse"] {
        assert_eq!(answer.header(header), None, "clients are told nothing of traces");
    }
    // Whatever is asked for later comes later.
    let marks = collector.named("GET /v1/keys").len();
    device.request("GET", "/v1/keys").send().await.expect(200);
    collector.await_spans("GET /v1/keys", marks + 1).await;
    collector.named("GET /v1/devices").get(before).cloned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_told_by_its_route_and_status_and_by_nothing_of_the_client() {
    let collector = Collector::start().await;
    let server = server(&collector, |_| {}).await;
    let alice = server.account().await;
    let id = Uuid::new_v4();
    alice
        .request("GET", &format!("/v1/keys/{id}?a-query=of-mine"))
        .header("user-agent", "mine")
        .send()
        .await
        .expect(404);
    let seen = collector.await_spans("GET /v1/keys/{userId}", 1).await.remove(0);
    let expected =
        [("http.request.method", "GET"), ("http.route", "/v1/keys/{userId}"), ("http.response.status_code", "404")];
    assert_eq!(seen.keys(), expected.map(|(key, _)| key));
    for (key, value) in expected {
        assert_eq!(seen.get(key).as_deref(), Some(value));
    }
    assert_eq!(seen.span.kind, 2, "a server's");
    assert!(seen.span.status.is_none_or(|status| status.code != 2), "a client's mistake is no failure of ours");

    server.client().request("BREW", &format!("/v1/nowhere/{id}")).send().await.expect(404);
    let seen = collector.await_spans("HTTP", 1).await.remove(0);
    assert_eq!(seen.get("http.request.method").as_deref(), Some("_OTHER"));
    assert_eq!(seen.get("http.route"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_part_of_the_trace_that_its_client_names() {
    let collector = Collector::start().await;
    let server = server(&collector, |config| config.server.trusted_proxies = Vec::new()).await;
    let alice = server.account().await;
    for flags in ["01", "00"] {
        // Whether a stranger wants it kept makes no difference, and what else it says is not taken.
        let headers =
            [("traceparent", &*format!("00-{TRACE}-{SPAN}-{flags}")), ("tracestate", "vendor=said-by-a-client")];
        let seen = asks_within(&alice, &collector, &headers).await.expect("a span");
        assert_eq!((hex(&seen.span.trace_id), hex(&seen.span.parent_span_id)), (TRACE.into(), SPAN.into()));
        assert_eq!(seen.span.trace_state, "");
    }
    for malformed in
        ["", "nonsense", &format!("00-{TRACE}-{SPAN}"), &format!("ff-{TRACE}-{SPAN}-01"), &"0".repeat(9000)]
    {
        let seen = asks_within(&alice, &collector, &[("traceparent", malformed)]).await.expect("a span");
        assert!(seen.span.parent_span_id.is_empty() && hex(&seen.span.trace_id) != TRACE);
    }
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let twice = [("traceparent", &*parent), ("traceparent", &*parent)];
    let seen = asks_within(&alice, &collector, &twice).await.expect("a span");
    assert!(seen.span.parent_span_id.is_empty(), "two parents are none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_brings_its_state_and_may_leave_traces_out() {
    let collector = Collector::start().await;
    let server =
        server(&collector, |config| config.server.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()]).await;
    let alice = server.account().await;
    let (kept, left_out) = (format!("00-{TRACE}-{SPAN}-01"), format!("00-{TRACE}-{SPAN}-00"));
    let states = [("traceparent", &*kept), ("tracestate", "one=1"), ("tracestate", "two=2")];
    let seen = asks_within(&alice, &collector, &states).await.expect("a span");
    assert_eq!((hex(&seen.span.trace_id), &*seen.span.trace_state), (TRACE.into(), "one=1,two=2"));
    let long = "x=".to_owned() + &"1".repeat(600);
    let seen = asks_within(&alice, &collector, &[("traceparent", &kept), ("tracestate", &long)]).await.expect("a span");
    assert_eq!((hex(&seen.span.trace_id), &*seen.span.trace_state), (TRACE.into(), ""));
    assert!(asks_within(&alice, &collector, &[("traceparent", &left_out)]).await.is_none());
}

/// Without trusting anybody and with everybody trusted: the ratio is the most that is ever kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_have_more_traces_recorded_than_the_ratio_says() {
    for trusted in [vec![], vec!["127.0.0.0/8".parse().unwrap()]] {
        let collector = Collector::start().await;
        let server = server(&collector, |config| {
            config.telemetry.trace_sampling_ratio = 0.2;
            config.server.trusted_proxies = trusted;
        })
        .await;
        let alice = server.account().await;
        for _ in 0..300 {
            let parent = format!("00-{TRACE}-{SPAN}-01");
            alice.request("GET", "/v1/devices").header("traceparent", parent).send().await.expect(200);
        }
        collector.await_spans("GET /v1/devices", 1).await;
        tokio::time::sleep(Duration::from_millis(1500)).await; // that no more come can't be awaited
        let kept = collector.named("GET /v1/devices").len();
        assert!((20..120).contains(&kept), "{kept} of 300 were kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_ratio_of_zero_no_trace_is_kept() {
    let collector = Collector::start().await;
    let server = server(&collector, |config| {
        config.telemetry.trace_sampling_ratio = 0.0;
        config.telemetry.metrics_export_interval = Duration::from_secs(1);
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    alice.send_to(&bob, "hello").await;
    let envelope = socket.expect_message("hello").await;
    socket.ack(&[envelope]).await;
    let exports = collector.metric_exports();
    crate::harness::eventually("metrics go on", async || collector.metric_exports() >= exports + 2).await;
    assert!(collector.spans().is_empty(), "{:?}", collector.spans());
}
