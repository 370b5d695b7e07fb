//! A storage service that refuses, cuts off or does not answer: errors that say so, nothing left, nothing spinning.

use std::time::{Duration, Instant};

use obscura_server::blobs::UploadError;

use crate::harness::{Fate, S3Proxy, eventually, within_time};

use super::*;

/// A storage whose service can be disturbed.
async fn disturbed() -> (Bucket, S3Proxy, Blobs) {
    let bucket = S3::shared().await.bucket().await;
    let proxy = S3Proxy::start(&bucket.service.endpoint).await;
    let blobs = open(&bucket.at(&proxy.endpoint)).await;
    (bucket, proxy, blobs)
}

fn storage_error(error: UploadError) -> BlobError {
    match error {
        UploadError::Storage(error) => error,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_small_body_is_one_request_and_a_large_one_goes_up_in_parts() {
    let (_bucket, proxy, blobs) = disturbed().await;
    put(&blobs, &pattern(PART)).await;
    assert_eq!((proxy.count("PUT"), proxy.count("POST")), (1, 0));
    put(&blobs, &pattern(2 * PART + 1)).await;
    assert_eq!((proxy.count("PUT"), proxy.count("POST")), (4, 2));
}

#[tokio::test]
async fn many_complete_attachments_are_deleted_with_one_request() {
    let (bucket, proxy, blobs) = disturbed().await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(put(&blobs, &pattern(10)).await);
    }
    let before = proxy.seen().len();
    assert_eq!(blobs.delete(&ids).await.gone.len(), 20);
    assert_eq!(proxy.seen().len(), before + 1);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn a_service_that_deletes_only_one_by_one_is_understood() {
    let (bucket, proxy, blobs) = disturbed().await;
    let ids = [put(&blobs, &pattern(10)).await, put(&blobs, &pattern(11)).await];
    proxy.rule(
        |method, target| if method == "POST" && target.ends_with("?delete") { Fate::Answer(501) } else { Fate::Pass },
    );
    assert_eq!(blobs.delete(&ids).await.gone, ids);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn refused_writes_are_told_with_what_the_service_said() {
    let (bucket, proxy, blobs) = disturbed().await;
    for (status, is_full) in [(403, false), (503, false), (507, true)] {
        for size in [10, PART + 1] {
            proxy.rule(move |method, _| if method == "PUT" { Fate::Answer(status) } else { Fate::Pass });
            let id = AttachmentId::random();
            let error = match blobs.stage(id, size as u64, body(&pattern(size), 1 << 20)).await {
                Ok(staged) => staged.publish().await.unwrap_err(),
                Err(error) => storage_error(error),
            };
            let told = format!("{error} {error:?}");
            assert!(told.contains(&status.to_string()) && !told.contains(&id.to_string()), "{told}");
            assert_eq!(error.is_full(), is_full, "{told}");
            assert!(!error.may_still_happen(), "{told}");
            assert_eq!(blobs.discard(&[id]).await.gone, [id]);
        }
    }
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn refused_deletions_are_counted_and_not_repeated_for_long() {
    let (_bucket, proxy, blobs) = disturbed().await;
    let ids = [put(&blobs, &pattern(10)).await, put(&blobs, &pattern(11)).await];
    for status in [403, 503] {
        proxy.rule(move |method, target| {
            let is_deletion = method == "DELETE" || target.ends_with("?delete");
            if is_deletion { Fate::Answer(status) } else { Fate::Pass }
        });
        let (before, began) = (proxy.seen().len(), Instant::now());
        for deleted in [blobs.delete(&ids).await, blobs.discard(&ids).await] {
            assert!(deleted.gone.is_empty());
            let (count, error) = deleted.failed.unwrap();
            assert_eq!(count, 2);
            assert!(error.to_string().contains(&status.to_string()), "{error}");
        }
        assert!(proxy.seen().len() - before <= 12, "{:?}", &proxy.seen()[before..]);
        assert!(began.elapsed() < Duration::from_secs(15));
    }
    proxy.rule(|_, _| Fate::Pass);
    assert_eq!(blobs.delete(&ids).await.gone.len(), 2);
}

#[tokio::test]
async fn a_refused_listing_of_uploads_keeps_what_may_be_left_in_mind() {
    let (bucket, proxy, blobs) = disturbed().await;
    let id = AttachmentId::random();
    bucket.begin_upload(&format!("attachments/{id}")).await;
    proxy.rule(|method, _| if method == "GET" { Fate::Answer(403) } else { Fate::Pass });
    assert!(blobs.discard(&[id]).await.gone.is_empty());
    proxy.rule(|_, _| Fate::Pass);
    assert_eq!(blobs.discard(&[id]).await.gone, [id]);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn a_write_cut_in_the_middle_is_repeated_and_one_cut_for_ever_is_given_up() {
    let (bucket, proxy, blobs) = disturbed().await;
    let first = std::sync::atomic::AtomicBool::new(true);
    proxy.rule(move |method, _| {
        let is_cut = method == "PUT" && first.swap(false, std::sync::atomic::Ordering::Relaxed);
        if is_cut { Fate::CutRequest(1 << 20) } else { Fate::Pass }
    });
    let bytes = pattern(PART + 10);
    let id = put(&blobs, &bytes).await;
    assert!(get(&blobs, id, None).await.unwrap().unwrap() == bytes);
    blobs.delete(&[id]).await;

    proxy.rule(|method, _| if method == "PUT" { Fate::CutRequest(1000) } else { Fate::Pass });
    let id = AttachmentId::random();
    let staging = blobs.stage(id, bytes.len() as u64, body(&bytes, 1 << 20));
    let error = storage_error(within("the upload to be given up", staging).await.err().unwrap());
    assert!(error.may_still_happen(), "{error}");
    proxy.rule(|_, _| Fate::Pass);
    assert_eq!(blobs.discard(&[id]).await.gone, [id]);
    eventually("nothing to be left", async || bucket.is_empty().await).await;
}

#[tokio::test]
async fn an_upload_whose_beginning_was_not_answered_is_not_begun_twice() {
    let (bucket, proxy, blobs) = disturbed().await;
    let first = std::sync::atomic::AtomicBool::new(true);
    proxy.rule(move |method, _| {
        let is_lost = method == "POST" && first.swap(false, std::sync::atomic::Ordering::Relaxed);
        if is_lost { Fate::CutAnswer(0) } else { Fate::Pass }
    });
    let id = AttachmentId::random();
    let error = storage_error(blobs.stage(id, PART as u64 + 1, body(&pattern(PART + 1), 1 << 20)).await.err().unwrap());
    assert!(error.may_still_happen(), "{error}");
    eventually("the service to begin it", async || bucket.uploads().await.len() == 1).await;
    assert_eq!(proxy.count("POST"), 1);
    assert_eq!(blobs.discard(&[id]).await.gone, [id]);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn a_download_cut_in_the_middle_goes_on_where_it_was() {
    let (_bucket, proxy, blobs) = disturbed().await;
    let bytes = pattern(3 << 20);
    let id = put(&blobs, &bytes).await;
    let first = std::sync::atomic::AtomicBool::new(true);
    proxy.rule(move |_, _| {
        if first.swap(false, std::sync::atomic::Ordering::Relaxed) { Fate::CutAnswer(1 << 20) } else { Fate::Pass }
    });
    assert!(get(&blobs, id, None).await.unwrap().unwrap() == bytes);
}

#[tokio::test]
async fn a_download_that_breaks_off_again_and_again_ends_with_an_error() {
    let (_bucket, proxy, blobs) = disturbed().await;
    let id = put(&blobs, &pattern(3 << 20)).await;
    proxy.rule(|_, _| Fate::CutAnswer(100_000));
    let error = within("the download to end", get(&blobs, id, None)).await.unwrap_err();
    assert!(!error.to_string().contains(&id.to_string()), "{error}");
}

#[tokio::test]
async fn a_service_that_does_not_answer_is_given_up_in_time() {
    let (bucket, proxy, blobs) = disturbed().await;
    let (id, stored) = (AttachmentId::random(), put(&blobs, &pattern(10)).await);
    let staged = blobs.stage(id, 10, body(&pattern(10), 10)).await.unwrap();
    proxy.rule(|_, _| Fate::Stall);
    let (complete, broken) = ([stored], [id]);
    let everything = async {
        tokio::join!(staged.publish(), blobs.read(stored, None), blobs.delete(&complete), blobs.discard(&broken))
    };
    let (published, read, deleted, discarded) =
        within_time(Duration::from_secs(40), "everything to be given up", everything).await;
    assert!(published.unwrap_err().may_still_happen());
    assert!(read.is_err());
    for deleted in [deleted, discarded] {
        assert!(deleted.gone.is_empty() && deleted.failed.is_some());
    }
    proxy.rule(|_, _| Fate::Pass);
    assert_eq!(blobs.discard(&[id, stored]).await.gone.len(), 2);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn a_service_that_does_not_know_ranges_gives_the_whole() {
    const WHOLE: &[u8] = b"0123456789";
    let (_bucket, proxy, blobs) = disturbed().await;
    let id = put(&blobs, &Bytes::from_static(WHOLE)).await;
    proxy.rule(|method, _| if method == "GET" { Fate::Whole(WHOLE) } else { Fate::Pass });
    let read = blobs.read(id, Some(2..5)).await.unwrap().unwrap();
    assert_eq!((read.size, read.range), (10, 0..10));
    assert_eq!(get(&blobs, id, Some(2..5)).await.unwrap().unwrap(), WHOLE);
}
