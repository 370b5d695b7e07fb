//! What holds for every endpoint. The endpoints come from the table of
//! routes, so that a new one is held to this without anybody thinking of it.

use std::collections::BTreeSet;

use obscura_server::api::ROUTES;
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Device, TestServer};

/// Routes that need no access token.
const OPEN: &[(&str, &str)] = &[
    ("POST", "/v1/users"),
    ("POST", "/v1/users/reset"),
    ("POST", "/v1/session"),
    ("POST", "/v1/session/refresh"),
    ("POST", "/v1/link-sessions"),
    ("GET", "/v1/link-sessions"),
    ("GET", "/v1/link-sessions/{id}"),
    ("POST", "/v1/devices"),
    ("GET", "/v1/gateway"),
    ("GET", "/openapi.yaml"),
];

pub fn routes() -> impl Iterator<Item = (&'static str, &'static str)> {
    ROUTES.iter().map(|route| (route.method, route.path))
}

pub fn authenticated() -> impl Iterator<Item = (&'static str, &'static str)> {
    routes().filter(|route| !OPEN.contains(route))
}

/// A path of this template, with ids that nobody has.
pub fn filled(template: &str) -> String {
    let id = |segment: &str| match segment {
        "{id}" if template.contains("link-sessions") => "A".repeat(43),
        varying if varying.starts_with('{') => Uuid::new_v4().to_string(),
        literal => literal.to_owned(),
    };
    template.split('/').map(id).collect::<Vec<_>>().join("/")
}

fn paths() -> BTreeSet<&'static str> {
    ROUTES.iter().map(|route| route.path).collect()
}

// ---- paths and methods ----

#[tokio::test]
async fn an_unknown_path_is_not_found_and_a_trailing_slash_makes_one() {
    let server = TestServer::start().await;
    let client = server.client();
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/users",
        "/V1/users",
        "/v1/Users",
        "/v1//users",
        "//v1/users",
        "/openapi.json",
        "/livez",
        "/readyz",
        "/metrics",
        "/v1/users%2Freset",
    ] {
        client.get(path).send().await.expect(404);
    }
    for template in paths() {
        // One that varies may be anything but empty, so the path without it is another route, or none.
        client.get(&format!("{}/", filled(template))).send().await.expect(404);
        client.post(&format!("{}/", filled(template))).send().await.expect(404);
    }
}

#[tokio::test]
async fn other_methods_are_refused_with_the_ones_that_are_there() {
    let server = TestServer::start().await;
    let client = server.client();
    for template in paths() {
        let mut there: BTreeSet<&str> =
            routes().filter(|(_, path)| *path == template).map(|(method, _)| method).collect();
        if there.contains("GET") {
            there.insert("HEAD");
        }
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"] {
            if there.contains(method) {
                continue;
            }
            let answer = client.request(method, &filled(template)).send().await.expect(405);
            let allow = answer.header("allow").expect("one allow header");
            assert_eq!(allow.split(',').collect::<BTreeSet<_>>(), there, "{method} {template}");
        }
    }
}

#[tokio::test]
async fn there_are_no_cors_headers_cookies_or_compression() {
    let server = TestServer::start().await;
    let client = server.client();
    for (method, template) in routes() {
        let request = client.request(method, &filled(template)).header("origin", "https://example.org");
        let answer = request.header("accept-encoding", "gzip, br, zstd").send().await;
        for header in answer.headers.keys() {
            assert!(!header.as_str().starts_with("access-control-"), "{header}");
        }
        for header in ["set-cookie", "content-encoding", "vary", "server"] {
            assert!(!answer.headers.contains_key(header), "{method} {template}: {header}");
        }
    }
}

#[tokio::test]
async fn head_is_answered_like_get_without_a_body() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let id = upload(&alice).await;
    let session = alice.approved_link_session().await;
    let ready = [
        "/openapi.yaml".to_owned(),
        "/v1/devices".to_owned(),
        "/v1/keys".to_owned(),
        format!("/v1/keys/{}", alice.user),
        format!("/v1/keys/{}/devices/{}", alice.user, alice.id),
        format!("/v1/attachments/{id}"),
        format!("/v1/link-sessions/{session}"),
        format!("/v1/link-sessions/{}", "A".repeat(43)),
        "/v1/gateway".to_owned(),
        format!("/v1/attachments/{}", Uuid::new_v4()),
        "/v1/nowhere".to_owned(),
    ];
    for path in ready {
        let get = alice.request("GET", &path).send().await;
        let head = alice.request("HEAD", &path).send().await.expect(get.status);
        assert!(head.body.is_empty(), "{path}");
        assert_eq!(head.header("content-type"), get.header("content-type"), "{path}");
        assert_eq!(head.header("etag"), get.header("etag"), "{path}");
        let length = head.header("content-length").map(|length| length.parse::<usize>().unwrap());
        // A bundle may differ from the next one in its length.
        let may_differ = path.starts_with("/v1/keys/");
        assert!(may_differ || length.is_none_or(|length| length == get.body.len()), "{path}");
    }
}

async fn upload(device: &Device) -> String {
    let answer = device.request("POST", "/v1/attachments").body("sealed").send().await.expect(201).json();
    answer["id"].as_str().expect("an id").to_owned()
}

// ---- request ids ----

#[tokio::test]
async fn every_answer_has_a_request_id_of_its_own_or_the_one_that_was_sent() {
    let server = TestServer::start().await;
    let client = server.client();
    let mut fresh = BTreeSet::new();
    for (method, template) in routes().chain([("GET", "/nowhere"), ("OPTIONS", "/v1/users")]) {
        let answer = client.request(method, &filled(template)).send().await;
        let id = answer.header("x-request-id").unwrap().to_owned();
        let uuid = Uuid::try_parse(&id).unwrap();
        assert_eq!((uuid.get_version_num(), uuid.hyphenated().to_string()), (4, id.clone()), "{method} {template}");
        assert!(fresh.insert(id));
        for sent in [&b"my-id"[..], b" inner space ", b"\xc3\xbc", &[b'x'; 4000]] {
            // The harness compares what comes back.
            client.request(method, &filled(template)).header("x-request-id", sent.trim_ascii()).send().await;
        }
    }
}

