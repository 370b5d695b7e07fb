//! What the server counts, and how it shows it.

mod document;
mod identity;
pub mod page;
mod reasons;

use std::collections::{BTreeMap, BTreeSet};

use obscura_server::api::ROUTES;
use obscura_server::telemetry::metrics::{Requests, catalogue};
use serde_json::json;
use uuid::Uuid;

use self::page::Page;
use crate::harness::{TestServer, eventually};

/// Every label of a metric on the page, with the values that it may have.
fn allowed() -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let metric = |metric: obscura_server::telemetry::metrics::Definition| {
        let values = |label: &obscura_server::telemetry::metrics::Label| -> BTreeSet<String> {
            match label.name {
                Requests::ROUTE => {
                    ROUTES.iter().map(|route| route.path).chain(["unmatched"]).map(str::to_owned).collect()
                }
                "version" => [env!("CARGO_PKG_VERSION").to_owned()].into(),
                _ => label.values.iter().map(|(value, _)| (*value).to_owned()).collect(),
            }
        };
        let labels = metric.labels.iter().map(|label| (label.name.replace('.', "_"), values(label)));
        (metric.prometheus(), labels.collect())
    };
    catalogue().into_iter().map(metric).collect()
}

#[tokio::test]
async fn a_used_server_shows_only_metrics_and_values_of_the_catalogue() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let mut socket = bob.connect().await;
    alice.send_to(&bob, "hello").await;
    let mail = socket.messages(1).await;
    socket.ack(&mail).await;
    socket.until_pong().await;
    let stored = alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201).json();
    let path = format!("/v1/attachments/{}", stored["id"].as_str().unwrap());
    alice.request("GET", &path).send().await.expect(200);
    alice.request("PUT", "/v1/push-token").json(&json!({"token": "a token"})).send().await.expect(204);
    alice.bundles(bob.user).await;
    server.client().request("GET", &format!("/v1/{}", Uuid::new_v4())).send().await.expect(404);
    server.client().request("BREW", "/v1/users").send().await.expect(405);
    eventually("the inventory", async || Page::of(&server).await.types.contains_key("obscura_inventory_users")).await;

    let (page, allowed) = (Page::of(&server).await, allowed());
    let unknown: Vec<_> = page.types.keys().filter(|name| !allowed.contains_key(*name)).collect();
    assert_eq!(unknown, ["target_info"]);
    for (name, labels, _) in page.series.iter().filter(|(name, ..)| name != "target_info") {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let may = base.and_then(|base| allowed.get(base)).or_else(|| allowed.get(name)).expect("a metric");
        for (label, value) in labels.iter().filter(|(label, _)| *label != "le") {
            let values = may.get(label).unwrap_or_else(|| panic!("{name} has a label {label}"));
            assert!(values.contains(value), "{name} has {label}={value}");
        }
    }
    for secret in [alice.user, alice.id, bob.user, bob.id].map(|id| id.to_string()) {
        assert!(!page.text.contains(&secret), "an id is shown");
    }
    assert!(!page.text.contains(&alice.username) && !page.text.contains("127.0.0.1"), "a name or address is shown");
}

#[tokio::test]
async fn requests_are_counted_by_route_method_and_class() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for _ in 0..3 {
        alice.bundles(alice.user).await;
    }
    alice.request("GET", &format!("/v1/keys/{}", Uuid::new_v4())).send().await.expect(404);
    server.client().get("/v1/devices").send().await.expect(401);
    server.client().get("/nowhere/else").send().await.expect(404);
    let page = Page::of(&server).await;
    let count = |route: &str, method: &str, class: &str| {
        let labels = [("http_route", route), ("http_request_method", method), ("http_response_status_class", class)];
        page.sum("http_server_request_duration_seconds_count", &labels)
    };
    assert_eq!(count("/v1/keys/{userId}", "GET", "2xx"), 3.0);
    assert_eq!(count("/v1/keys/{userId}", "GET", "4xx"), 1.0);
    assert_eq!(count("/v1/users", "POST", "2xx"), 1.0);
    assert_eq!(count("unmatched", "GET", "4xx"), 1.0);
    assert_eq!(page.sum("obscura_http_errors_total", &[("error_type", "not_found")]), 2.0);
    assert_eq!(page.sum("obscura_http_errors_total", &[("error_type", "unauthorized")]), 1.0);
    assert_eq!(page.sum("http_server_active_requests", &[]), 0.0);
    assert!(page.sum("obscura_listener_connections", &[("port", "api")]) >= 1.0);
}

#[tokio::test]
async fn what_the_database_holds_is_counted_by_one_node() {
    let mut first = TestServer::start_node_with(|_| {}).await;
    let (alice, bob) = (first.account().await, first.account().await);
    alice.send_to(&bob, "hello").await;
    // Whether or not it was counted before there was anything: soon after a start it is, when nobody has just done so.
    let database = first.database().await;
    first.restart_after(database.execute("DELETE FROM jobs")).await;
    let second = first.start_beside().await;
    eventually("both to have looked", async || {
        let pages = [Page::of(&first).await, Page::of(&second).await];
        let looked =
            pages.each_ref().map(|page| page.sum("obscura_job_runs_total", &[("job_name", "inventory")]) > 0.0);
        let shown = pages.iter().filter(|page| page.types.contains_key("obscura_inventory_devices")).count();
        let sum = |name: &str| pages.iter().map(|page| page.sum(name, &[])).sum::<f64>();
        let held = ["users", "messages", "devices"].map(|what| sum(&format!("obscura_inventory_{what}")));
        looked == [true, true] && shown == 1 && held == [2.0, 1.0, 2.0]
    })
    .await;
}

#[tokio::test]
async fn the_process_its_jobs_and_its_database_are_told_of() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    alice.send_to(&server.account().await, "hello").await;
    let page = Page::of(&server).await;
    for metric in ["process_memory_usage_bytes", "process_unix_file_descriptor_count", "obscura_runtime_workers"] {
        assert!(page.sum(metric, &[]) > 0.0, "{metric}");
    }
    for metric in ["obscura_store_group_duration_seconds_count", "obscura_database_acquire_duration_seconds_count"] {
        assert!(page.sum(metric, &[]) > 0.0, "{metric}");
    }
    assert_eq!(page.sum("obscura_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    assert_eq!(page.sum("obscura_bus_connected", &[]), 1.0);
    assert!(page.sum("process_start_time_seconds", &[]) > 1.7e9);
    eventually("jobs to have run", async || {
        let page = Page::of(&server).await;
        let jobs = ["room to grow", "inventory", "figures", "push queue"];
        jobs.iter().all(|job| page.sum("obscura_job_last_success_seconds", &[("job_name", job)]) > 1.7e9)
    })
    .await;
}
