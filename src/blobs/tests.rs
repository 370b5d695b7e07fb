use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt, TryStreamExt, poll, stream};
use tempfile::TempDir;

use crate::blobs::folder::PART_BYTES;
use crate::config::Config;

use super::*;

fn settings(folder: &Path, prefix: &str) -> config::Attachments {
    let mut attachments = Config::embedded(folder).unwrap().attachments;
    attachments.endpoint = Some(format!("file:{}", folder.display()));
    attachments.prefix = prefix.to_owned();
    attachments
}

async fn open(folder: &TempDir) -> Blobs {
    Blobs::open(&settings(folder.path(), "attachments/")).await.unwrap()
}

fn body(chunks: &[&'static str]) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    stream::iter(chunks.iter().map(|chunk| Ok(Bytes::from_static(chunk.as_bytes()))).collect::<Vec<_>>())
}

/// The names of all files in the folder, folders excluded.
fn files(folder: &TempDir) -> Vec<String> {
    let objects = fs::read_dir(folder.path().join("attachments")).unwrap();
    objects.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn until_empty(folder: &TempDir) {
    let empty = async {
        while !files(folder).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), empty).await.expect("something stays in the folder");
}

async fn put(blobs: &Blobs, text: &'static str) -> AttachmentId {
    let id = AttachmentId::random();
    let staged = blobs.stage(id, text.len() as u64, body(&[text])).await.unwrap();
    staged.publish().await.unwrap();
    id
}

async fn get(blobs: &Blobs, id: AttachmentId, range: Option<Range<u64>>) -> Option<Vec<u8>> {
    let blob = blobs.read(id, range).await.unwrap()?;
    Some(blob.bytes.try_collect::<Vec<_>>().await.unwrap().concat())
}

#[tokio::test]
async fn bytes_come_back_whole_and_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let id = AttachmentId::random();
    blobs.stage(id, 10, body(&["01", "", "234567", "89"])).await.unwrap().publish().await.unwrap();
    assert_eq!(files(&folder), [id.to_string()]);
    assert_eq!(blobs.read(id, None).await.unwrap().unwrap().size, 10);
    assert_eq!(get(&blobs, id, None).await.unwrap(), b"0123456789");
    assert_eq!(get(&blobs, id, Some(3..7)).await.unwrap(), b"3456");
    assert_eq!(get(&blobs, AttachmentId::random(), None).await, None);
}

#[tokio::test]
async fn many_parts_and_none_at_all_are_put_together() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let bytes = Bytes::from((0..1_000_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    let sizes =
        [(400_000, 0), (400_000, 1), (400_000, 7), (1_000_000, 2), (PART_BYTES, 2), (PART_BYTES - 1, 2), (30_000, 50)];
    for (size, chunks) in sizes {
        let chunk = bytes.slice(..size);
        let id = AttachmentId::random();
        let body = stream::iter(vec![Ok::<_, Infallible>(chunk.clone()); chunks]);
        blobs.stage(id, (chunk.len() * chunks) as u64, body).await.unwrap().publish().await.unwrap();
        assert_eq!(get(&blobs, id, None).await.unwrap(), chunk.repeat(chunks));
    }
}

#[tokio::test]
async fn a_body_of_another_length_than_announced_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    // So long that there is a file with a part of it.
    let half = Bytes::from(vec![0; PART_BYTES + 1]);
    let whole = 2 * half.len() as u64;
    for size in [0, 3, whole - 1, whole + 1, u64::MAX] {
        let body = stream::iter([Ok::<_, Infallible>(half.clone()), Ok(half.clone())]);
        let staged = blobs.stage(AttachmentId::random(), size, body).await;
        assert!(matches!(staged.err(), Some(UploadError::Body)), "{size}");
    }
    until_empty(&folder).await;
}

#[tokio::test]
async fn a_body_that_breaks_off_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let first = Bytes::from(vec![0; PART_BYTES + 1]);
    let size = 2 * first.len() as u64;
    let body = stream::iter([Ok(first), Err("gone")]);
    let staged = open(&folder).await.stage(AttachmentId::random(), size, body).await;
    assert!(matches!(staged.err(), Some(UploadError::Body)));
    until_empty(&folder).await;
}

#[tokio::test]
async fn an_upload_dropped_in_the_middle_or_before_it_is_published_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let first = Bytes::from(vec![0; 1 << 20]);
    let endless = stream::iter([Ok::<_, Infallible>(first)]).chain(stream::pending());
    let mut staging = blobs.stage(AttachmentId::random(), 2 << 20, endless).boxed();
    let begun = async {
        while files(&folder).is_empty() {
            assert!(poll!(&mut staging).is_pending());
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), begun).await.expect("nothing is written");
    drop(staging);
    until_empty(&folder).await;

    let staged = blobs.stage(AttachmentId::random(), 2, body(&["ab"])).await.unwrap();
    assert_eq!(files(&folder).len(), 1);
    drop(staged);
    until_empty(&folder).await;
}

