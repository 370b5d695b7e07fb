//! What bodies and paths may hold, and nonsense of every kind, for all endpoints.

use serde_json::json;
use uuid::Uuid;

use super::conventions::{authenticated, filled, routes};
use crate::harness::{PASSWORD, TestServer, signed_key};

const MAX_BODY: usize = 2 * 1024 * 1024;

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
        let pieces =
            large.into_bytes().chunks(100_000).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect::<Vec<_>>();
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
        let deep = json(&"[".repeat(10_000)).send().await;
        assert!([400, 422].contains(&deep.status), "{method} {template}: {}", deep.status);
        for shapeless in ["[]", "null", "1", "\"\"", "{}", "{\"a\":{\"b\":[]}}"] {
            json(shapeless).send().await.expect(422);
        }
        let not_utf8 =
            request().header("content-type", "application/json").body(&b"{\"token\":\"\xff\"}"[..]).send().await;
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
    for (method, template) in
        authenticated().filter(|(_, template)| template.contains('{') && !template.contains("link"))
    {
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
    let bodies: [&[u8]; 8] =
        [b"", b"\0", b"\xff\xfe", b"{}", b"{\"username\":\"\\ud800\"}", b"\x0a\x00", b"null", &[b'9'; 5000]];
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
async fn bodies_that_are_compressed_are_refused_everywhere() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let database = server.database().await;
    let before = database.everything().await;
    let others = [("PUT", "/v1/link-sessions/{id}"), ("POST", "/v1/messages"), ("POST", "/v1/attachments")];
    for (method, template) in JSON.iter().copied().chain(others) {
        let request = alice.request(method, &filled(template)).header("idempotency-key", Uuid::new_v4().to_string());
        let request = request.header("content-type", "application/json").header("content-encoding", "gzip");
        request.body(&b"\x1f\x8b\x08\0\0\0\0\0\0\x03"[..]).send().await.expect(415);
    }
    assert!(database.everything().await == before, "something was changed");
    let plain = alice.request("POST", "/v1/attachments").header("content-encoding", "identity");
    plain.body("sealed").send().await.expect(201);
}
