//! The first look at a bucket, and the readiness check.

use crate::harness::{Fate, S3Process, S3Proxy, eventually, within_time};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use super::*;

/// The one sentence that opening with these options fails with.
async fn refusal(settings: &config::Attachments) -> String {
    let told = within("an answer", Blobs::open(settings)).await.expect_err("it can't be opened").to_string();
    assert!(!told.contains('\n'), "{told}");
    told
}

#[tokio::test]
async fn a_missing_bucket_is_told_with_its_name_its_place_and_the_way_out() {
    let bucket = S3::shared().await.missing_bucket();
    let told = refusal(&settings(&bucket)).await;
    for part in [&*bucket.name, &*bucket.service.endpoint, "--storage-create-bucket"] {
        assert!(told.contains(part), "{told}");
    }
    assert!(!bucket.exists().await);
}

#[tokio::test]
async fn a_bucket_is_made_on_request_and_one_that_is_there_is_fine() {
    let bucket = S3::shared().await.missing_bucket();
    let mut settings = settings(&bucket);
    settings.create_bucket = true;
    for region in ["us-east-1", "eu-west-1"] {
        settings.region = region.to_owned();
        let blobs = within("the storage to open", Blobs::open(&settings)).await.unwrap();
        put(&blobs, &pattern(3)).await;
    }
    assert_eq!(bucket.objects().await.len(), 2);
    let other = S3::shared().await.missing_bucket();
    settings.bucket = other.name.clone();
    within("the storage to open", Blobs::open(&settings)).await.unwrap();
    assert!(other.exists().await, "also in a region that has to be named");
}

#[tokio::test]
async fn several_nodes_may_make_the_same_bucket_at_once() {
    let bucket = S3::shared().await.missing_bucket();
    let mut settings = settings(&bucket);
    settings.create_bucket = true;
    let opening = futures_util::future::join_all((0..8).map(|_| Blobs::open(&settings)));
    let opened = within_time(Duration::from_secs(60), "the storages to open", opening).await;
    assert!(opened.iter().all(Result::is_ok), "{opened:?}");
}

#[tokio::test]
async fn a_bucket_that_is_seen_late_after_it_was_made_is_waited_for() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let creations = AtomicUsize::new(0);
    proxy.rule(move |method, _| match method {
        "PUT" => {
            creations.fetch_add(1, Relaxed);
            Fate::Answer(200)
        }
        _ if creations.load(Relaxed) < 6 => Fate::Answer(404),
        _ => Fate::Pass,
    });
    let mut settings = settings(&bucket.at(&proxy.endpoint));
    settings.create_bucket = true;
    within_time(Duration::from_secs(30), "the storage to open", Blobs::open(&settings)).await.unwrap();
    assert_eq!(proxy.count("PUT"), 6);
}

#[tokio::test]
async fn wrong_keys_are_told_and_not_repeated() {
    let bucket = S3::shared().await.bucket().await;
    for (access_key, secret_key) in
        [("nobody", &*bucket.service.secret_key), (&*bucket.service.access_key, "wrong-secret")]
    {
        let mut settings = settings(&bucket);
        settings.access_key = Some(config::Secret::new(access_key));
        settings.secret_key = Some(config::Secret::new(secret_key));
        let told = refusal(&settings).await;
        assert!(told.contains("--storage-access-key") && told.contains("403"), "{told}");
        assert!(!told.contains(secret_key), "{told}");
    }
}

#[tokio::test]
async fn what_may_not_be_used_and_what_is_no_s3_is_told() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let settings = settings(&bucket.at(&proxy.endpoint));
    for (status, part) in [(403, "refuses these credentials"), (301, "--storage-region"), (400, "--storage-endpoint")] {
        proxy.rule(move |_, _| Fate::Answer(status));
        let told = refusal(&settings).await;
        assert!(told.contains(part), "{told}");
    }
}

#[tokio::test]
async fn a_service_that_is_away_is_waited_for() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    proxy.rule(|_, _| Fate::Answer(503));
    let settings = settings(&bucket.at(&proxy.endpoint));
    let opening = tokio::spawn(async move { Blobs::open(&settings).await });
    eventually("some looks", async || proxy.count("GET") >= 3).await;
    assert!(!opening.is_finished());
    proxy.rule(|_, _| Fate::Pass);
    within_time(Duration::from_secs(20), "the storage to open", opening).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_service_that_starts_later_than_the_server_is_waited_for_and_seen_to_go() {
    let mut process = S3Process::prepare();
    let mut settings = settings(&process.service.missing_bucket());
    settings.create_bucket = true;
    let opening = tokio::spawn(async move { Blobs::open(&settings).await });
    tokio::task::yield_now().await;
    process.launch().await;
    let blobs = within_time(Duration::from_secs(30), "the storage to open", opening).await.unwrap().unwrap();
    let id = put(&blobs, &pattern(3)).await;

    process.kill();
    blobs.check().await.unwrap_err();
    blobs.read(id, None).await.err().expect("it can't be read");
    assert_eq!(blobs.discard(&[id]).await.failed.unwrap().0, 1);
    assert_eq!(blobs.delete(&[id, AttachmentId::random()]).await.failed.unwrap().0, 2);
    process.launch().await;
    eventually("the storage to be there again", async || {
        blobs.check().await.is_ok() && matches!(get(&blobs, id, None).await, Ok(Some(bytes)) if bytes == pattern(3))
    })
    .await;
}

#[tokio::test]
async fn the_check_is_one_request_and_fails_without_the_bucket() {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let blobs = open(&bucket.at(&proxy.endpoint)).await;
    let before = proxy.seen().len();
    blobs.check().await.unwrap();
    assert_eq!(proxy.seen().len(), before + 1);
    for status in [403, 404, 503] {
        proxy.rule(move |_, _| Fate::Answer(status));
        let told = blobs.check().await.unwrap_err().to_string();
        assert!(told.contains(&status.to_string()), "{told}");
    }
}