#[test]
fn a_runtime_that_ends_in_the_middle_of_an_upload_removes_it() {
    use tokio::runtime::Builder;

    for mut runtime in [Builder::new_current_thread(), Builder::new_multi_thread()] {
        let runtime = runtime.enable_all().worker_threads(1).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let blobs = runtime.block_on(open(&folder));
        let part = Bytes::from(vec![0; PART_BYTES]);
        let staging = async move {
            // One part after the other, so that some are being written at the end.
            let body = stream::iter(std::iter::repeat_n(part, 1000)).map(Ok::<_, Infallible>);
            let _ = blobs.stage(AttachmentId::random(), u64::MAX, body).await;
        };
        runtime.block_on(async {
            let staging = staging.boxed();
            let begun = async {
                while files(&folder).is_empty() {
                    tokio::task::yield_now().await;
                }
            };
            let work = tokio_util::task::TaskTracker::new();
            work.spawn(staging);
            tokio::time::timeout(Duration::from_secs(10), begun).await.expect("nothing is written");
        });
        drop(runtime);
        assert!(files(&folder).is_empty());
    }
}

#[tokio::test]
async fn a_publication_that_fails_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let id = AttachmentId::random();
    let staged = blobs.stage(id, 2, body(&["ab"])).await.unwrap();
    // A folder in its place can't be replaced by a file.
    let in_the_way = folder.path().join("attachments").join(id.to_string());
    fs::create_dir(&in_the_way).unwrap();
    staged.publish().await.unwrap_err();
    assert_eq!(files(&folder), [id.to_string()], "only what is in the way");
    fs::remove_dir(in_the_way).unwrap();
    put(&blobs, "goes on").await;
}

#[tokio::test]
async fn deleting_removes_published_and_staged_bytes_and_passes_over_failures() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let published = put(&blobs, "abc").await;
    let (staged, unknown, stuck) = (AttachmentId::random(), AttachmentId::random(), AttachmentId::random());
    let objects = folder.path().join("attachments");
    fs::write(objects.join(format!("{staged}#1")), "left").unwrap();
    fs::create_dir(objects.join(stuck.to_string())).unwrap();

    let deleted = blobs.delete(&[published, stuck, staged, unknown]).await;
    assert_eq!(deleted.gone, [published, staged, unknown]);
    assert_eq!(deleted.failed.unwrap().0, 1);
    assert_eq!(files(&folder), [stuck.to_string()]);
    assert_eq!(get(&blobs, published, None).await, None);
}

#[tokio::test]
async fn what_a_crash_left_is_removed_when_the_storage_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let kept = put(&open(&folder).await, "abc").await;
    let objects = folder.path().join("attachments");
    for name in [format!("{}#1", AttachmentId::random()), format!("{}#27", AttachmentId::random())] {
        fs::write(objects.join(name), "half").unwrap();
    }
    fs::write(objects.join("notes#1"), "not ours").unwrap();
    let blobs = open(&folder).await;
    let mut left = files(&folder);
    left.sort_by_key(String::len);
    assert_eq!(left, ["notes#1".to_owned(), kept.to_string()]);
    assert_eq!(get(&blobs, kept, None).await.unwrap(), b"abc");
}

#[tokio::test]
async fn a_new_folder_is_for_this_user_alone() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("some").join("where");
    Blobs::open(&settings(&root, "deep/er/")).await.unwrap();
    for made in ["some", "some/where", "some/where/deep", "some/where/deep/er"] {
        assert_eq!(fs::metadata(folder.path().join(made)).unwrap().permissions().mode() & 0o777, 0o700, "{made}");
    }
}

#[tokio::test]
async fn a_prefix_begins_the_name_of_an_object() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(&settings(folder.path(), "a/b-")).await.unwrap();
    let id = put(&blobs, "abc").await;
    assert!(folder.path().join("a").join(format!("b-{id}")).is_file());
    let leftover = folder.path().join("a").join(format!("b-{id}#1"));
    fs::write(&leftover, "half").unwrap();
    Blobs::open(&settings(folder.path(), "a/b-")).await.unwrap();
    assert!(!leftover.exists());
}

#[tokio::test]
async fn what_cannot_be_opened_is_told_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for (settings, expected) in [
        (settings(&file, ""), "the attachment folder"),
        (settings(&file.join("below"), ""), "the attachment folder"),
        (settings(folder.path(), "../"), "--attachment-prefix \"../\""),
    ] {
        let sentence = Blobs::open(&settings).await.unwrap_err().to_string();
        assert!(sentence.contains(expected) && !sentence.contains('\n'), "{sentence}");
    }
}

#[tokio::test]
async fn the_check_fails_without_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    blobs.check().await.unwrap();
    fs::remove_dir(folder.path().join("attachments")).unwrap();
    blobs.check().await.unwrap_err();
}

#[tokio::test]
async fn an_error_does_not_name_the_attachment() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(&folder).await;
    let id = AttachmentId::random();
    fs::create_dir(folder.path().join("attachments").join(id.to_string())).unwrap();
    let mut errors = vec![blobs.delete(&[id]).await.failed.unwrap().1];
    errors.push(blobs.stage(id, 1, body(&["a"])).await.unwrap().publish().await.unwrap_err());
    fs::remove_dir_all(folder.path()).unwrap();
    fs::write(folder.path(), "").unwrap();
    errors.push(
        blobs
            .stage(id, 1, body(&["a"]))
            .await
            .err()
            .map(|error| match error {
                UploadError::Storage(error) => error,
                other => panic!("{other}"),
            })
            .unwrap(),
    );
    errors.push(blobs.read(id, None).await.err().unwrap());
    for error in errors {
        let sentence = format!("{error} {error:?}");
        assert!(sentence.contains("os error") && !sentence.contains(&id.to_string()), "{sentence}");
    }
    fs::remove_file(folder.path()).unwrap();
}
