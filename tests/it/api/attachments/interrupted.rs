//! Uploads that do not come to an end, and many at the same time: nothing stays behind, and memory stays small.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;
use obscura_server::model::ids::AttachmentId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{download, nothing_is_left, put, rows, stored, upload};
use crate::harness::{Binary, Database, Device, TestServer, deployment, eventually, raw_answer, within};
use crate::metrics::page::{came_and_went, connections};

/// Waits until so many uploads are pending and so many files there. An upload has none before a part of it has come in.
async fn under_way(server: &TestServer, pending: i64, files: i64) {
    let database = server.database().await;
    eventually("the uploads to be under way", async || {
        let now = database.number("SELECT count(*) FROM attachments WHERE stored = 0").await;
        // A bucket has nothing to show yet.
        let is_in_bucket = server.config().attachments.folder().is_none();
        now == pending && (is_in_bucket || stored(server).await.len() as i64 == files)
    })
    .await;
}

#[tokio::test]
async fn an_upload_cut_in_the_middle_leaves_nothing() {
    let server = TestServer::start().await;
    let device = server.account().await;
    for (sent, files) in [(0, 0), (1, 0), (400_000, 1), (999_999, 1)] {
        let connection = device.begin_upload(1_000_000, sent).await;
        under_way(&server, 1, files).await;
        drop(connection);
        nothing_is_left(&server).await;
    }
}

