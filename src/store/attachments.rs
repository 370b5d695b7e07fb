//! Who may upload how much, and which attachments exist. Their bytes are in `blobs`.
//!
//! The row comes first, as pending, and goes last. So bytes without a row can't be, whatever happens in between.

use sqlx::types::Uuid;

use crate::clock::Timestamp;
use crate::model::ids::{AttachmentId, UserId};
use crate::store::{Result, Store, commit};

/// What an attempt to reserve room for an attachment came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// The bytes may be taken in.
    Yes,
    /// The account would pass its quota.
    QuotaExceeded,
}

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
const PENDING: i64 = 0;
const STORED: i64 = 1;
/// The upload took far too long. It can't become stored any more, and a sweep is about to remove it.
const ABANDONED: i64 = 2;

/// An account may have as many attachments as blocks of this size fit into its quota, and at least [`MIN_COUNT`].
/// Otherwise a million attachments of a byte each would fill the disk without passing any quota.
const BLOCK_BYTES: i64 = 4096;
const MIN_COUNT: i64 = 16;

impl Store {
    /// Reserves room for an upload of `size` bytes, unless the account would pass its quota. Everything that is
    /// stored or being uploaded counts. A quota of zero is none.
    pub async fn reserve_attachment(
        &self,
        user: UserId,
        id: AttachmentId,
        size: u64,
        quota: u64,
        now: Timestamp,
    ) -> Result<Reserved> {
        let [size, quota] = [size, quota].map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        let mut tx = self.begin().await?;
        if quota > 0 {
            let (count, used): (i64, i64) = sqlx::query_as(
                "SELECT COUNT(*), CAST(COALESCE(SUM(size), 0) AS BIGINT) FROM attachments WHERE user_id = $1",
            )
            .bind(user)
            .fetch_one(&mut *tx)
            .await?;
            if used.saturating_add(size) > quota || count >= (quota / BLOCK_BYTES).max(MIN_COUNT) {
                return Ok(Reserved::QuotaExceeded);
            }
        }
        sqlx::query("INSERT INTO attachments (id, user_id, size, stored, created_at) VALUES ($1, $2, $3, $4, $5)")
            .bind(id)
            .bind(user)
            .bind(size)
            .bind(PENDING)
            .bind(Timestamp::from_seconds(now.seconds()))
            .execute(&mut *tx)
            .await?;
        commit(tx).await?;
        Ok(Reserved::Yes)
    }

    /// Makes a pending attachment downloadable. False when its reservation was given up meanwhile: then its bytes have
    /// to go.
    pub async fn attachment_stored(&self, id: AttachmentId) -> Result<bool> {
        let mut tx = self.begin().await?;
        let changed = sqlx::query("UPDATE attachments SET stored = $2 WHERE id = $1 AND stored = $3")
            .bind(id)
            .bind(STORED)
            .bind(PENDING)
            .execute(&mut *tx)
            .await?
            .rows_affected();
        commit(tx).await?;
        Ok(changed == 1)
    }

    /// The attachment, if it is complete and has not expired at `now`.
    pub async fn attachment(&self, id: AttachmentId, now: Timestamp) -> Result<Option<StoredAttachment>> {
        let size: Option<i64> =
            sqlx::query_scalar("SELECT size FROM attachments WHERE id = $1 AND stored = $2 AND created_at > $3")
                .bind(id)
                .bind(STORED)
                .bind(now - self.limits.retention)
                .fetch_optional(&mut *self.read.get().await?)
                .await?;
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
        Ok(sqlx::query_as(
            "SELECT created_at, id FROM attachments
             WHERE created_at <= $1 AND (created_at, id) > ($2, $3)
             ORDER BY created_at, id LIMIT $4",
        )
        .bind(now - self.limits.retention)
        .bind(after.created_at)
        .bind(after.id)
        .bind(limit)
        .fetch_all(&mut *self.read.get().await?)
        .await?)
    }

    /// Gives up the oldest uploads that began before `before` and are still not complete, those after `after`. They
    /// can't complete any more, and are listed until they are forgotten.
    pub async fn stale_reservations(
        &self,
        before: Timestamp,
        after: Option<AttachmentAge>,
        limit: u32,
    ) -> Result<Vec<AttachmentAge>> {
        let after = after.unwrap_or_else(AttachmentAge::start);
        let mut tx = self.begin().await?;
        let mut stale: Vec<AttachmentAge> = sqlx::query_as(
            "UPDATE attachments SET stored = $1 WHERE id IN (
                 SELECT id FROM attachments
                 WHERE stored <> 1 AND created_at < $2 AND (created_at, id) > ($3, $4)
                 ORDER BY created_at, id LIMIT $5)
             RETURNING created_at, id",
        )
        .bind(ABANDONED)
        .bind(before)
        .bind(after.created_at)
        .bind(after.id)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        commit(tx).await?;
        stale.sort_unstable();
        Ok(stale)
    }

    /// Forgets attachments whose bytes are gone, whatever state they were in.
    pub async fn forget_attachments(&self, ids: &[AttachmentId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        let mut statement = sqlx::QueryBuilder::new("DELETE FROM attachments WHERE id IN (");
        let mut list = statement.separated(", ");
        for id in ids {
            list.push_bind(*id);
        }
        statement.push(")").build().execute(&mut *tx).await?;
        commit(tx).await
    }
}
