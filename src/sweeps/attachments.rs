//! Removes attachments: first the bytes, then the row.
//!
//! Bytes that can't be removed are passed over, and tried again in the next round. So neither do they stop the sweep
//! from reaching what lies behind them, nor does it spin on them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use crate::app::App;
use crate::blobs::{BlobError, Deleted};
use crate::clock::Timestamp;
use crate::limits::LEAST_RATE;
use crate::model::ids::AttachmentId;
use crate::store::{AttachmentAge, StoreError};
use crate::tasks::Round;
use crate::telemetry::metrics::BlobOperation;

/// An upload this much older than the time that it may take is over, however slow the disk is.
const UPLOAD_MARGIN: Duration = Duration::from_mins(1);

/// Why a sweep over attachments has to come again.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Some bytes could not be removed.
    #[error("{count} attachments could not be removed, the first because {cause}")]
    Blobs {
        /// How many.
        count: usize,
        /// What happened to the first.
        cause: BlobError,
    },
}

/// How far a round over the attachments has come, from the oldest on.
#[derive(Debug, Default)]
pub struct SweepCursor {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    after: Option<AttachmentAge>,
    failed: Option<(usize, BlobError)>,
}

/// A step of the sweep over attachments past their age.
pub async fn remove_expired(app: App, cursor: Arc<SweepCursor>) -> Result<Round, SweepError> {
    let (limit, now) = (app.config.attachments.cleanup_batch_size, app.clock.earliest());
    app.store.correct_attachments(now, app.clock.latest(), limit).await?;
    // An upload can be found this old when no sweep has run for long. The oldest of both lists are the same rows.
    let before = now - app.config.retention + Duration::from_secs(1);
    let unfinished = ids(&app.store.stale_reservations(before, cursor.after(), limit).await?);
    let expired = app.store.expired_attachments(now, cursor.after(), limit).await?;
    let (unfinished, complete): (Vec<_>, Vec<_>) = ids(&expired).into_iter().partition(|id| unfinished.contains(id));
    let mut deleted = app.blobs.delete(&complete).await;
    deleted.add_all(app.blobs.discard(&unfinished).await);
    conclude(&app, &cursor, &expired, deleted, "expired attachments").await
}

/// A step of the sweep over uploads that took far too long and left something.
///
/// No node knows what the others are taking in, so the age has to tell. A client has the time limit before the bytes and
/// behind them, and as long as its bytes take at the least rate: 50 MiB may come in for almost two hours.
pub async fn remove_stale(app: App, cursor: Arc<SweepCursor>) -> Result<Round, SweepError> {
    let limit = app.config.attachments.cleanup_batch_size;
    let before = app.clock.earliest() - app.config.attachments.timeout * 2 - UPLOAD_MARGIN;
    let stale = app.store.overdue_reservations(before, LEAST_RATE, cursor.after(), limit).await?;
    let deleted = app.blobs.discard(&ids(&stale)).await;
    conclude(&app, &cursor, &stale, deleted, "stale uploads").await
}

/// Removes what uploads left that the last run of the server did not finish. Only where no other node can be in the
/// middle of one: with a database of our own.
pub async fn remove_interrupted(app: &App) {
    if !app.store.is_exclusive() {
        return;
    }
    // A service that is away would take its time with every single one.
    let limit = app.config.health.storage_timeout;
    if !tokio::time::timeout(limit, app.blobs.check()).await.is_ok_and(|answer| answer.is_ok()) {
        return warn!("the attachment storage doesn't answer; interrupted uploads are left for a later sweep");
    }
    let cursor = SweepCursor::default();
    let step = async || {
        let (limit, all) = (app.config.attachments.cleanup_batch_size, Timestamp::from_millis(i64::MAX));
        let interrupted = app.store.stale_reservations(all, cursor.after(), limit).await?;
        let deleted = app.blobs.discard(&ids(&interrupted)).await;
        conclude(app, &cursor, &interrupted, deleted, "interrupted uploads").await
    };
    loop {
        match step().await {
            Ok(Round::More) => {}
            Ok(Round::Done) => return,
            Err(error) => return warn!(%error, "interrupted uploads are left for a later sweep"),
        }
    }
}

