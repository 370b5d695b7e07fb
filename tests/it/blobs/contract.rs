//! What the rest of the server may count on, in a bucket as in a folder.

use futures_util::{FutureExt, StreamExt, poll, stream};
use obscura_server::blobs::UploadError;

use crate::harness::eventually;

use super::*;

/// A storage in a folder and one in a bucket.
async fn places() -> [(Blobs, Place); 2] {
    let folder = tempfile::tempdir().unwrap();
    let mut in_folder = Config::embedded(folder.path()).unwrap().attachments;
    in_folder.endpoint = Some(format!("file:{}", folder.path().display()));
    let (bucket, blobs) = fresh().await;
    [(Blobs::open(&in_folder).await.unwrap(), Place::Folder(folder)), (blobs, Place::Bucket(bucket))]
}

enum Place {
    Folder(tempfile::TempDir),
    Bucket(Bucket),
}

impl Place {
    async fn is_empty(&self) -> bool {
        match self {
            Self::Folder(folder) => std::fs::read_dir(folder.path().join("attachments")).unwrap().count() == 0,
            Self::Bucket(bucket) => bucket.is_empty().await,
        }
    }
}

#[tokio::test]
async fn bytes_come_back_whole_and_in_part() {
    for (blobs, _place) in places().await {
        let id = AttachmentId::random();
        let body = stream::iter(["01", "", "234567", "89"]).map(|chunk| Ok::<_, Infallible>(Bytes::from(chunk)));
        blobs.stage(id, 10, body).await.unwrap().publish().await.unwrap();
        assert_eq!(blobs.read(id, None).await.unwrap().unwrap().size, 10);
        assert_eq!(get(&blobs, id, None).await.unwrap().unwrap(), b"0123456789");
        for range in [0..1, 3..7, 9..10, 0..10] {
            let expected = &b"0123456789"[range.start as usize..range.end as usize];
            assert_eq!(blobs.read(id, Some(range.clone())).await.unwrap().unwrap().size, 10);
            assert_eq!(get(&blobs, id, Some(range)).await.unwrap().unwrap(), expected);
        }
        assert_eq!(get(&blobs, AttachmentId::random(), None).await.unwrap(), None);
        assert_eq!(get(&blobs, AttachmentId::random(), Some(0..1)).await.unwrap(), None);
    }
}

#[tokio::test]
async fn every_size_around_the_end_of_a_part_comes_back() {
    for (blobs, _place) in places().await {
        for size in [0, 1, 65_537, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1] {
            let bytes = pattern(size);
            let id = put(&blobs, &bytes).await;
            assert_eq!(blobs.read(id, None).await.unwrap().unwrap().size, size as u64);
            assert!(get(&blobs, id, None).await.unwrap().unwrap() == bytes, "{size}");
            if size > PART {
                let across = PART - 10..(PART + 10).min(size);
                let part = get(&blobs, id, Some(across.start as u64..across.end as u64)).await.unwrap().unwrap();
                assert!(part == bytes[across], "{size}");
            }
        }
    }
}

#[tokio::test]
async fn a_body_of_another_length_than_announced_leaves_nothing() {
    for (blobs, place) in places().await {
        let bytes = pattern(PART + 10);
        for size in [0, 3, PART as u64 + 9, PART as u64 + 11, u64::MAX] {
            let id = AttachmentId::random();
            let staged = blobs.stage(id, size, body(&bytes, 1 << 20)).await;
            assert!(matches!(staged.err(), Some(UploadError::Body)), "{size}");
            assert_eq!(blobs.discard(&[id]).await.gone, [id]);
        }
        eventually("nothing to be left", async || place.is_empty().await).await;
    }
}

#[tokio::test]
async fn an_upload_dropped_at_any_point_leaves_nothing_once_it_is_discarded() {
    for (blobs, place) in places().await {
        for arrived in [10, PART, PART + 10] {
            let id = AttachmentId::random();
            let endless = body(&pattern(arrived), 1 << 20).chain(stream::pending());
            let mut staging = blobs.stage(id, 2 * PART as u64, endless).boxed();
            assert!(poll!(&mut staging).is_pending());
            let _ = tokio::time::timeout(std::time::Duration::from_millis(300), &mut staging).await;
            drop(staging);
            let discarded = blobs.discard(&[id]).await;
            assert_eq!(discarded.gone, [id], "{:?}", discarded.failed);
        }
        for size in [10, 2 * PART] {
            let id = AttachmentId::random();
            let bytes = pattern(size);
            drop(blobs.stage(id, size as u64, body(&bytes, 1 << 20)).await.unwrap());
            assert_eq!(get(&blobs, id, None).await.unwrap(), None, "nothing is visible before it is published");
            assert_eq!(blobs.discard(&[id]).await.gone, [id]);
        }
        eventually("nothing to be left", async || place.is_empty().await).await;
    }
}

#[tokio::test]
async fn whatever_is_deleted_or_discarded_is_gone_and_the_rest_stays() {
    for (blobs, place) in places().await {
        let (one, two, kept) =
            (put(&blobs, &pattern(3)).await, put(&blobs, &pattern(5)).await, put(&blobs, &pattern(7)).await);
        let unknown = AttachmentId::random();
        let mut deleted = blobs.delete(&[one, unknown]).await;
        assert!(deleted.failed.is_none());
        deleted.gone.sort_unstable();
        let mut expected = [one, unknown];
        expected.sort_unstable();
        assert_eq!(deleted.gone, expected);
        assert_eq!(blobs.discard(&[two, unknown]).await.gone, [two, unknown]);
        for id in [one, two] {
            assert_eq!(get(&blobs, id, None).await.unwrap(), None);
        }
        assert_eq!(get(&blobs, kept, None).await.unwrap().unwrap(), pattern(7));
        assert!(blobs.delete(&[]).await.gone.is_empty());
        blobs.delete(&[kept]).await;
        assert!(place.is_empty().await);
        blobs.check().await.unwrap();
    }
}

#[tokio::test]
async fn a_discarded_upload_is_found_without_a_row() {
    let (bucket, blobs) = fresh().await;
    let (id, other) = (AttachmentId::random(), AttachmentId::random());
    for _ in 0..3 {
        bucket.begin_upload(&format!("attachments/{id}")).await;
    }
    bucket.begin_upload(&format!("attachments/{other}")).await;
    assert_eq!(bucket.uploads().await.len(), 4);
    assert_eq!(blobs.discard(&[id]).await.gone, [id]);
    assert_eq!(bucket.uploads().await.len(), 1, "that of another attachment stays");
    assert_eq!(blobs.discard(&[other]).await.gone, [other]);
    assert!(bucket.is_empty().await);
}

#[tokio::test]
async fn a_prefix_begins_the_name_of_an_object() {
    let bucket = S3::shared().await.bucket().await;
    for prefix in ["", "a b/c+d&", "attachments/"] {
        let mut settings = settings(&bucket);
        settings.prefix = prefix.to_owned();
        let blobs = Blobs::open(&settings).await.unwrap();
        let id = put(&blobs, &pattern(3)).await;
        assert_eq!(get(&blobs, id, None).await.unwrap().unwrap(), pattern(3));
        let staged = AttachmentId::random();
        drop(blobs.stage(staged, 2 * PART as u64, body(&pattern(2 * PART), 1 << 20)).await.unwrap());
        assert_eq!(bucket.uploads().await.len(), 1);
        assert_eq!(blobs.discard(&[id, staged]).await.gone, [id, staged]);
        assert!(bucket.is_empty().await, "{prefix:?}");
    }
}
