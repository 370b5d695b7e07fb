//! Attachments in a bucket of an S3-compatible service.
//!
//! A small body goes up as one object, a larger one in parts, of which one at a time is in memory. The service keeps
//! parts for ever that are neither completed nor aborted, so [`Bucket::discard`] asks it for them: the node that began an upload may
//! be gone.

mod memory;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use futures_util::{Stream, StreamExt, TryStreamExt};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt};

use crate::blobs::bucket::memory::{Memory, PART_BYTES, Part};
use crate::blobs::s3::{Service, limited};
use crate::blobs::{Blob, BlobError, Deleted, Keys, OpenError, UploadError, start};
use crate::config;
use crate::limits::LimitSubject;
use crate::model::ids::AttachmentId;

/// Objects that one request may delete.
const DELETES_IN_ONE: usize = 1000;
/// Objects that are looked after at the same time, where each takes requests of its own.
const AT_ONCE: usize = 8;

/// The bucket. Cloning gives the same bucket.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    service: Arc<Service>,
    keys: Keys,
    memory: Memory,
}

impl Bucket {
    /// The bucket, without asking its service for anything yet.
    pub fn prepare(config: &config::Attachments, keys: Keys) -> Result<Self, OpenError> {
        let service = Service::new(config)?;
        Ok(Self { service: Arc::new(service), keys, memory: Memory::new() })
    }

    /// Ends when the bucket can be used; a service that is away is waited for.
    pub async fn until_usable(&self, config: &config::Attachments) -> Result<(), OpenError> {
        start::until_usable(&self.service, config, &self.keys).await
    }

    /// Takes in the bytes of an attachment. If this or the answer is dropped, parts may be left.
    pub async fn stage<E>(
        &self,
        id: AttachmentId,
        size: u64,
        subject: LimitSubject,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Staged, UploadError> {
        let object = Object { service: self.service.clone(), key: self.keys.of(id) };
        let mut multipart = if size > PART_BYTES as u64 { Some(object.begin().await?) } else { None };
        let (mut part, mut received) = (self.memory.part(subject, size), 0);
        let mut body = std::pin::pin!(body);
        while let Some(bytes) = body.next().await {
            let mut bytes = bytes.map_err(|_| UploadError::Body)?;
            received += bytes.len() as u64;
            if received > size {
                return Err(UploadError::Body);
            }
            while !bytes.is_empty() {
                part.take_in(&mut bytes).await?;
                if let Some(multipart) = multipart.as_mut().filter(|_| part.is_full()) {
                    let next = self.memory.part(subject, size - (received - bytes.len() as u64));
                    object.put_part(multipart, std::mem::replace(&mut part, next)).await?;
                }
            }
        }
        if received < size {
            return Err(UploadError::Body);
        }
        let Some(mut multipart) = multipart else { return Ok(Staged { object, step: PublishStep::Whole(part) }) };
        if part.length() > 0 {
            object.put_part(&mut multipart, part).await?;
        }
        Ok(Staged { object, step: PublishStep::Completion(multipart) })
    }

    /// Reads an attachment, or `range` of it; `None` when there is no such attachment.
    pub async fn read(&self, id: AttachmentId, range: Option<Range<u64>>) -> Result<Option<Blob>, BlobError> {
        let asks_for_part = range.is_some();
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        let found = match limited(self.service.store.get_opts(&self.keys.of(id), options)).await {
            Err(error) if error.is_of_missing_object() => return Ok(None),
            // A success that is not understood: the service may have given the whole.
            Err(error) if asks_for_part && error.is_misunderstood() => {
                limited(self.service.store.get_opts(&self.keys.of(id), GetOptions::default())).await?
            }
            found => found?,
        };
        let (size, range) = (found.meta.size, found.range.clone());
        Ok(Some(Blob { size, range, bytes: found.into_stream().map_err(BlobError::from).boxed() }))
    }

    /// Deletes complete objects, many with one request.
    pub async fn delete(&self, ids: &[AttachmentId]) -> Deleted {
        let mut outcome = Deleted::new();
        for ids in ids.chunks(DELETES_IN_ONE) {
            let mut missing: HashMap<Key, AttachmentId> = ids.iter().map(|id| (self.keys.of(*id), *id)).collect();
            let keys: Vec<_> = missing.keys().cloned().map(Ok).collect();
            let deletions = self.service.store.delete_stream(stream::iter(keys).boxed());
            let deletions = limited(deletions.map(Ok).try_collect::<Vec<_>>());
            let mut failure = None;
            match deletions.await {
                Ok(deletions) => {
                    for deletion in deletions {
                        match deletion {
                            Ok(key) => outcome.gone.extend(missing.remove(&key)),
                            Err(error) => failure = failure.or(Some(BlobError::from(error))),
                        }
                    }
                }
                Err(error) => failure = Some(error),
            }
            match failure {
                // Not every service can delete several at once.
                Some(error) if missing.len() == ids.len() && matches!(error.status(), Some(405 | 501)) => {
                    self.one_by_one(ids, &mut outcome, Object::delete).await;
                }
                Some(error) => outcome.add_failures(missing.len(), error),
                None => {}
            }
        }
        outcome
    }

    /// Removes what uploads have left: parts that were not put together, and objects that have not become visible.
    pub async fn discard(&self, ids: &[AttachmentId]) -> Deleted {
        let mut outcome = Deleted::new();
        self.one_by_one(ids, &mut outcome, Object::discard).await;
        outcome
    }

    /// Answers when the bucket is there.
    pub async fn check(&self) -> Result<(), BlobError> {
        self.service.head_bucket().await
    }

    async fn one_by_one<F>(&self, ids: &[AttachmentId], outcome: &mut Deleted, removal: impl Fn(Object) -> F)
    where
        F: Future<Output = Result<(), BlobError>>,
    {
        let removals = stream::iter(ids.to_vec()).map(|id| {
            let removal = removal(Object { service: self.service.clone(), key: self.keys.of(id) });
            async move { (id, removal.await) }
        });
        let mut removals = removals.buffered(AT_ONCE);
        while let Some((id, removed)) = removals.next().await {
            outcome.add(id, removed);
        }
    }
}

/// One object of the bucket.
struct Object {
    service: Arc<Service>,
    key: Key,
}

impl Object {
    /// Begins an upload in parts. If that isn't answered, it isn't repeated: an upload that was begun all the same would
    /// stay behind when the other one is complete.
    async fn begin(&self) -> Result<MultipartUpload, BlobError> {
        let upload = limited(self.service.once.create_multipart(&self.key)).await?;
        Ok(MultipartUpload { upload, parts: Vec::new() })
    }

