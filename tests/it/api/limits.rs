//! Limits for each client address: requests, which address counts, and open connections.

use std::time::Duration;

use obscura_server::config::Config;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Binary, Client, Response, TestServer, deployment, eventually, within};

/// Rates so low that no token comes back during a test, with 3 and 2 tokens at first.
fn scarce(config: &mut Config) {
    config.rate_limits.per_second = 1;
    config.rate_limits.burst = 3;
    config.rate_limits.auth_per_second = 1;
    config.rate_limits.auth_burst = 2;
}

/// A request of the standard tier from a client with this address, behind a trusted proxy.
async fn standard(client: &Client, address: &str) -> Response {
    client.get("/v1/devices").header("x-forwarded-for", address).send().await
}

/// The same of the auth tier.
async fn auth(client: &Client, address: &str) -> Response {
    let body = json!({"refreshToken": "unknown"});
    client.post("/v1/session/refresh").header("x-forwarded-for", address).json(&body).send().await
}

/// How many of `requests` requests are let through. A test on a busy machine may take long enough for a token more.
async fn let_through(requests: usize, mut send: impl AsyncFnMut() -> Response) -> usize {
    let mut count = 0;
    for _ in 0..requests {
        count += usize::from(send().await.status != 429);
    }
    count
}

#[tokio::test]
async fn a_request_too_many_is_told_when_to_come_again() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    for tier in [0, 1] {
        let send = async || {
            if tier == 0 { standard(&client, "198.51.100.1").await } else { auth(&client, "198.51.100.1").await }
        };
        let refused = loop {
            let answer = send().await;
            if answer.status == 429 {
                break answer;
            }
            // Before any token has been looked at: a limit comes before authentication.
            answer.expect(401);
        };
        let wait = refused.header("retry-after").unwrap();
        assert!(matches!(wait, "1" | "2"), "{wait}");
        assert_eq!(refused.header("x-ratelimit-after"), Some(wait));
        assert_eq!(refused.header("x-request-id").unwrap().len(), 36);
        assert!(!refused.error().is_empty());
    }
}

#[tokio::test]
async fn what_passes_has_no_header_about_limits() {
    let server = TestServer::start_with(scarce).await;
    let answer = standard(&server.client(), "198.51.100.1").await.expect(401);
    assert!(answer.headers.keys().all(|name| !name.as_str().contains("ratelimit") && name != "retry-after"));
}

#[tokio::test]
async fn the_tiers_do_not_share_their_tokens() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    let used = let_through(20, async || standard(&client, "198.51.100.1").await).await;
    assert!((3..20).contains(&used), "{used}");
    auth(&client, "198.51.100.1").await.expect(401);
    let used = let_through(20, async || auth(&client, "198.51.100.2").await).await;
    assert!((2..20).contains(&used), "{used}");
    standard(&client, "198.51.100.2").await.expect(401);
}

#[tokio::test]
async fn attachments_the_document_and_unknown_paths_do_not_touch_the_allowances_of_the_api() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    for _ in 0..10 {
        client.get("/openapi.yaml").send().await.expect(200);
        client.get("/nowhere").send().await.expect(404);
        client.post("/v1/attachments").body("abc").send().await.expect(401);
        client.get("/v1/attachments/00000000-0000-4000-8000-000000000000").send().await.expect(401);
    }
}

#[tokio::test]
async fn every_path_costs_a_token() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    let attachment = "/v1/attachments/00000000-0000-4000-8000-000000000000";
    for (number, (method, path)) in [
        ("GET", "/openapi.yaml"),
        ("GET", "/nowhere"),
        ("GET", "/"),
        ("GET", attachment),
        ("POST", "/v1/attachments"),
        ("DELETE", "/v1/messages"),
        ("OPTIONS", "/v1/users"),
    ]
    .into_iter()
    .enumerate()
    {
        let address = format!("198.51.100.{number}");
        let request = async || client.request(method, path).header("x-forwarded-for", &address).send().await;
        // Fifty times the burst, and what comes back meanwhile.
        let mut used = 0;
        while used < 2000 && request().await.status != 429 {
            used += 1;
        }
        assert!((150..2000).contains(&used), "{method} {path}: {used}");
        // The allowance is one of their own.
        standard(&client, &address).await.expect(401);
        auth(&client, &address).await.expect(401);
    }
}

#[tokio::test]
async fn clients_behind_a_trusted_proxy_are_told_apart() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    // Whatever a client claims to the left of what the proxy adds changes nothing.
    let mut claim = 0;
    let used = let_through(20, async || {
        claim += 1;
        standard(&client, &format!("203.0.113.{claim}, 198.51.100.1, 10.0.0.7")).await
    })
    .await;
    assert!((3..20).contains(&used), "{used}");
    standard(&client, "198.51.100.2").await.expect(401);

    // The same on a line of its own.
    let used = let_through(20, async || {
        claim += 1;
        let request = client.get("/v1/devices").header("x-forwarded-for", format!("203.0.113.{claim}"));
        request.header("x-forwarded-for", "198.51.100.3").send().await
    })
    .await;
    assert!((3..20).contains(&used), "{used}");
}

