//! Which attachments exist. Their bytes are in `blobs`, and how a row comes here in `uploads`.
//!
//! The row is there, as pending, before the bytes become the attachment, and goes last. So an object without a row can't
//! be, whatever happens in between.

use sqlx::types::Uuid;

use crate::clock::Timestamp;
use crate::model::ids::AttachmentId;
use crate::store::database::{Tx, on, reading, run};
use crate::store::messages::CLOCK_TOLERANCE;
use crate::store::{Result, Store};

/// An attachment that can be downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredAttachment {
    /// Bytes.
    pub size: u64,
}

/// An attachment's place among all, in the order of age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, sqlx::FromRow)]
pub struct AttachmentAge {
    /// When its upload began, in whole seconds.
    pub created_at: Timestamp,
    /// The attachment.
    pub id: AttachmentId,
}

impl AttachmentAge {
    /// The place before all attachments.
    fn start() -> Self {
        let id = AttachmentId::from_bytes(Uuid::nil().as_bytes()).expect("a UUID has 16 bytes");
        Self { created_at: Timestamp::from_millis(i64::MIN), id }
    }
}

/// Values of the column `stored`.
pub(super) const PENDING: i32 = 0;
pub(super) const STORED: i32 = 1;
/// The upload took far too long. It can't become stored any more, and a sweep is about to remove it.
const ABANDONED: i32 = 2;

impl Store {
    /// The attachment, if it is complete and has not expired at `now`.
    pub async fn attachment(&self, id: AttachmentId, now: Timestamp) -> Result<Option<StoredAttachment>> {
        let statement = "SELECT size FROM attachments WHERE id = $1 AND stored = $2 AND created_at > $3";
        let since = now - self.limits.retention;
        let size: Option<i64> =
            reading!(self, |db| sqlx::query_scalar(statement).bind(id).bind(STORED).bind(since).fetch_optional(db))?;
        Ok(size.map(|size| StoredAttachment { size: size.unsigned_abs() }))
    }

    /// The oldest attachments that have expired at `now`, those after `after`.
    pub async fn expired_attachments(
        &self,
        now: Timestamp,
        after: Option<AttachmentAge>,
        limit: u32,
    ) -> Result<Vec<AttachmentAge>> {
        let after = after.unwrap_or_else(AttachmentAge::start);
        let statement = "SELECT created_at, id FROM attachments
             WHERE created_at <= $1 AND (created_at, id) > ($2, $3)
             ORDER BY created_at, id LIMIT $4";
        reading!(self, |db| sqlx::query_as(statement)
            .bind(now - self.limits.retention)
            .bind(after.created_at)
            .bind(after.id)
            .bind(i64::from(limit))
            .fetch_all(db))
    }

    /// Lets up to `limit` attachments whose uploads seem to begin a day or more behind `latest` count as of `now`: the clock
    /// was wrong then, and they would outlive their age. Answers how many.
    pub async fn correct_attachments(&self, now: Timestamp, latest: Timestamp, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let statement = "UPDATE attachments SET created_at = $1 WHERE id IN \
                         (SELECT id FROM attachments WHERE created_at > $2 ORDER BY created_at LIMIT $3)";
        let (second, ahead) = (Timestamp::from_seconds(now.seconds()), latest + CLOCK_TOLERANCE);
        let corrected = run!(&mut tx, sqlx::query(statement).bind(second).bind(ahead).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(corrected)
    }

    /// Gives up the oldest uploads that began before `before` and are still not complete, those after `after`. They
    /// can't complete any more, and are listed until they are forgotten.
    pub async fn stale_reservations(
        &self,
        before: Timestamp,
        after: Option<AttachmentAge>,
        limit: u32,
    ) -> Result<Vec<AttachmentAge>> {
        self.give_uploads_up(before, i64::MAX, after, limit).await
    }

    /// The same for those that had until `before` for as many bytes as they have, at `least_rate` bytes a second.
    pub async fn overdue_reservations(
        &self,
        before: Timestamp,
        least_rate: u64,
        after: Option<AttachmentAge>,
        limit: u32,
    ) -> Result<Vec<AttachmentAge>> {
        let bytes_per_millisecond = i64::try_from(least_rate / 1000).unwrap_or(i64::MAX).max(1);
        self.give_uploads_up(before, bytes_per_millisecond, after, limit).await
    }

    async fn give_uploads_up(
        &self,
        before: Timestamp,
        bytes_per_millisecond: i64,
        after: Option<AttachmentAge>,
        limit: u32,
    ) -> Result<Vec<AttachmentAge>> {
        let after = after.unwrap_or_else(AttachmentAge::start);
        let mut tx = self.begin().await?;
        // The first comparison of `created_at` is what the index answers.
        let statement = "UPDATE attachments SET stored = $1 WHERE stored <> 1 AND id IN (
                 SELECT id FROM attachments
                 WHERE stored <> 1 AND created_at < $2 AND created_at + size / $6 < $2
                   AND (created_at, id) > ($3, $4)
                 ORDER BY created_at, id LIMIT $5)
             RETURNING created_at, id";
        let mut stale: Vec<AttachmentAge> = on!(&mut tx, |db| sqlx::query_as(statement)
            .bind(ABANDONED)
            .bind(before)
            .bind(after.created_at)
            .bind(after.id)
            .bind(i64::from(limit))
            .bind(bytes_per_millisecond)
            .fetch_all(db))?;
        tx.commit().await?;
        stale.sort_unstable();
        Ok(stale)
    }

    /// Forgets attachments whose bytes are gone, whatever state they were in.
    pub async fn delete_attachments(&self, ids: &[AttachmentId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        match &mut tx {
            Tx::Sqlite(tx) => {
                let mut statement = sqlx::QueryBuilder::new("DELETE FROM attachments WHERE id IN (");
                let mut list = statement.separated(", ");
                for id in ids {
                    list.push_bind(*id);
                }
                statement.push(")").build().execute(&mut **tx).await?;
            }
            Tx::Postgres(tx) => {
                tx.run(sqlx::query("DELETE FROM attachments WHERE id = ANY($1)").bind(ids)).await?;
            }
        }
        tx.commit().await
    }
}
