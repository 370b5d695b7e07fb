//! Attachments: what the contract says of upload and download, in its order.

mod interrupted;

use std::fs;
use std::time::Duration;

use crate::harness::{Bucket, Client, Device, Request, Response, TestServer, eventually, raw_request};

const DAY: Duration = Duration::from_hours(24);

fn upload(device: &Device, body: impl Into<reqwest::Body>) -> Request {
    device.request("POST", "/v1/attachments").body(body)
}

fn download(device: &Device, id: &str) -> Request {
    device.request("GET", &format!("/v1/attachments/{id}"))
}

/// The id of a fresh attachment.
async fn put(device: &Device, bytes: &[u8]) -> String {
    let answer = upload(device, bytes.to_vec()).send().await.expect(201).json();
    answer["id"].as_str().unwrap().to_owned()
}

/// The names of what is in the storage. A folder shows what is not complete, a bucket only the large ones of those.
async fn stored(server: &TestServer) -> Vec<String> {
    let attachments = &server.config().attachments;
    let Some(folder) = attachments.folder() else {
        let bucket = Bucket::of(attachments);
        let names = [bucket.objects().await, bucket.uploads_below(&attachments.prefix).await].concat();
        return names.iter().filter_map(|name| name.strip_prefix(&attachments.prefix)).map(str::to_owned).collect();
    };
    let entries = fs::read_dir(folder.join(&attachments.prefix)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn rows(server: &TestServer) -> i64 {
    server.database().await.number("SELECT count(*) FROM attachments").await
}

async fn nothing_is_left(server: &TestServer) {
    let database = server.database().await;
    eventually("row and file to go", async || {
        stored(server).await.is_empty() && database.number("SELECT count(*) FROM attachments").await == 0
    })
    .await;
}

fn seconds_now() -> i64 {
    obscura_server::clock::Clock::system().now().seconds()
}

/// A request by hand, so that its head can say anything and its body can be missing.
async fn by_hand(client: &Client, device: Option<&Device>, head: &str, body: &str) -> String {
    let token = device.map(|device| format!("authorization: Bearer {}\r\n", device.token)).unwrap_or_default();
    let request = format!("POST /v1/attachments HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{token}{head}\r\n{body}");
    raw_request(client.address(), request.as_bytes()).await
}

#[track_caller]
fn assert_status(answer: &str, status: u16) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "expected {status}: {answer}");
}

#[tokio::test]
async fn an_upload_is_checked_in_the_order_of_the_contract() {
    let server = TestServer::start_with(|config| config.attachments.min_size_bytes = 2).await;
    let (client, device) = (server.client(), server.account().await);
    let too_large = format!("content-length: {}\r\n", 52_428_801);

    assert_status(&by_hand(&client, None, "", "").await, 401);
    assert_status(&by_hand(&client, None, &too_large, "").await, 401);
    assert_status(&by_hand(&client, Some(&device), "", "").await, 411);
    assert_status(
        &by_hand(&client, Some(&device), "transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n").await,
        411,
    );
    assert_status(&by_hand(&client, Some(&device), "content-length: 0\r\n", "").await, 400);
    assert_status(&by_hand(&client, Some(&device), "content-length: 1\r\n", "a").await, 400);
    // None of the body is there, so an answer to it can't have waited for any.
    assert_status(&by_hand(&client, Some(&device), &too_large, "").await, 413);
    assert_status(&by_hand(&client, Some(&device), "content-length: 2\r\n", "ab").await, 201);
    assert_eq!((rows(&server).await, stored(&server).await.len()), (1, 1));
}

#[tokio::test]
async fn an_upload_answers_an_id_and_the_second_of_its_end() {
    let server = TestServer::start().await;
    let device = server.account().await;
    let before = seconds_now();
    for content_type in [None, Some("application/octet-stream"), Some("image/png"), Some("application/json")] {
        let request = upload(&device, "ciphertext");
        let request = if let Some(value) = content_type { request.header("content-type", value) } else { request };
        let answer = request.send().await.expect(201);
        assert_eq!(answer.header("content-type"), Some("application/json"));
        let answer = answer.json();
        assert_eq!(answer.as_object().unwrap().len(), 2, "{answer}");
        let id = answer["id"].as_str().unwrap();
        assert_eq!(id.parse::<uuid::Uuid>().unwrap().to_string(), id);
        let expires_at = answer["expiresAt"].as_i64().unwrap();
        assert!((before..=seconds_now()).contains(&(expires_at - 30 * 86_400)), "{expires_at}");
    }
}