#[tokio::test]
async fn the_management_port_has_no_request_ids_and_nothing_but_health_and_metrics() {
    let server = TestServer::start().await;
    let client = server.management();
    let live = client.get("/livez").send().await.expect(200);
    assert!(live.body.is_empty());
    assert!(!live.headers.contains_key("x-request-id"));
    let ready = client.get("/readyz").send().await.expect(200);
    assert_eq!(ready.json(), json!({"status": "ok", "database": "ok", "storage": "ok", "pubsub": "ok"}));
    let metrics = client.get("/metrics").send().await.expect(200);
    assert!(!metrics.headers.contains_key("x-request-id"));
    for path in ["/", "/livez/", "/metrics/", "/v1/users", "/openapi.yaml"] {
        client.get(path).send().await.expect(404);
    }
    for path in ["/livez", "/metrics"] {
        server.client().get(path).send().await.expect(404);
    }
}

#[tokio::test]
async fn readiness_names_the_part_that_fails_and_comes_back_with_it() {
    let server = TestServer::start_embedded_with(|_| {}).await;
    let client = server.management();
    let attachments = server.folder().join("attachments");
    let away = server.folder().join("away");
    client.get("/readyz").send().await.expect(200);
    std::fs::rename(&attachments, &away).unwrap();
    std::fs::write(&attachments, "no folder").unwrap();
    let answer = client.get("/readyz").send().await.expect(503).json();
    assert_eq!(answer, json!({"status": "error", "database": "ok", "storage": "error", "pubsub": "ok"}));
    client.get("/livez").send().await.expect(200);
    std::fs::remove_file(&attachments).unwrap();
    std::fs::rename(&away, &attachments).unwrap();
    client.get("/readyz").send().await.expect(200);
}

#[tokio::test]
async fn the_contract_is_served_as_it_stands() {
    let server = TestServer::start().await;
    let answer = server.client().get("/openapi.yaml").send().await.expect(200);
    assert_eq!(answer.header("content-type"), Some("text/yaml"));
    assert!(answer.body == include_str!("../../../openapi.yaml"));
    let version = format!("version: {}", env!("CARGO_PKG_VERSION"));
    for text in ["openapi: 3.0.3", "title: Obscura Server API", &version] {
        assert!(String::from_utf8_lossy(&answer.body).contains(text), "{text}");
    }
}

// ---- tokens ----

#[tokio::test]
async fn without_a_good_token_every_authenticated_endpoint_says_401_and_changes_nothing() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    let gone = alice.link().await;
    alice.remove(&gone).await;
    let logged_out = alice.link().await;
    logged_out.log_out().await;
    let database = server.database().await;
    let before = database.everything().await;
    let [head, claims, signature] = alice.token.split('.').collect::<Vec<_>>()[..] else { panic!("no JWT") };
    let bobs_claims = bob.token.split('.').nth(1).unwrap();
    let forged = [
        None,
        Some("Bearer".to_owned()),
        Some("Bearer ".to_owned()),
        Some(format!("bearer {}", alice.token)),
        Some(format!("Bearer  {}", alice.token)),
        Some(format!("Basic {}", alice.token)),
        Some(alice.token.clone()),
        Some(format!("Bearer {}", alice.refresh_token)),
        Some(format!("Bearer {head}.{bobs_claims}.{signature}")),
        Some(format!("Bearer {head}.{claims}.")),
        Some(format!("Bearer eyJhbGciOiJub25lIn0.{claims}.")),
        Some(format!("Bearer {}", gone.token)),
        Some(format!("Bearer {}", logged_out.token)),
        Some(format!("Bearer {}", "x".repeat(8000))),
    ];
    for (method, template) in authenticated() {
        for token in &forged {
            // Everything else is wrong with this request as well; the token wins.
            let path = if template.contains("Id}") { template.replace("Id}", "") } else { filled(template) };
            let path = path.replace(['{', '}'], "");
            let mut request = alice.client.request(method, &path).header("content-type", "text/plain").body("{{{");
            if let Some(token) = token {
                request = request.header("authorization", token);
            }
            let answer = request.send().await;
            assert_eq!(answer.status, 401, "{method} {path} with {token:?}");
            assert_eq!(answer.error(), "Unauthorized");
        }
    }
    assert!(database.everything().await == before, "something was changed");
}

#[tokio::test]
async fn a_head_request_changes_nothing_anywhere() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let (id, ticket) = (upload(&alice).await, alice.ticket().await);
    let database = server.database().await;
    let before = database.everything().await;
    for template in routes().filter(|(method, _)| *method == "GET").map(|(_, path)| path) {
        let path = match template {
            "/v1/keys/{userId}" => format!("/v1/keys/{}", alice.user),
            "/v1/keys/{userId}/devices/{deviceId}" => format!("/v1/keys/{}/devices/{}", alice.user, alice.id),
            "/v1/attachments/{id}" => format!("/v1/attachments/{id}"),
            "/v1/gateway" => format!("/v1/gateway?ticket={ticket}"),
            other => filled(other),
        };
        let request = || alice.request("HEAD", &path).header("connection", "upgrade").header("upgrade", "websocket");
        for _ in 0..3 {
            let handshake = request().header("sec-websocket-version", "13");
            handshake.header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==").send().await;
        }
    }
    assert!(database.everything().await == before, "something was changed");
}
