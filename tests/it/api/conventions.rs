//! Sections 1, 2, 11.4 and 12 of the contract: what holds for every endpoint. The endpoints come from the table of
//! routes, so that a new one is held to this without anybody thinking of it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use obscura_server::api::ROUTES;
use serde_json::json;
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::{Device, PASSWORD, TestServer, raw_answer, raw_request, signed_key};

const MAX_BODY: usize = 2 * 1024 * 1024;

/// Routes that need no access token.
const OPEN: &[(&str, &str)] = &[
    ("POST", "/v1/users"),
    ("POST", "/v1/users/reset"),
    ("POST", "/v1/session"),
    ("POST", "/v1/session/refresh"),
    ("POST", "/v1/link-sessions"),
    ("GET", "/v1/link-sessions/{id}"),
    ("POST", "/v1/devices"),
    ("GET", "/v1/gateway"),
    ("GET", "/openapi.yaml"),
];

/// Routes that take a JSON body.
const JSON: &[(&str, &str)] = &[
    ("POST", "/v1/users"),
    ("POST", "/v1/users/reset"),
    ("POST", "/v1/session"),
    ("POST", "/v1/session/refresh"),
    ("POST", "/v1/link-sessions"),
    ("POST", "/v1/devices"),
    ("POST", "/v1/keys"),
    ("PUT", "/v1/push-token"),
];

fn routes() -> impl Iterator<Item = (&'static str, &'static str)> {
    ROUTES.iter().map(|route| (route.method, route.path))
}

fn authenticated() -> impl Iterator<Item = (&'static str, &'static str)> {
    routes().filter(|route| !OPEN.contains(route))
}

/// A path of this template, with ids that nobody has.
fn filled(template: &str) -> String {
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
    for path in ["/", "/v1", "/v1/", "/v2/users", "/V1/users", "/v1/Users", "/v1//users", "//v1/users", "/openapi.json", "/livez", "/readyz", "/metrics", "/v1/users%2Freset"] {
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
        let mut there: BTreeSet<&str> = routes().filter(|(_, path)| *path == template).map(|(method, _)| method).collect();
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
async fn the_management_port_has_no_request_ids_and_nothing_but_health() {
    let server = TestServer::start().await;
    let client = server.management();
    let live = client.get("/livez").send().await.expect(200);
    assert!(live.body.is_empty());
    assert!(!live.headers.contains_key("x-request-id"));
    let ready = client.get("/readyz").send().await.expect(200);
    assert_eq!(ready.json(), json!({"status": "ok", "database": "ok", "storage": "ok", "pubsub": "ok"}));
    for path in ["/", "/livez/", "/metrics", "/v1/users", "/openapi.yaml"] {
        client.get(path).send().await.expect(404);
    }
    server.client().get("/livez").send().await.expect(404);
}

#[tokio::test]
async fn readiness_names_the_part_that_fails_and_comes_back_with_it() {
    let server = TestServer::start().await;
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

// ---- bodies ----

#[tokio::test]
async fn bodies_of_more_than_two_mebibytes_are_refused_everywhere() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let database = server.database().await;
    let before = database.everything().await;
    let key = Uuid::new_v4().to_string();
    let others = [("PUT", "/v1/link-sessions/{id}"), ("POST", "/v1/messages")];
    for (method, template) in JSON.iter().copied().chain(others) {
        let request = || {
            let request = alice.request(method, &filled(template)).header("idempotency-key", &key);
            request.header("content-type", "application/json")
        };
        let large = format!("\"{}\"", "x".repeat(MAX_BODY - 1));
        request().body(large.clone()).send().await.expect(413);
        let pieces = large.into_bytes().chunks(100_000).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect::<Vec<_>>();
        let unannounced = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
        request().body(unannounced).send().await.expect(413);
    }
    assert!(database.everything().await == before, "something was changed");
}

#[tokio::test]
async fn json_is_read_strictly_everywhere() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let database = server.database().await;
    let before = database.everything().await;
    for (method, template) in JSON {
        let request = || alice.request(method, template);
        let json = |body: &str| request().header("content-type", "application/json").body(body.to_owned());
        request().send().await.expect(415);
        request().header("content-type", "text/plain").body("{}").send().await.expect(415);
        for malformed in ["", "{", "nonsense", "{\"a\":}", "\u{0}"] {
            json(malformed).send().await.expect(400);
        }
        let deep = json(&"[".repeat(100_000)).send().await;
        assert!([400, 422].contains(&deep.status), "{method} {template}: {}", deep.status);
        for shapeless in ["[]", "null", "1", "\"\"", "{}", "{\"a\":{\"b\":[]}}"] {
            json(shapeless).send().await.expect(422);
        }
        let not_utf8 = request().header("content-type", "application/json").body(&b"{\"token\":\"\xff\"}"[..]).send().await;
        assert!([400, 422].contains(&not_utf8.status), "{method} {template}: {}", not_utf8.status);
    }
    assert!(database.everything().await == before, "something was changed");
}

#[tokio::test]
async fn an_array_is_not_taken_for_an_object() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let by_place = json!([alice.username, PASSWORD]);
    alice.client.post("/v1/link-sessions").json(&by_place).send().await.expect(422);
    let mut keys = json!({"signedPreKey": signed_key(&alice.identity, 2), "oneTimePreKeys": []});
    let signed = keys["signedPreKey"].take();
    keys["signedPreKey"] = json!([signed["keyId"], signed["publicKey"], signed["signature"]]);
    alice.request("POST", "/v1/keys").json(&keys).send().await.expect(422);
}