#[tokio::test]
async fn the_sizes_at_the_limits_are_allowed() {
    let server = TestServer::start_with(|config| config.attachments.max_size_bytes = 1_000_000).await;
    let device = server.account().await;
    let largest = vec![7; 1_000_000];
    for body in [&largest[..1], &largest] {
        let id = put(&device, body).await;
        assert!(download(&device, &id).send().await.expect(200).body == body);
    }
    upload(&device, vec![7; 1_000_001]).send().await.expect(413);
}

#[tokio::test]
async fn any_device_that_knows_the_id_can_download() {
    let server = TestServer::start().await;
    let (owner, other) = (server.account().await, server.account().await);
    let bytes: Vec<u8> = (0..1_000_003u32).map(|n| (n % 251) as u8).collect();
    let id = put(&owner, &bytes).await;
    for device in [&owner, &other] {
        let answer = download(device, &id).send().await.expect(200);
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
        assert_eq!(answer.header("content-length"), Some("1000003"));
        assert_eq!(answer.header("accept-ranges"), Some("bytes"));
        assert_eq!(answer.header("etag"), Some(&*format!("\"{id}\"")));
        assert!(answer.body == bytes);
    }
    let other_spelling = id.replace('-', "").to_uppercase();
    assert!(download(&other, &other_spelling).send().await.expect(200).body == bytes);

    let head =
        other.request("HEAD", &format!("/v1/attachments/{id}")).header("range", "bytes=0-1").send().await.expect(200);
    assert_eq!(head.header("content-length"), Some("1000003"));
    assert_eq!(head.header("etag"), Some(&*format!("\"{id}\"")));
    assert!(head.body.is_empty());
}

#[tokio::test]
async fn a_download_needs_a_token_first_and_then_a_valid_and_known_id() {
    let server = TestServer::start().await;
    let (client, device) = (server.client(), server.account().await);
    let id = put(&device, b"abc").await;
    for path in [&*id, "nonsense", "00000000-0000-4000-8000-000000000000"] {
        client.get(&format!("/v1/attachments/{path}")).send().await.expect(401);
        client.get(&format!("/v1/attachments/{path}")).token("forged").send().await.expect(401);
    }
    download(&device, "nonsense").send().await.expect(400);
    download(&device, "00000000-0000-4000-8000-000000000000").send().await.expect(404);
    device.request("DELETE", &format!("/v1/attachments/{id}")).send().await.expect(405);
    download(&device, &format!("{id}/")).send().await.expect(404);
}

#[tokio::test]
async fn one_range_of_bytes_is_answered_and_other_ranges_are_ignored() {
    let server = TestServer::start().await;
    let device = server.account().await;
    let bytes: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
    let id = put(&device, &bytes).await;
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=0-99", 0..100),
        ("bytes=65530-131100", 65_530..131_101),
        ("bytes=199999-", 199_999..200_000),
        ("bytes=100-", 100..200_000),
        ("bytes=-5", 199_995..200_000),
        ("bytes=-999999", 0..200_000),
        ("bytes=5-999999", 5..200_000),
        ("BYTES=1-2", 1..3),
    ] {
        let answer = download(&device, &id).header("range", range).send().await.expect(206);
        let content_range = format!("bytes {}-{}/200000", expected.start, expected.end - 1);
        assert_eq!(answer.header("content-range"), Some(&*content_range), "{range}");
        assert_eq!(answer.header("content-length"), Some(&*expected.len().to_string()), "{range}");
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"), "{range}");
        assert_eq!(answer.header("accept-ranges"), Some("bytes"), "{range}");
        assert_eq!(answer.header("etag"), Some(&*format!("\"{id}\"")), "{range}");
        assert!(answer.body == bytes[expected], "{range}");
    }
    for range in ["bytes=0-1,4-5", "items=0-1", "bytes=5-2", "bytes=x-y", "bytes", "bytes=-"] {
        let answer = download(&device, &id).header("range", range).send().await.expect(200);
        assert_eq!(answer.header("content-range"), None, "{range}");
        assert!(answer.body == bytes, "{range}");
    }
    for range in ["bytes=200000-", "bytes=200000-200001", "bytes=-0"] {
        let answer = download(&device, &id).header("range", range).send().await.expect(416);
        assert_eq!(answer.header("content-range"), Some("bytes */200000"), "{range}");
    }
}

