//! Why something was refused, closed or not done.

use std::time::Duration;

use futures_util::future::join_all;

use super::page::{Page, sum};
use crate::harness::{RawSocket, TestServer, eventually};

async fn refused(server: &TestServer, reason: &str) -> u64 {
    sum(&[server], "obscura_http_errors_total", &[("error_type", reason)]).await
}

#[tokio::test]
async fn a_429_tells_by_which_limit() {
    let server = TestServer::start_with(|config| {
        config.account_rates.per_second = 1;
        config.account_rates.burst = 8;
        config.account_rates.target_per_second = 1;
        config.account_rates.target_burst = 1;
        config.account_rates.bundles_per_hour = 1;
        config.rate_limits.auth_per_second = 1;
        config.rate_limits.auth_burst = 3;
        config.attachments.bytes_per_day = 5000;
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload = || alice.request("POST", "/v1/attachments").body(vec![7; 80]);
    upload().send().await.expect(201);
    upload().send().await.expect(429);
    alice.bundles(bob.user).await;
    alice.request("GET", &format!("/v1/keys/{}", bob.user)).send().await.expect(429);
    let client = server.client();
    join_all((0..60).map(|_| alice.request("GET", "/v1/devices").send())).await;
    join_all((0..60).map(|_| client.post("/v1/session").send())).await;
    for reason in ["limit_upload_bytes", "limit_bundles", "limit_account", "limit_address_auth"] {
        assert!(refused(&server, reason).await > 0, "{reason}");
    }
    assert_eq!(refused(&server, "limit_address").await, 0);
}

#[tokio::test]
async fn a_client_that_hangs_up_before_its_answer_is_counted() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let database = server.database().await;
    let held = database.hold_write().await;
    let asking = tokio::spawn(async move { alice.ticket().await });
    eventually("the request to be there", async || {
        Page::of(&server).await.sum("http_server_active_requests", &[]) == 1.0
    })
    .await;
    asking.abort();
    eventually("the request to be given up", async || refused(&server, "abandoned").await == 1).await;
    assert_eq!(Page::of(&server).await.sum("http_server_active_requests", &[]), 0.0);
    held.release().await;
}

#[tokio::test]
async fn a_socket_that_ends_says_why() {
    let server = TestServer::start_with(|config| {
        config.gateway.max_connections_per_device = 1;
        config.gateway.write_timeout = Duration::from_secs(1);
        config.gateway.ping_interval = Duration::from_secs(3);
        config.gateway.ping_timeout = Duration::from_secs(1);
    })
    .await;
    let closed = async |reason: &str| sum(&[&server], "obscura_gateway_closed_total", &[("reason", reason)]).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let tablet = alice.link().await;

    let superseded = alice.connect().await;
    let gone = alice.connect().await;
    eventually("the older socket to go", async || closed("superseded").await == 1).await;
    gone.close().await;
    eventually("a socket to be closed", async || closed("gone").await == 1).await;
    drop(superseded);

    let dismissed = tablet.connect().await;
    alice.remove(&tablet).await;
    eventually("the removed device's socket to go", async || closed("dismissed").await == 1).await;
    drop(dismissed);

    let silent = RawSocket::open(server.address(), &alice.ticket().await).await;
    eventually("the silent client to be given up", async || closed("silent").await == 1).await;
    drop(silent);

    for number in 0..8 {
        alice.send_to(&bob, vec![number; 2_000_000]).await;
    }
    let slow = RawSocket::open(server.address(), &bob.ticket().await).await;
    eventually("the slow reader to be ended", async || closed("slow").await == 1).await;
    drop(slow);

    let page = Page::of(&server).await;
    assert_eq!(page.sum("obscura_gateway_opened_total", &[]), 5.0);
    assert_eq!(page.sum("obscura_gateway_closed_total", &[]), 5.0);
    assert_eq!(page.sum("obscura_gateway_sockets", &[]), 0.0);
    assert!(page.sum("obscura_gateway_deliveries_total", &[]) >= 1.0);
    assert!(page.sum("obscura_gateway_pings_total", &[]) >= 1.0);
}
