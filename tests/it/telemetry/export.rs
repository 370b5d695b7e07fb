//! The real program and its collector, each option by its effect.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::logs::v1::LogRecord;
use serde_json::Value;

use crate::harness::{Binary, Collector, Device, PATIENCE, body, eventually, free_port};
use crate::push::provider::acceptor;

const SECOND: Duration = Duration::from_secs(1);

async fn start(folder: &tempfile::TempDir, collector: &Collector, options: &[&str]) -> Binary {
    start_with(folder, collector, options, &[]).await
}

async fn start_with(
    folder: &tempfile::TempDir,
    collector: &Collector,
    options: &[&str],
    variables: &[(&str, &str)],
) -> Binary {
    let endpoint = format!("--otlp-endpoint={}", collector.url());
    Binary::start_with(folder.path(), &[&[&*endpoint], options].concat(), variables).await
}

async fn stop(mut server: Binary) -> String {
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    server.output()
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_metrics_and_logs_arrive_to_the_last_of_them() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let server = start(&folder, &collector, &[]).await;
    let alice = Device::register(&server.client()).await;
    collector.await_spans("POST /v1/users", 1).await;
    alice.request("GET", "/v1/devices").send().await.expect(200);
    stop(server).await;
    assert_eq!(collector.named("GET /v1/devices").len(), 1, "a span that was still waiting at the end");
    assert!(collector.has_line("the server is ready") && collector.has_line("the server has stopped"));
    assert!(collector.metric_names().contains(&"obscura.build.info".to_owned()), "{:?}", collector.metric_names());

    let resources: BTreeSet<_> = collector.resources().into_iter().collect();
    assert_eq!(resources.len(), 1, "all say the same of who sends them: {resources:?}");
    let resource = resources.first().unwrap();
    let keys: Vec<_> = resource.keys().map(String::as_str).collect();
    assert_eq!(keys, ["service.instance.id", "service.name", "service.version"], "nothing of the machine");
    assert_eq!(resource["service.name"], "obscura-server");
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_those_of_standard_error_by_their_levels_and_in_either_format() {
    for (format, level) in [("text", "info"), ("json", "info"), ("json", "warn")] {
        let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
        let option = format!("--log-format={format}");
        // The key of a push provider without credentials makes a warning.
        let options = [&*option, "--fcm-project-id=a-project"];
        let server = start_with(&folder, &collector, &options, &[("RUST_LOG", level)]).await;
        let output = stop(server).await;
        let lines: Vec<_> = output.lines().filter(|line| line.contains("INFO") || line.contains("WARN")).collect();
        assert_eq!(lines.iter().any(|line| line.contains("INFO")), level == "info");
        let mut said: Vec<String> = collector.log_lines().iter().map(body).collect();
        for line in lines {
            let json: Option<Value> = serde_json::from_str(line).ok();
            assert_eq!(json.is_some(), format == "json", "{line}");
            let is_said =
                |text: &String| json.as_ref().map_or(line.contains(text), |json| json["fields"]["message"] == **text);
            let place = said.iter().position(is_said);
            said.remove(place.unwrap_or_else(|| panic!("the collector has not got {line}")));
        }
        assert!(said.is_empty(), "only the collector has got {said:?}");
    }
}

/// Removes the files below a folder that have this name.
fn remove_named(folder: &std::path::Path, name: &str) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            remove_named(&path, name);
        } else if path.file_name().is_some_and(|file| file.to_string_lossy().contains(name)) {
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_line_about_a_request_names_its_trace() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let endpoint = format!("--otlp-endpoint={}", collector.url());
    let server = Binary::start_embedded(folder.path(), &[&endpoint]).await;
    let alice = Device::register(&server.client()).await;
    let upload = alice.request("POST", "/v1/attachments").body("sealed bytes").send().await.expect(201).json();
    let id = upload["id"].as_str().unwrap();
    remove_named(&folder.path().join("attachments"), id);
    alice.request("GET", &format!("/v1/attachments/{}", upload["id"].as_str().unwrap())).send().await.expect(404);
    let span = collector.await_spans("GET /v1/attachments/{id}", 1).await.remove(0).span;
    let is_about = |line: &LogRecord| body(line).contains("an attachment that should be in the storage");
    eventually("the line about it", async || collector.log_lines().iter().any(is_about)).await;
    let line = collector.log_lines().into_iter().find(is_about).unwrap();
    assert_eq!((line.trace_id, line.span_id), (span.trace_id, span.span_id));
    let ready = collector.log_lines().into_iter().find(|line| body(line) == "the server is ready").unwrap();
    assert!(ready.trace_id.is_empty(), "no request is about the start");
}