#[tokio::test]
async fn a_range_of_another_version_is_ignored() {
    let server = TestServer::start().await;
    let device = server.account().await;
    let id = put(&device, b"0123456789").await;
    for (version, status) in [(format!("\"{id}\""), 206), ("\"other\"".into(), 200), (format!("W/\"{id}\""), 200)] {
        let request = download(&device, &id).header("range", "bytes=0-3").header("if-range", &version);
        request.send().await.expect(status);
    }
}

#[tokio::test]
async fn a_version_that_the_client_has_is_not_sent_again() {
    let server = TestServer::start().await;
    let device = server.account().await;
    let id = put(&device, b"0123456789").await;
    for (known, status) in [
        (format!("\"{id}\""), 304),
        (id.clone(), 304),
        (format!("W/\"{id}\""), 304),
        (format!("\"other\", W/\"x\",\"{id}\""), 304),
        ("*".into(), 304),
        ("\"other\"".into(), 200),
        (format!("\"{}\"", id.to_uppercase()), 200),
        ("\"*\"".into(), 200),
    ] {
        // A condition is looked at before a range, even one that can't be satisfied.
        let answer = download(&device, &id).header("if-none-match", &known).send().await.expect(status);
        let with_range = download(&device, &id).header("if-none-match", &known).header("range", "bytes=99-");
        with_range.send().await.expect(if status == 304 { 304 } else { 416 });
        assert_eq!(answer.header("etag"), Some(&*format!("\"{id}\"")), "{known}");
        assert_eq!(answer.body.is_empty(), status == 304, "{known}");
    }
    for unknown in ["00000000-0000-4000-8000-000000000000", &uuid::Uuid::new_v4().to_string()] {
        download(&device, unknown).header("if-none-match", format!("\"{unknown}\"")).send().await.expect(404);
        download(&device, unknown).header("if-none-match", "*").send().await.expect(404);
    }
}

#[tokio::test]
async fn an_attachment_is_gone_from_the_announced_second_on() {
    let server = TestServer::start_with(|config| config.retention = 2 * DAY).await;
    let device = server.account().await;
    let id = put(&device, b"abc").await;
    server.clock.advance(2 * DAY - Duration::from_mins(5));
    let device = device.log_in().await;
    download(&device, &id).send().await.expect(200);
    server.clock.advance(Duration::from_mins(5));
    for request in [
        download(&device, &id),
        download(&device, &id).header("range", "bytes=0-0"),
        download(&device, &id).header("if-none-match", format!("\"{id}\"")),
    ] {
        request.send().await.expect(404);
    }
    assert_eq!(stored(&server).await.len(), 1, "served no more, though still there");
}

#[tokio::test]
async fn the_sweep_removes_what_has_expired_and_passes_over_what_it_can_not_remove() {
    let server = TestServer::start_embedded_with(|config| {
        config.attachments.cleanup_interval = Duration::from_secs(1);
        config.attachments.cleanup_batch_size = 2;
    })
    .await;
    let device = server.account().await;
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(put(&device, b"abc").await);
    }
    // A folder in a file's place can't be deleted as a file. It stands for any trouble with one object.
    let folder = server.config().attachments.folder().unwrap().join(&server.config().attachments.prefix);
    let stuck = folder.join(&ids[0]);
    fs::remove_file(&stuck).unwrap();
    fs::create_dir(&stuck).unwrap();
    server.clock.advance(15 * DAY);
    let device = device.log_in().await;
    let young = put(&device, b"abc").await;
    server.clock.advance(15 * DAY);

    let database = server.database().await;
    let rows = async || database.number("SELECT count(*) FROM attachments").await;
    eventually("the others to go", async || rows().await == 2 && stored(&server).await.len() == 2).await;
    let device = device.log_in().await;
    download(&device, &young).send().await.expect(200);
    download(&device, &ids[0]).send().await.expect(404);
    fs::remove_dir(stuck).unwrap();
    eventually("the last one to go", async || rows().await == 1).await;
}

#[tokio::test]
async fn an_account_has_a_quota_of_its_own() {
    let server = TestServer::start_with(|config| config.attachments.quota_bytes = 10_000).await;
    let (device, other) = (server.account().await, server.account().await);
    put(&device, &[7; 5_500]).await;
    let refused: Response = upload(&device, vec![7; 4_501]).send().await.expect(413);
    assert!(!refused.error().is_empty());
    let linked = device.link().await;
    upload(&linked, vec![7; 4_501]).send().await.expect(413);
    put(&other, &[7; 10_000]).await;
    put(&linked, &[7; 4_500]).await;
    upload(&device, "a").send().await.expect(413);
    // What had come in of the refused ones goes behind the answer.
    eventually("only the accepted ones to be there", async || stored(&server).await.len() == 3).await;
}