#[tokio::test]
async fn a_forwarded_address_from_a_stranger_is_not_believed() {
    let server = TestServer::start_with(|config| {
        scarce(config);
        config.server.trusted_proxies.clear();
    })
    .await;
    let client = server.client();
    let mut claim = 0;
    let used = let_through(20, async || {
        claim += 1;
        standard(&client, &format!("198.51.100.{claim}")).await
    })
    .await;
    assert!((3..20).contains(&used), "{used}");
}

/// A proxy on a Unix socket says so, and what stands to the left of that is the client's own invention.
#[tokio::test]
async fn what_stands_before_an_item_that_is_no_address_is_not_believed() {
    for behind in ["unix:", "unknown", "", "unix:, 10.0.0.7"] {
        let server = TestServer::start_with(scarce).await;
        let client = server.client();
        let mut claim = 0;
        let used = let_through(20, async || {
            claim += 1;
            standard(&client, &format!("203.0.113.{claim}, {behind}")).await
        })
        .await;
        assert!((3..12).contains(&used), "{behind}: {used} passed");
        standard(&client, "203.0.113.1").await.expect(401);
    }
}

#[tokio::test]
async fn a_proxy_that_is_not_believed_is_told_of_once_and_without_addresses() {
    for (options, lines) in [(&["--trusted-proxies="][..], 1), (&[], 0)] {
        let folder = tempfile::tempdir().unwrap();
        let server = Binary::start(folder.path(), options).await;
        for host in 1..4 {
            standard(&server.client(), &format!("198.51.100.{host}")).await.expect(401);
        }
        let log = server.output();
        assert_eq!(log.matches("X-Forwarded-For").count(), lines, "{log}");
        assert!(!log.contains("198.51.100"), "{log}");
    }
}

#[tokio::test]
async fn that_private_networks_are_believed_by_default_is_told_at_the_start() {
    for (host, trusted, lines) in
        [("0.0.0.0", None, 1), ("127.0.0.1", None, 0), ("0.0.0.0", Some("--trusted-proxies=127.0.0.1"), 0)]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut options = deployment::options(folder.path()).await;
        options.extend([format!("--server-host={host}"), "--server-port=0".into(), "--mgmt-port=0".into()]);
        options.extend(trusted.map(str::to_owned));
        let server = Binary::begin(&options.iter().map(String::as_str).collect::<Vec<_>>());
        eventually("the start", async || server.output().contains("the server is ready")).await;
        let log = server.output();
        assert_eq!(log.matches("private networks forward (X-Forwarded-For) are believed").count(), lines, "{log}");
    }
}

#[tokio::test]
async fn a_v6_network_counts_as_one_client_and_a_mapped_address_as_its_v4_one() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    let mut host = 0;
    let used = let_through(20, async || {
        host += 1;
        standard(&client, &format!("2001:db8::{host:x}:1")).await
    })
    .await;
    assert!((3..20).contains(&used), "{used}");
    standard(&client, "2001:db8:0:1::1").await.expect(401);

    let mut mapped = false;
    let used = let_through(20, async || {
        mapped = !mapped;
        standard(&client, if mapped { "::ffff:198.51.100.9" } else { "198.51.100.9" }).await
    })
    .await;
    assert!((3..20).contains(&used), "{used}");
}

/// True when the server keeps this connection, false when it closes it at once.
async fn is_kept(connection: &mut TcpStream) -> bool {
    let request = b"GET /openapi.yaml HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut answer = [0; 15];
    connection.write_all(request).await.is_ok()
        && within("an answer or the end", connection.read_exact(&mut answer)).await.is_ok()
        && &answer == b"HTTP/1.1 200 OK"
}

async fn connect(server: &TestServer) -> TcpStream {
    TcpStream::connect(server.address()).await.unwrap()
}

async fn kept_again(server: &TestServer) {
    eventually("room for another connection", async || is_kept(&mut connect(server).await).await).await;
}

#[tokio::test]
async fn one_address_has_a_share_of_the_connections() {
    let server = TestServer::start_with(|config| {
        config.server.trusted_proxies.clear();
        config.server.max_connections_per_address = 2;
    })
    .await;
    let (mut first, mut second) = (connect(&server).await, connect(&server).await);
    assert!(is_kept(&mut first).await && is_kept(&mut second).await);
    assert!(!is_kept(&mut connect(&server).await).await);
    drop(first);
    kept_again(&server).await;
}

#[tokio::test]
async fn a_trusted_proxy_has_all_connections_but_no_more() {
    let server = TestServer::start_with(|config| {
        config.server.max_connections_per_address = 1;
        config.server.max_connections = 3;
    })
    .await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut connection = connect(&server).await;
        assert!(is_kept(&mut connection).await);
        open.push(connection);
    }
    assert!(!is_kept(&mut connect(&server).await).await);
    open.pop();
    kept_again(&server).await;
}

#[tokio::test]
async fn waiting_as_long_as_told_suffices() {
    let server = TestServer::start_with(scarce).await;
    let client = server.client();
    let refused = loop {
        let answer = auth(&client, "198.51.100.1").await;
        if answer.status == 429 {
            break answer;
        }
    };
    // Here time itself is the event that is awaited.
    tokio::time::sleep(Duration::from_secs(refused.header("retry-after").unwrap().parse().unwrap())).await;
    auth(&client, "198.51.100.1").await.expect(401);
}