    async fn put_part(&self, multipart: &mut MultipartUpload, part: Part) -> Result<(), BlobError> {
        let (payload, _memory) = part.finish();
        let part = self.service.store.put_part(&self.key, &multipart.upload, multipart.parts.len(), payload);
        multipart.parts.push(limited(part).await?);
        Ok(())
    }

    async fn delete(self) -> Result<(), BlobError> {
        match limited(self.service.once.delete(&self.key)).await {
            Err(error) if !error.is_of_missing_object() => Err(error),
            _ => Ok(()),
        }
    }

    /// First the uploads, so that none of them can become the object afterwards.
    async fn discard(self) -> Result<(), BlobError> {
        self.service.abort_uploads(&self.key).await?;
        self.delete().await
    }
}

/// An upload in parts, as far as it is.
struct MultipartUpload {
    upload: String,
    parts: Vec<PartId>,
}

/// Bytes that have arrived in full and wait to become an object.
pub(super) struct Staged {
    object: Object,
    step: PublishStep,
}

/// What is still to do.
enum PublishStep {
    Whole(Part),
    Completion(MultipartUpload),
}

impl Staged {
    /// Makes them the object.
    pub async fn publish(self) -> Result<(), BlobError> {
        let Object { service, key } = self.object;
        match self.step {
            PublishStep::Whole(part) => {
                let (payload, _memory) = part.finish();
                limited(service.store.put(&key, payload)).await?;
            }
            PublishStep::Completion(MultipartUpload { upload, parts }) => {
                limited(service.store.complete_multipart(&key, &upload, parts)).await?;
            }
        }
        Ok(())
    }
}