/// Otherwise each export would be a reason for another one.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_export_itself_logs_is_not_exported() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let server = start_with(&folder, &collector, &["--metrics-export-interval-secs=1"], &[("RUST_LOG", "trace")]).await;
    Device::register(&server.client()).await;
    let exports = |count: usize| {
        let collector = &collector;
        async move { eventually("metrics", async || collector.metric_exports() >= count).await }
    };
    exports(2).await;
    let before = collector.log_lines().len();
    exports(5).await;
    let more = collector.log_lines().len() - before;
    assert!(more < 500, "{more} lines in three seconds of an idle server");
    stop(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_come_as_often_as_asked_and_once_more_at_the_end() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let often = start(&folder, &collector, &["--metrics-export-interval-secs=1"]).await;
    eventually("metrics", async || collector.metric_exports() >= 3).await;
    stop(often).await;
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let seldom = start(&folder, &collector, &["--metrics-export-interval-secs=3600"]).await;
    tokio::time::sleep(3 * SECOND).await; // nothing tells that something will not happen
    assert_eq!(collector.metric_exports(), 0);
    stop(seldom).await;
    assert_eq!(collector.metric_exports(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn https_needs_a_certificate_that_the_system_trusts() {
    let folder = tempfile::tempdir().unwrap();
    let authority = folder.path().join("authority.pem");
    let collector = Collector::start_tls(acceptor(&authority, "h2")).await;
    let places = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let trusting = [("SSL_CERT_FILE", authority.to_str().unwrap())];
    let server = start_with(&places[0], &collector, &[], &trusting).await;
    eventually("a line", async || collector.has_line("the server is ready")).await;
    stop(server).await;
    let lines = collector.log_lines().len();
    let server = start(&places[1], &collector, &[]).await;
    eventually("a refusal", async || server.output().contains("the collector does not take them")).await;
    stop(server).await;
    assert_eq!(collector.log_lines().len(), lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_may_come_late_and_both_are_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let address = ([127, 0, 0, 1], free_port()).into();
    let endpoint = format!("--otlp-endpoint=http://{address}");
    let options = [&*endpoint, "--export-timeout-secs=1", "--metrics-export-interval-secs=1"];
    let server = Binary::start(folder.path(), &options).await;
    let alice = Device::register(&server.client()).await;
    let told = |what: &str| server.output().lines().filter(|line| line.contains(what)).count();
    eventually("word of it", async || told("the collector does not take them") == 3).await;
    for _ in 0..3 {
        alice.request("GET", "/v1/devices").send().await.expect(200);
        tokio::time::sleep(SECOND).await; // an outage that lasts
    }
    let collector = Collector::start_on(address).await;
    eventually("a span", async || {
        alice.request("GET", "/v1/keys").send().await.expect(200);
        !collector.named("GET /v1/keys").is_empty()
    })
    .await;
    eventually("metrics", async || collector.metric_exports() > 0).await;
    eventually("word of it", async || told("the collector takes them again") >= 2).await;
    assert_eq!(told("the collector does not take them"), 3, "once for traces, metrics and logs:\n{}", server.output());
    stop(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_the_collector_takes_as_long_as_the_timeout_says() {
    let collector = Collector::start().await;
    collector.freeze();
    let places = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let patient = start(&places[0], &collector, &["--export-timeout-secs=60"]).await;
    let hasty = start(&places[1], &collector, &["--export-timeout-secs=1"]).await;
    eventually("word of it", async || hasty.output().contains("the collector does not take them")).await;
    assert!(!patient.output().contains("the collector does not take them"));
    collector.thaw();
    Device::register(&hasty.client()).await;
    collector.await_spans("POST /v1/users", 1).await;
}

/// A collector that takes calls and never answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_collector_costs_neither_memory_nor_speed_nor_an_orderly_end() {
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let server = start(&folder, &collector, &["--export-timeout-secs=2", "--max-inbox-size=20000"]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    collector.freeze();
    // Five spans each: the second round finds all queues full.
    let round = async || {
        let began = Instant::now();
        let sender = |number: u32| {
            let (alice, bob) = (alice.clone(), bob.clone());
            async move {
                for _ in 0..125 {
                    alice.send_owned(vec![(bob.clone(), number.to_string().into())]).await;
                }
            }
        };
        futures_util::future::join_all((0..16).map(sender)).await;
        began.elapsed()
    };
    let first = round().await;
    let (second, before) = (round().await, server.resident_bytes());
    let third = round().await;
    let grown = server.resident_bytes().saturating_sub(before) >> 20;
    assert!(grown < 24, "{grown} MiB more while nothing is taken");
    assert!(third < 3 * first.max(second) + SECOND, "{first:?}, {second:?}, then {third:?} for as many sends");
    let lines = server.output().lines().filter(|line| line.contains("the collector")).count();
    assert!(lines <= 3, "{}", server.output());
    let began = Instant::now();
    let output = stop(server).await;
    assert!(output.contains("the server has stopped"));
    assert!(began.elapsed() < 9 * SECOND, "the end took {:?}", began.elapsed());
}
