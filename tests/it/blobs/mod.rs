//! The storage of attachments on a real S3 service, by itself and under a server.

mod contract;
mod faults;
mod opening;
mod server;

use std::convert::Infallible;
use std::path::Path;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt, stream};
use obscura_server::blobs::{BlobError, Blobs};
use obscura_server::config::{self, Config};
use obscura_server::model::ids::AttachmentId;
use std::ops::Range;

use crate::harness::{Bucket, S3, within};

/// The size of a part of an upload to a bucket.
const PART: usize = 5 << 20;

/// The options of a storage in this bucket.
fn settings(bucket: &Bucket) -> config::Attachments {
    let mut attachments = Config::embedded(Path::new("/nowhere")).unwrap().attachments;
    bucket.configure(&mut attachments);
    attachments
}

/// A storage in this bucket.
async fn open(bucket: &Bucket) -> Blobs {
    within("the storage to open", Blobs::open(&settings(bucket))).await.unwrap()
}

/// A storage in a bucket of its own.
async fn fresh() -> (Bucket, Blobs) {
    let bucket = S3::shared().await.bucket().await;
    let blobs = open(&bucket).await;
    (bucket, blobs)
}

/// Bytes that differ from place to place.
fn pattern(size: usize) -> Bytes {
    (0..size).map(|place| (place % 251) as u8).collect()
}

/// A body that comes in chunks of this size.
fn body(bytes: &Bytes, chunk: usize) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    let bytes = bytes.clone();
    let places = (0..bytes.len()).step_by(chunk);
    stream::iter(places.map(move |place| Ok(bytes.slice(place..(place + chunk).min(bytes.len())))))
}

async fn put(blobs: &Blobs, bytes: &Bytes) -> AttachmentId {
    let id = AttachmentId::random();
    let staged = blobs.stage(id, bytes.len() as u64, body(bytes, 64 << 10)).await.unwrap();
    staged.publish().await.unwrap();
    id
}

async fn get(blobs: &Blobs, id: AttachmentId, range: Option<Range<u64>>) -> Result<Option<Vec<u8>>, BlobError> {
    let Some(blob) = blobs.read(id, range).await? else { return Ok(None) };
    Ok(Some(blob.bytes.try_collect::<Vec<_>>().await?.concat()))
}