fn ids(batch: &[AttachmentAge]) -> Vec<AttachmentId> {
    batch.iter().map(|attachment| attachment.id).collect()
}

/// Forgets what is gone of a batch, and says how the round goes on.
async fn conclude(
    app: &App,
    cursor: &SweepCursor,
    batch: &[AttachmentAge],
    deleted: Deleted,
    what: &'static str,
) -> Result<Round, SweepError> {
    let failed = deleted.failed.as_ref().map_or(0, |(count, _)| *count as u64);
    app.metrics.blob_failures.add(BlobOperation::Delete, failed);
    app.store.delete_attachments(&deleted.gone).await?;
    if !deleted.gone.is_empty() {
        info!(count = deleted.gone.len(), "{what}");
    }
    let is_full = batch.len() >= app.config.attachments.cleanup_batch_size as usize;
    cursor.advance(batch.last().copied().filter(|_| is_full), deleted.gone.is_empty(), deleted.failed)
}

impl SweepCursor {
    fn after(&self) -> Option<AttachmentAge> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).after
    }

    /// Goes on behind `last`, or starts a new round when there is none. The failures of a round are told at its end,
    /// which also comes when nothing of a step succeeded: then the storage itself is probably in trouble.
    fn advance(
        &self,
        last: Option<AttachmentAge>,
        nothing_removed: bool,
        failed: Option<(usize, BlobError)>,
    ) -> Result<Round, SweepError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.after = last;
        let goes_on = last.is_some() && !(nothing_removed && failed.is_some());
        state.failed = match (state.failed.take(), failed) {
            (Some((before, cause)), Some((count, _))) => Some((before + count, cause)),
            (before, failed) => before.or(failed),
        };
        match state.failed.take_if(|_| !goes_on) {
            Some((count, cause)) => Err(SweepError::Blobs { count, cause }),
            None if goes_on => Ok(Round::More),
            None => Ok(Round::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(second: i64) -> Option<AttachmentAge> {
        Some(AttachmentAge { created_at: Timestamp::from_seconds(second), id: AttachmentId::random() })
    }

    fn failed(count: usize, cause: &'static str) -> Option<(usize, BlobError)> {
        Some((count, BlobError::from(std::io::Error::other(cause))))
    }

    #[test]
    fn a_round_goes_on_behind_each_full_step_and_then_starts_over() {
        let cursor = SweepCursor::default();
        let first = place(1);
        assert_eq!(cursor.advance(first, false, None).unwrap(), Round::More);
        assert_eq!(cursor.after(), first);
        assert_eq!(cursor.advance(None, false, None).unwrap(), Round::Done);
        assert_eq!(cursor.after(), None);
    }

    #[test]
    fn failures_are_passed_over_and_told_once_at_the_end_of_the_round() {
        let cursor = SweepCursor::default();
        assert_eq!(cursor.advance(place(1), false, failed(2, "the first cause")).unwrap(), Round::More);
        assert_eq!(cursor.advance(place(2), false, failed(1, "another cause")).unwrap(), Round::More);
        assert_eq!(cursor.advance(place(3), false, None).unwrap(), Round::More);
        let sentence = cursor.advance(None, false, None).unwrap_err().to_string();
        assert!(sentence.contains("3 attachments") && sentence.contains("the first cause"), "{sentence}");
        assert_eq!(cursor.advance(None, true, None).unwrap(), Round::Done);
    }

    #[test]
    fn a_step_in_which_everything_failed_ends_the_round_but_not_the_walk() {
        let cursor = SweepCursor::default();
        let last = place(1);
        cursor.advance(last, true, failed(2, "away")).unwrap_err();
        assert_eq!(cursor.after(), last, "the next round begins behind it");
        assert_eq!(cursor.advance(None, false, None).unwrap(), Round::Done);
    }
}
