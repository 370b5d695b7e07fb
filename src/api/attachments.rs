//! Attachments: upload and download.

mod conditions;

use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::api::attachments::conditions::{Part, entity_tag, is_known, requested_part};
use crate::api::body_progress::announced_length;
use crate::api::error::ApiError;
use crate::api::extract::{Holder, PathId, Unmetered, check_encoding};
use crate::app::App;
use crate::blobs::{Staged, UploadError};
use crate::clock::Timestamp;
use crate::config;
use crate::limits::{LimitSubject, NoRoom, RateLimited};
use crate::model::ids::{AttachmentId, UserId};
use crate::store::{Allowance, Reservation, Reserved, StoreError};
use crate::telemetry::metrics::{BlobOperation, Direction, Refusal};
use crate::telemetry::traces::with_current_span;

/// How many bytes of an upload may come in before its room is reserved. They are written before anything limits them but
/// the rate of requests; a larger upload doesn't notice the wait.
const EARLY_BYTES: u64 = 1 << 20;

/// How long the first byte of an upload may take. Until then the upload has cost its client nothing, but it holds a place
/// among those under way.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// Where a stored attachment is, and until when.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// What a download asks for.
    pub id: String,
    /// Unix seconds.
    pub expires_at: i64,
}

/// `POST /v1/attachments`: stores the body, which is streamed to where it stays.
pub async fn upload(
    State(app): State<App>,
    Unmetered(caller): Unmetered,
    Holder(subject): Holder,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, axum::Json<Attachment>), ApiError> {
    check_encoding(&headers)?;
    let size = announced_length(&headers).ok_or(ApiError::LengthRequired)?;
    check_size(size, &app.config.attachments)?;
    let under_way = app.account_limits.upload(subject)?;
    // In a bucket it takes nothing of our own disk but a row.
    let on_disk = if app.config.attachments.folder().is_some() { size } else { 0 };
    let claim = app.disk.room_for_attachment(on_disk).ok_or(ApiError::DiskFull)?;
    let upload = Upload {
        id: AttachmentId::random(),
        user: caller.user,
        subject,
        size,
        began: app.clock.now(),
        born: app.clock.latest(),
        // A client that expects to be asked for the bytes would be asked for such as are refused then.
        can_stage_early: size <= EARLY_BYTES
            && app.blobs.can_stage_before_row()
            && !headers.contains_key(header::EXPECT),
    };
    let attachment =
        Attachment { id: upload.id.to_string(), expires_at: (upload.born + app.config.retention).seconds() };

    // From here on there is something to tidy up, also when the client hangs up or the time is over. So the work is
    // done elsewhere, and hears of it when this future is dropped.
    let abandoned = CancellationToken::new();
    let _guard = abandoned.clone().drop_guard();
    let uploaded = upload.run(app.clone(), body, abandoned);
    let uploaded = async move {
        let _held = (claim, under_way);
        uploaded.await
    };
    app.tasks.run_to_end(with_current_span(uploaded)).await?;
    Ok((StatusCode::CREATED, axum::Json(attachment)))
}

/// `GET /v1/attachments/{id}`: the bytes, or the part of them that `Range` asks for.
pub async fn download(
    State(app): State<App>,
    _: Unmetered,
    PathId(id): PathId<AttachmentId>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let size = app.store.attachment(id, app.clock.earliest()).await?.ok_or(ApiError::NotFound)?.size;
    if is_known(&headers, id) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, entity_tag(id))]).into_response());
    }
    // Ranges are defined for GET alone; a HEAD announces the whole.
    let part = if method == Method::GET { requested_part(&headers, id, size) } else { Part::Whole };
    let range = match part {
        Part::Whole => None,
        Part::Range(range) => Some(range),
        Part::Unsatisfiable => return Err(ApiError::RangeNotSatisfiable { size }),
    };
    let failures = app.metrics.blob_failures.clone();
    let read = app.blobs.read(id, range.clone()).await.inspect_err(|_| failures.increment(BlobOperation::Download))?;
    let Some(blob) = read.filter(|blob| blob.size == size) else {
        failures.increment(BlobOperation::Download);
        error!("an attachment that should be in the storage is not there, or not whole");
        return Err(ApiError::NotFound);
    };
    let fields = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::ETAG, entity_tag(id)),
    ];
    let sent = app.metrics.blob_bytes.clone();
    let body = Body::from_stream(blob.bytes.inspect(move |bytes| match bytes {
        Ok(bytes) => sent.add(Direction::Out, bytes.len() as u64),
        Err(_) => failures.increment(BlobOperation::Download),
    }));
    // A storage service may not know ranges; then the client gets the whole, as it may always.
    let Some(Range { start, end }) = range.filter(|range| *range == blob.range) else {
        return Ok((fields, [(header::CONTENT_LENGTH, size.to_string())], body).into_response());
    };
    let content_range = format!("bytes {start}-{}/{size}", end - 1);
    let part = [(header::CONTENT_LENGTH, (end - start).to_string()), (header::CONTENT_RANGE, content_range)];
    Ok((StatusCode::PARTIAL_CONTENT, fields, part, body).into_response())
}

