//! A whole server that keeps its attachments in a bucket, the database with it or not.

use std::time::Duration;

use futures_util::future::join_all;

use crate::harness::{Binary, Database, Device, Fate, Response, S3Proxy, TestServer, eventually};

use super::*;
use crate::metrics::page::{came_and_went, connections};

const DAY: Duration = Duration::from_hours(24);

/// A server on a bucket of its own, behind a proxy.
async fn server_with(change: impl FnOnce(&mut Config)) -> (TestServer, Bucket, S3Proxy) {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let behind = bucket.at(&proxy.endpoint);
    let server = TestServer::start_with(|config| {
        behind.configure(&mut config.attachments);
        change(config);
    })
    .await;
    (server, bucket, proxy)
}

async fn upload(device: &Device, bytes: &Bytes) -> Response {
    device.request("POST", "/v1/attachments").body(bytes.clone()).send().await
}

async fn download(device: &Device, id: &str) -> Response {
    device.request("GET", &format!("/v1/attachments/{id}")).send().await
}

async fn uploaded(device: &Device, bytes: &Bytes) -> String {
    upload(device, bytes).await.expect(201).json()["id"].as_str().unwrap().to_owned()
}

async fn rows(server: &TestServer) -> i64 {
    server.database().await.number("SELECT count(*) FROM attachments").await
}

async fn nothing_is_left(server: &TestServer, bucket: &Bucket) {
    eventually("rows and objects to go", async || rows(server).await == 0 && bucket.is_empty().await).await;
}