#[tokio::test]
async fn an_upload_whose_client_stops_sending_times_out_and_leaves_nothing() {
    let server = TestServer::start_with(|config| config.attachments.timeout = Duration::from_millis(300)).await;
    let device = server.account().await;
    let mut connection = device.begin_upload(1_000_000, 400_000).await;
    let mut answer = [0; 12];
    within("an answer", connection.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    // The connection is still open, so this is not because of its end.
    nothing_is_left(&server).await;
}

#[tokio::test]
async fn a_broken_upload_gives_its_room_in_the_quota_back() {
    let server = TestServer::start_with(|config| config.attachments.quota_bytes = 1_000_000).await;
    let device = server.account().await;
    let connection = device.begin_upload(1_000_000, 10).await;
    under_way(&server, 1, 0).await;
    upload(&device, "abc").send().await.expect(413);
    drop(connection);
    nothing_is_left(&server).await;
    put(&device, b"abc").await;
}

#[tokio::test]
async fn an_upload_that_is_refused_while_its_bytes_come_in_leaves_nothing() {
    let server = TestServer::start_with(|config| config.attachments.quota_bytes = 999_999).await;
    let device = server.account().await;
    for sent in [0, 400_000, 1_000_000] {
        let mut connection = device.begin_upload(1_000_000, sent).await;
        let mut answer = [0; 12];
        within("an answer", connection.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413");
        nothing_is_left(&server).await;
    }
}

#[tokio::test]
async fn whenever_a_client_hangs_up_there_is_a_whole_attachment_or_none() {
    let server = TestServer::start().await;
    let device = server.account().await;
    // All of them have room in the share of one account, so none waits while its client hangs up.
    let size = 150_000;
    let before = connections(&server).await;
    let attempts = (0..60usize).map(|attempt| {
        let device = &device;
        async move {
            // Some are cut in the body, the others at any moment behind it.
            let sent = if attempt % 3 == 0 { size * attempt / 60 } else { size };
            let mut connection = device.begin_upload(size, sent).await;
            if attempt % 2 == 0 {
                let mut answer = [0; 1];
                let _ = tokio::time::timeout(Duration::from_micros(attempt as u64 * 300), connection.read(&mut answer))
                    .await;
            }
        }
    });
    join_all(attempts).await;
    let database = server.database().await;
    let count =
        async |stored: i64| database.number(&format!("SELECT count(*) FROM attachments WHERE stored = {stored}")).await;
    eventually("no upload to be under way", async || count(0).await == 0).await;
    came_and_went(&server, 60, before).await;
    let is_whole = async |name: String| {
        let answer = download(&device, &name).send().await;
        answer.status == 200 && answer.body.len() == size
    };
    // One whose client has hung up may still be there for a moment before it goes.
    eventually("nothing to be under way, and whatever is there to be whole", async || {
        count(0).await == 0
            && count(2).await == 0
            && stored(&server).await.len() as i64 == count(1).await
            && join_all(stored(&server).await.into_iter().map(is_whole)).await.iter().all(|is_whole| *is_whole)
    })
    .await;
}

#[tokio::test]
async fn what_a_killed_server_left_is_removed_when_it_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let objects = folder.path().join("attachments").join("attachments");
    let names = || std::fs::read_dir(&objects).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let device = Device::register(&server.client()).await;
    let kept = put(&device, b"abc").await;
    let _connections = [device.begin_upload(1_000_000, 400_000).await, device.begin_upload(1_000_000, 300_000).await];
    eventually("the uploads to be under way", async || names().len() == 3).await;
    server.kill();
    assert_eq!(names().len(), 3);

    let _server = server.start_again(&[]).await;
    assert_eq!(names(), [&*kept]);
    let database = Database::of_embedded(folder.path()).await;
    assert_eq!(database.number("SELECT count(*) FROM attachments").await, 1);
    assert_eq!(&download(&device, &kept).send().await.expect(200).body[..], b"abc");
}

/// Ten minutes pass, in which every sweep looks at it: the one of a slow phone must not be taken for a broken one.
#[tokio::test]
async fn an_upload_that_lasts_long_is_not_taken_for_one_that_was_broken_off() {
    const SIZE: usize = 6 << 20;
    let server = TestServer::start_with(|config| config.attachments.cleanup_interval = Duration::from_secs(1)).await;
    let device = server.account().await;
    let mut slow = device.begin_upload(SIZE, SIZE / 2).await;
    under_way(&server, 1, 1).await;
    // One that a node left behind when it ended, from the same second.
    let database = server.database().await;
    let left = AttachmentId::random().to_string().parse().unwrap();
    let insert = format!(
        "INSERT INTO attachments (id, user_id, size, stored, created_at)
         SELECT {}, user_id, 1, 0, created_at FROM attachments",
        database.literal(left)
    );
    database.execute(&insert).await;
    server.clock.advance(Duration::from_mins(10));
    let given_up = format!("SELECT count(*) FROM attachments WHERE id = {}", database.literal(left));
    eventually("a sweep", async || database.number(&given_up).await == 0).await;
    slow.write_all(&vec![7; SIZE - SIZE / 2]).await.unwrap();
    let answer = raw_answer(&mut slow, b"").await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    assert_eq!(rows(&server).await, 1);
}

#[tokio::test]
async fn a_graceful_restart_in_the_middle_of_an_upload_leaves_nothing() {
    let mut server = TestServer::start_with(|config| {
        config.server.shutdown_timeout = Duration::from_millis(500);
        config.attachments.cleanup_interval = Duration::from_secs(1);
    })
    .await;
    let device = server.account().await;
    let kept = put(&device, b"abc").await;
    let _connection = device.begin_upload(1_000_000, 400_000).await;
    under_way(&server, 1, 2).await;
    server.restart().await;
    // A node of several can't tell its own uploads from those of others, and waits until none can be under way.
    server.clock.advance(Duration::from_mins(8));
    eventually("the upload to go", async || rows(&server).await == 1 && stored(&server).await.len() == 1).await;
    download(&device, &kept).send().await.expect(200);
}

#[tokio::test]
async fn sixteen_uploads_and_downloads_at_once_need_little_memory() {
    const SIZE: usize = 8 << 20;
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    let device = Device::register(&server.client()).await;
    // Forgets the peak that hashing a password has left.
    server.forget_peak();
    let before = server.resident_bytes();
    let all_started = tokio::sync::Barrier::new(16);
    let chunk = Bytes::from(vec![7; 64 << 10]);

    let uploads = (0..16).map(|_| {
        let (first, rest) = (chunk.clone(), chunk.clone());
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
        let body = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        let request = upload(&device, reqwest::Body::wrap_stream(body)).header("content-length", SIZE.to_string());
        let (all_started, device) = (&all_started, &device);
        async move {
            let feed = async {
                sender.send(Ok(first)).await.unwrap();
                all_started.wait().await; // all are under way before any goes on
                for _ in 1..SIZE / rest.len() {
                    sender.send(Ok(rest.clone())).await.unwrap();
                }
                drop(sender);
            };
            let (answer, ()) = tokio::join!(request.send(), feed);
            let id = answer.expect(201).json()["id"].as_str().unwrap().to_owned();
            assert_eq!(download(device, &id).send().await.expect(200).body.len(), SIZE);
        }
    });
    join_all(uploads).await;
    let growth = server.peak_bytes() - before;
    // Parts for a bucket take 64 MiB together, and some more on their way out.
    let limit = if deployment::is_distributed() { 128 << 20 } else { 48 << 20 };
    assert!(growth < limit, "128 MiB went up and down again through {} KiB of memory", growth >> 10);
    println!("128 MiB went up and down again through {} KiB of memory", growth >> 10);
}