fn check_size(size: u64, limits: &config::Attachments) -> Result<(), ApiError> {
    if size < limits.min_size_bytes {
        return Err(ApiError::bad_request(format!("An attachment has at least {} bytes", limits.min_size_bytes)));
    }
    if size > limits.max_size_bytes {
        return Err(ApiError::TooLarge("Payload too large".into()));
    }
    Ok(())
}

/// An upload that passed the checks.
#[derive(Clone, Copy)]
struct Upload {
    id: AttachmentId,
    user: UserId,
    subject: LimitSubject,
    size: u64,
    began: Timestamp,
    /// From when on its age counts.
    born: Timestamp,
    /// The bytes may come in while their room is being reserved.
    can_stage_early: bool,
}

impl Upload {
    /// Stores the attachment, row and bytes, or leaves nothing. It is durable when this returns.
    async fn run(self, app: App, body: Body, abandoned: CancellationToken) -> Result<(), ApiError> {
        let over = abandoned.child_token();
        let staging = self.stage(&app, body, &over);
        let staged = if self.can_stage_early {
            // A task of its own: others may wait for the same transaction, and the bytes must not hold it up.
            let reserving = app.tasks.run_to_end(with_current_span(self.reserve(app.clone())));
            let reserving = async { reserving.await.inspect_err(|_| over.cancel()) };
            let (reserved, staged) = tokio::join!(reserving, staging);
            // What has come in of a refused one goes by being dropped.
            reserved?;
            staged
        } else {
            self.reserve(app.clone()).await?;
            staging.await
        };
        let stored = self.store(&app, staged).await;
        if stored.is_err() || abandoned.is_cancelled() {
            let may_still_happen = stored.as_ref().is_err_and(Failure::may_still_happen);
            self.undo(&app, may_still_happen).await;
        }
        stored.map_err(Failure::answer)
    }

    async fn reserve(self, app: App) -> Result<(), ApiError> {
        let config = &app.config.attachments;
        let allowance = Allowance { quota_bytes: config.quota_bytes, bytes_per_day: config.bytes_per_day };
        let Self { id, user, size, began: now, born, .. } = self;
        match app.store.reserve_attachment(Reservation { user, id, size, now, born, allowance }).await? {
            Reserved::Yes => Ok(()),
            Reserved::QuotaExceeded => {
                Err(ApiError::TooLarge("The account has no room left for this attachment".into()))
            }
            Reserved::TooMuchToday(wait) => Err(RateLimited(wait, Refusal::UploadLimit).into()),
        }
    }

    async fn stage(&self, app: &App, body: Body, over: &CancellationToken) -> Result<Staged, Failure> {
        // The body ends early when the request is over. What the storage is busy with is not cut off, since it
        // might go on with it behind our back.
        let mut body = std::pin::pin!(body.into_data_stream().take_until(over.cancelled()));
        let first = tokio::time::timeout(FIRST_BYTE, body.next()).await.map_err(|_| Failure::NothingCame)?;
        let body = stream::iter(first).chain(body);
        Ok(app.blobs.stage_for(self.subject, self.id, self.size, body).await?)
    }

    async fn store(&self, app: &App, staged: Result<Staged, Failure>) -> Result<(), Failure> {
        let published = async { Ok(staged?.publish().await.map_err(UploadError::Storage)?) };
        published.await.inspect_err(|failure| {
            if matches!(failure, Failure::Upload(UploadError::Storage(_))) {
                app.metrics.blob_failures.increment(BlobOperation::Upload);
            }
        })?;
        match app.store.attachment_stored(self.id).await {
            Ok(true) => {
                app.metrics.blob_bytes.add(Direction::In, self.size);
                Ok(())
            }
            Ok(false) => Err(Failure::Upload(UploadError::Body)),
            Err(error) => Err(Failure::Store(error)),
        }
    }

    /// Removes bytes and row, in this order. What can't be removed now is found by a sweep, and so are bytes that may
    /// still arrive: for these the row stays.
    async fn undo(&self, app: &App, may_still_happen: bool) {
        if let Some((_, error)) = app.blobs.discard(&[self.id]).await.failed {
            app.metrics.blob_failures.increment(BlobOperation::Delete);
            warn!(%error, "an upload that came to nothing could not be removed; a sweep will try again");
        } else if may_still_happen {
            warn!("the storage did not say what came of an upload; a sweep will remove what may be left");
        } else if let Err(error) = app.store.delete_attachments(&[self.id]).await {
            warn!(%error, "an upload that came to nothing could not be forgotten; a sweep will try again");
        }
    }
}

/// Why an attachment was not stored.
enum Failure {
    /// Not one byte of it, in [`FIRST_BYTE`].
    NothingCame,
    Upload(UploadError),
    Store(StoreError),
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Self {
        Self::Upload(error)
    }
}

impl Failure {
    fn may_still_happen(&self) -> bool {
        matches!(self, Self::Upload(UploadError::Storage(error)) if error.may_still_happen())
    }

    fn answer(self) -> ApiError {
        match self {
            Self::NothingCame => ApiError::Timeout,
            Self::Upload(UploadError::Body) => {
                ApiError::bad_request("The upload was broken off or has not the announced length")
            }
            Self::Upload(UploadError::NoRoom) => NoRoom.into(),
            Self::Upload(UploadError::Storage(error)) => error.into(),
            Self::Store(error) => error.into(),
        }
    }
}