#[tokio::test]
async fn an_attachment_in_a_bucket_is_served_whole_and_in_part() {
    let (server, bucket, _proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    let bytes = pattern(PART + 1000);
    let id = uploaded(&device, &bytes).await;
    assert_eq!(bucket.objects().await, [format!("{}{id}", server.config().attachments.prefix)]);
    assert!(download(&device, &id).await.expect(200).body == bytes);
    let part = device.request("GET", &format!("/v1/attachments/{id}")).header("range", "bytes=5242870-5242889");
    let part = part.send().await.expect(206);
    assert_eq!(part.header("content-range"), Some("bytes 5242870-5242889/5243880"));
    assert!(part.body == bytes[5_242_870..5_242_890]);
    assert!(bucket.uploads().await.is_empty());
}

#[tokio::test]
async fn a_part_of_an_attachment_in_a_bucket_that_knows_no_ranges_is_the_whole() {
    const BYTES: &[u8] = b"the whole attachment, whatever was asked for";
    let (server, _bucket, proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    let id = uploaded(&device, &Bytes::from_static(BYTES)).await;
    proxy.rule(|method, _| if method == "GET" { Fate::Whole(BYTES) } else { Fate::Pass });
    for range in ["bytes=4-8", "bytes=0-0", "bytes=-5", "bytes=10-"] {
        let request = device.request("GET", &format!("/v1/attachments/{id}")).header("range", range);
        let answer = request.send().await.expect(200);
        assert_eq!(answer.header("content-range"), None, "{range}");
        assert_eq!(answer.body, BYTES, "{range}");
    }
}

#[tokio::test]
async fn an_upload_cut_anywhere_leaves_no_object_no_parts_and_no_row() {
    let (server, bucket, _proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    for (announced, sent) in [(1000, 10), (2 * PART, 0), (2 * PART, PART + 1000), (2 * PART, 2 * PART - 1)] {
        let connection = device.begin_upload(announced, sent).await;
        // Before the first byte the service is asked for nothing.
        let is_cut = announced > PART && sent > 0;
        eventually("the upload to be under way", async || {
            rows(&server).await == 1 && bucket.uploads().await.len() == usize::from(is_cut)
        })
        .await;
        drop(connection);
        nothing_is_left(&server, &bucket).await;
    }
}

#[tokio::test]
async fn whenever_a_client_hangs_up_there_is_a_whole_attachment_or_none() {
    let (server, bucket, _proxy) = server_with(|config| {
        config.attachments.cleanup_interval = Duration::from_secs(1);
        config.attachments.timeout = Duration::from_secs(60);
    })
    .await;
    let device = server.account().await;
    let size = PART + 100;
    let before = connections(&server).await;
    join_all((0..24u64).map(|attempt| {
        let device = &device;
        async move {
            let mut connection = device.begin_upload(size, if attempt % 3 == 0 { size / 2 } else { size }).await;
            let mut answer = [0; 1];
            let wait = Duration::from_millis(attempt * 10);
            let _ = tokio::time::timeout(wait, tokio::io::AsyncReadExt::read(&mut connection, &mut answer)).await;
        }
    }))
    .await;
    came_and_went(&server, 24, before).await;
    // What a busy service did not answer for waits for the sweep.
    server.clock.advance(Duration::from_mins(15));
    let database = server.database().await;
    let count = async |which: &str| database.number(&format!("SELECT count(*) FROM attachments {which}")).await;
    let is_whole = async |object: String| {
        let answer = download(&device, object.rsplit('/').next().expect("the last part of its name")).await;
        answer.status == 200 && answer.body.len() == size
    };
    // One whose client has hung up may still be there for a moment before it goes.
    eventually("nothing to be under way, and whatever is there to be whole", async || {
        count("WHERE stored <> 1").await == 0
            && bucket.uploads().await.is_empty()
            && bucket.objects().await.len() as i64 == count("").await
            && join_all(bucket.objects().await.into_iter().map(is_whole)).await.iter().all(|is_whole| *is_whole)
    })
    .await;
}

#[tokio::test]
async fn refused_writes_are_answered_503_or_507_and_leave_nothing() {
    let (server, bucket, proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    let kept = uploaded(&device, &pattern(10)).await;
    for (status, expected) in [(403, 503), (503, 503), (500, 503), (507, 507)] {
        for size in [10, PART + 1] {
            proxy.rule(move |method, _| if method == "PUT" { Fate::Answer(status) } else { Fate::Pass });
            let answer = upload(&device, &pattern(size)).await.expect(expected);
            assert_eq!(answer.header("retry-after").is_some(), expected == 503);
            assert_eq!(download(&device, &kept).await.expect(200).body, pattern(10));
            let pending = i64::from(status == 500); // might have been done all the same, so a sweep looks later
            let database = server.database().await;
            eventually("the row to go", async || {
                database.number("SELECT count(*) FROM attachments WHERE stored = 0").await == pending
                    && bucket.objects().await.len() == 1
                    && bucket.uploads().await.is_empty()
            })
            .await;
            database.execute("DELETE FROM attachments WHERE stored = 0").await;
        }
    }
    proxy.rule(|_, _| Fate::Pass);
    uploaded(&device, &pattern(PART + 1)).await;
}

#[tokio::test]
async fn an_upload_without_an_answer_is_looked_after_by_the_sweep() {
    let (server, bucket, proxy) = server_with(|config| {
        config.attachments.cleanup_interval = Duration::from_secs(1);
        config.attachments.timeout = Duration::from_secs(2);
    })
    .await;
    let device = server.account().await;
    // The answer to the part is cut, though the service has it.
    proxy.rule(|method, _| if method == "PUT" { Fate::CutAnswer(0) } else { Fate::Pass });
    device.request("POST", "/v1/attachments").body(pattern(PART + 1)).send().await.expect(503);
    assert_eq!(rows(&server).await, 1);
    proxy.rule(|_, _| Fate::Pass);
    server.clock.advance(Duration::from_mins(13));
    nothing_is_left(&server, &bucket).await;
}

#[tokio::test]
async fn refused_deletions_keep_the_rows_do_not_spin_and_are_made_up_for() {
    let (server, bucket, proxy) = server_with(|config| {
        config.attachments.cleanup_interval = Duration::from_secs(1);
        config.attachments.cleanup_batch_size = 2;
    })
    .await;
    let device = server.account().await;
    for _ in 0..5 {
        uploaded(&device, &pattern(10)).await;
    }
    proxy.rule(|method, target| {
        let is_deletion = method == "DELETE" || target.ends_with("?delete");
        if is_deletion { Fate::Answer(403) } else { Fate::Pass }
    });
    server.clock.advance(31 * DAY);
    eventually("deletions to be tried", async || proxy.count("POST") >= 1).await;
    let (before, began) = (proxy.count("POST"), std::time::Instant::now());
    eventually("further rounds", async || proxy.count("POST") >= before + 4).await;
    // Each round is one request here, and comes a second after the one before.
    assert!(began.elapsed() > Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!((rows(&server).await, bucket.objects().await.len()), (5, 5));
    proxy.rule(|_, _| Fate::Pass);
    nothing_is_left(&server, &bucket).await;
}

#[tokio::test]
async fn an_expired_upload_that_was_never_finished_goes_with_its_parts() {
    let (server, bucket, _proxy) =
        server_with(|config| config.attachments.cleanup_interval = Duration::from_secs(1)).await;
    let device = server.account().await;
    let id = AttachmentId::random();
    uploaded(&device, &pattern(10)).await;
    bucket.begin_upload(&format!("{}{id}", server.config().attachments.prefix)).await;
    let database = server.database().await;
    let insert = format!(
        "INSERT INTO attachments (id, user_id, size, stored, created_at)
         SELECT {}, user_id, 1, 0, created_at FROM attachments",
        database.literal(id.to_string().parse().unwrap())
    );
    database.execute(&insert).await;
    server.clock.advance(31 * DAY);
    nothing_is_left(&server, &bucket).await;
}

#[tokio::test]
async fn readiness_follows_the_storage() {
    let (server, _bucket, proxy) =
        server_with(|config| config.health.storage_timeout = Duration::from_millis(500)).await;
    let ready = async || server.management().get("/readyz").send().await;
    ready().await.expect(200);
    for fate in [Fate::Answer(503), Fate::Answer(403), Fate::Stall] {
        proxy.rule(move |_, _| fate);
        let answer = ready().await.expect(503).json();
        assert_eq!((&answer["storage"], &answer["database"]), (&"error".into(), &"ok".into()));
    }
    proxy.rule(|_, _| Fate::Pass);
    ready().await.expect(200);
}

#[tokio::test]
async fn a_vanished_bucket_is_an_outage_and_not_a_missing_attachment() {
    let (server, bucket, proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    let id = uploaded(&device, &pattern(10)).await;
    proxy.rule(|_, _| Fate::Answer(503));
    let answer = download(&device, &id).await.expect(503);
    assert!(answer.header("retry-after").is_some());
    proxy.rule(|_, _| Fate::Pass);
    bucket.destroy().await;
    download(&device, &id).await.expect(503);
}

/// The program on a database of its own and a bucket.
async fn binary(folder: &Path, bucket: &Bucket) -> (Binary, Vec<String>) {
    let options = bucket.options();
    (Binary::start_embedded(folder, &options.iter().map(String::as_str).collect::<Vec<_>>()).await, options)
}

#[tokio::test]
async fn what_a_killed_server_left_in_a_bucket_is_removed_when_it_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = S3::shared().await.bucket().await;
    let (mut server, options) = binary(folder.path(), &bucket).await;
    let device = Device::register(&server.client()).await;
    let kept = uploaded(&device, &pattern(PART + 1)).await;
    let _connections = [device.begin_upload(3 * PART, PART + 1000).await, device.begin_upload(1000, 10).await];
    let _other = device.begin_upload(2 * PART, 10).await;
    let database = Database::of_embedded(folder.path()).await;
    eventually("the uploads to be under way", async || {
        bucket.uploads().await.len() == 2 && database.number("SELECT count(*) FROM attachments").await == 4
    })
    .await;
    server.kill();
    assert_eq!(bucket.uploads().await.len(), 2);

    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let _server = server.start_again(&options).await;
    assert!(bucket.uploads().await.is_empty());
    assert_eq!(bucket.objects().await, [format!("attachments/{kept}")]);
    assert_eq!(database.number("SELECT count(*) FROM attachments").await, 1);
    assert!(download(&device, &kept).await.expect(200).body == pattern(PART + 1));
}

#[tokio::test]
async fn logs_about_a_failing_storage_name_no_attachment_and_no_key() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let (server, _) = binary(folder.path(), &bucket.at(&proxy.endpoint)).await;
    let device = Device::register(&server.client()).await;
    let id = uploaded(&device, &pattern(10)).await;
    for fate in [Fate::Answer(503), Fate::Answer(403), Fate::CutAnswer(0), Fate::CutAnswer(20)] {
        proxy.rule(move |_, _| fate);
        for size in [10, PART + 1] {
            upload(&device, &pattern(size)).await.expect(503);
        }
        download(&device, &id).await.expect(503);
    }
    let output = server.output();
    assert!(output.contains("the attachment storage failed"), "{output}");
    for secret in [&*id, "attachments/", &*bucket.service.access_key, &*bucket.service.secret_key] {
        assert!(!output.contains(secret), "{secret} is in the log:\n{output}");
    }
}

#[tokio::test]
async fn without_keys_among_the_options_the_surroundings_are_asked() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = S3::shared().await.bucket().await;
    let options: Vec<_> = bucket.options().into_iter().filter(|option| !option.contains("-key=")).collect();
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let variables = [
        ("AWS_ACCESS_KEY_ID", &*bucket.service.access_key),
        ("AWS_SECRET_ACCESS_KEY", &*bucket.service.secret_key),
        // The address and the region are ours to say.
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1"),
        ("AWS_REGION", "elsewhere"),
    ];
    let server = Binary::start_with(folder.path(), &options, &variables).await;
    let device = Device::register(&server.client()).await;
    let id = uploaded(&device, &pattern(PART + 1)).await;
    assert!(download(&device, &id).await.expect(200).body == pattern(PART + 1));
    assert_eq!(bucket.objects().await.len(), 1);
}

#[tokio::test]
async fn a_server_without_its_bucket_ends_with_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = S3::shared().await.missing_bucket();
    let mut options = bucket.options();
    options.push(format!("--data-dir={}", folder.path().display()));
    options.extend(["--server-port=0".to_owned(), "--mgmt-port=0".to_owned()]);
    let finished = Binary::run(&options.iter().map(String::as_str).collect::<Vec<_>>(), &[]).await;
    assert!(!finished.status.success());
    let told = finished.output.lines().last().unwrap();
    assert!(told.starts_with("obscura-server: ") && told.contains("--storage-create-bucket"), "{told}");
    assert!(!finished.output.contains(&bucket.service.secret_key));
}

#[tokio::test]
async fn large_attachments_go_through_little_memory() {
    const SIZE: usize = 50 << 20;
    let folder = tempfile::tempdir().unwrap();
    let bucket = S3::shared().await.bucket().await;
    let (server, _) = binary(folder.path(), &bucket).await;
    let device = Device::register(&server.client()).await;
    let bytes = pattern(SIZE);
    // Forgets the peak that hashing a password has left.
    server.forget_peak();
    let before = server.resident_bytes();
    let transfers = join_all((0..4).map(|_| async {
        let id = uploaded(&device, &bytes).await;
        assert!(download(&device, &id).await.expect(200).body == bytes);
    }));
    crate::harness::within_time(Duration::from_secs(180), "the transfers", transfers).await;
    let growth = server.peak_bytes() - before;
    let said = format!("4 times 50 MiB went up and down through {} KiB of memory", growth >> 10);
    println!("{said}");
    assert!(growth < 64 << 20, "{said}");
}

/// Eight once held all of the memory for parts, whether of one account that stops in the middle or of eight slow phones.
#[tokio::test]
async fn eight_slow_uploads_stop_no_others() {
    let (server, bucket, _proxy) = server_with(|_| {}).await;
    let honest = server.account().await;
    let phones = join_all((0..8).map(|_| server.account())).await;
    for slow in [vec![&phones[0]; 8], phones.iter().collect()] {
        let held = join_all(slow.iter().map(|device| device.begin_upload(2 * PART, 1_200_000))).await;
        eventually("the slow uploads to be under way", async || bucket.uploads().await.len() == 8).await;
        let began = std::time::Instant::now();
        for _ in 0..4 {
            uploaded(&honest, &pattern(PART + 1)).await;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "none has waited for its turn: {:?}", began.elapsed());
        drop(held);
        eventually("nothing to be under way", async || bucket.uploads().await.is_empty()).await;
    }
}

#[tokio::test]
async fn when_the_memory_for_parts_of_an_account_is_used_up_its_further_uploads_are_sent_away_for_a_moment() {
    let (server, bucket, _proxy) = server_with(|_| {}).await;
    let device = server.account().await;
    let (small, large) = (pattern(200_000), pattern(3_000_000));
    uploaded(&device, &large).await;
    // All that one account may have, each nearly full.
    let held = join_all((0..3).map(|_| device.begin_upload(2 * PART, PART - 1000))).await;
    crate::harness::within_time(Duration::from_secs(120), "a further upload to be refused", async {
        loop {
            let answer = upload(&device, &large).await;
            if answer.status == 503 {
                assert!(answer.header("retry-after").is_some());
                break;
            }
        }
    })
    .await;
    uploaded(&device, &small).await;
    drop(held);
    eventually("room to be there again", async || upload(&device, &large).await.status == 201).await;
    eventually("nothing to be under way", async || bucket.uploads().await.is_empty()).await;
}