#[tokio::test]
async fn ids_in_paths_may_be_spelled_in_any_usual_way_and_others_are_refused() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let spellings = |id: Uuid| {
        let lower = id.hyphenated().to_string();
        [lower.clone(), lower.to_uppercase(), id.simple().to_string(), id.braced().to_string(), id.urn().to_string()]
    };
    for spelling in spellings(alice.user) {
        let spelling = spelling.replace('{', "%7B").replace('}', "%7D");
        alice.request("GET", &format!("/v1/keys/{spelling}")).send().await.expect(200);
    }
    for (method, template) in authenticated().filter(|(_, template)| template.contains('{') && !template.contains("link")) {
        for wrong in ["x", "1", "%20", "%00", "%ff", "67e55044-10b1-426f-9247-bb680e5fe0c", "..%2f..", "%F0%9F%92%A9"] {
            let path: Vec<_> =
                template.split('/').map(|segment| if segment.starts_with('{') { wrong } else { segment }).collect();
            alice.request(method, &path.join("/")).send().await.expect(400);
        }
    }
}

/// Whatever comes in, the answer is one that the document names (the harness looks) and never 500.
#[tokio::test]
async fn no_endpoint_answers_nonsense_with_anything_undocumented() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let bodies: [&[u8]; 8] = [b"", b"\0", b"\xff\xfe", b"{}", b"{\"username\":\"\\ud800\"}", b"\x0a\x00", b"null", &[b'9'; 5000]];
    for (method, template) in routes().filter(|route| *route != ("DELETE", "/v1/session")) {
        for body in bodies {
            for content_type in ["application/json", "application/x-protobuf"] {
                for query in ["", "?", "?ticket", "?ticket=%", "?x=%ff&=&&"] {
                    let path = format!("{}{query}", filled(template));
                    let request = alice.request(method, &path).header("content-type", content_type);
                    let request = request.header("idempotency-key", "\u{fc}").header("range", "bytes=-");
                    let request = request.header("if-none-match", "\"").header("x-forwarded-for", "a, , 999.1.1.1");
                    request.body(body).send().await;
                }
            }
        }
    }
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test]
async fn what_is_no_http_does_no_harm() {
    let server = TestServer::start().await;
    let requests: [&[u8]; 7] = [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: \0\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ];
    for request in requests {
        let answer = raw_request(server.address(), request).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let endless = [b"GET / HTTP/1.1\r\nhost: x\r\nx: ".to_vec(), vec![b'x'; 1_000_000]].concat();
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &endless).await;
    server.client().get("/openapi.yaml").send().await.expect(200);
}

// ---- 11.4: timeouts ----

fn stalled(path: &str, device: &Device) -> Vec<u8> {
    let key = Uuid::new_v4();
    let token = &device.token;
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {token}\r\nidempotency-key: {key}\r\n\
         content-type: application/json\r\ncontent-length: 100\r\n\r\n{{\"username\":"
    )
    .into_bytes()
}

#[tokio::test]
async fn an_upload_that_stalls_gets_408() {
    let server = TestServer::start_with(|config| {
        config.server.request_timeout = Duration::from_secs(1);
        config.attachments.timeout = Duration::from_secs(3);
    })
    .await;
    let alice = server.account().await;
    for (path, seconds) in [("/v1/users", 1), ("/v1/messages", 1), ("/v1/attachments", 3)] {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let answer = raw_answer(&mut stream, &stalled(path, &alice)).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{path}: {answer}");
        assert!(answer.to_lowercase().contains("x-request-id: "), "{path}: {answer}");
        let took = begun.elapsed();
        let limit = Duration::from_secs(seconds);
        assert!(took >= limit && took < limit + Duration::from_secs(5), "{path}: {took:?}");
    }
}

#[tokio::test]
async fn the_timeout_on_top_of_all_others_holds_for_attachments_too() {
    let server = TestServer::start_with(|config| config.server.global_timeout = Duration::from_secs(1)).await;
    let alice = server.account().await;
    for path in ["/v1/users", "/v1/attachments"] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let answer = raw_answer(&mut stream, &stalled(path, &alice)).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_connection_whose_request_head_does_not_come_is_closed() {
    let server = TestServer::start_with(|config| config.server.header_timeout = Duration::from_secs(1)).await;
    let (nothing, half) = tokio::join!(
        raw_request(server.address(), b""),
        raw_request(server.address(), b"GET /openapi.yaml HTTP/1.1\r\nhost: ")
    );
    assert!(!nothing.contains("200") && !half.contains("200"));
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_one_after_another() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = b"GET /v1/nowhere HTTP/1.1\r\nhost: x\r\n\r\n";
    for _ in 0..3 {
        let answer = raw_answer(&mut stream, request).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }
}

