//! Who may upload how much, and which attachments exist. Their bytes are in `blobs`.
//!
//! The row comes first, as pending, and goes last. So bytes without a row can't be, whatever happens in between.

use std::sync::Arc;
use std::time::Duration;

use sqlx::types::Uuid;

use crate::clock::Timestamp;
use crate::model::ids::{AttachmentId, UserId};
use crate::store::database::{Database, Tx, on, reading, run};
use crate::store::gather::Gather;
use crate::store::{Result, Store, devices};

/// What an attempt to reserve room for an attachment came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// The bytes may be taken in.
    Yes,
    /// The account would pass its quota.
    QuotaExceeded,
    /// The account has uploaded too much lately. It may go on after this time.
    TooMuchToday(Duration),
}

/// How much an account may upload. Zero means no limit.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Bytes stored or being uploaded at a time.
    pub quota_bytes: u64,
    /// Bytes in a day.
    pub bytes_per_day: u64,
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

/// Uploads that share one commit.
const UPLOADS: usize = 64;
const DAY: Duration = Duration::from_hours(24);

/// Values of the column `stored`.
const PENDING: i32 = 0;
const STORED: i32 = 1;
/// The upload took far too long. It can't become stored any more, and a sweep is about to remove it.
const ABANDONED: i32 = 2;

/// An account may have as many attachments as blocks of this size fit into its quota, and at least [`MIN_COUNT`].
/// Otherwise a million attachments of a byte each would fill the disk without passing any quota.
const BLOCK_BYTES: i64 = 4096;
const MIN_COUNT: i64 = 16;

/// Uploads that begin or end at the same time. On SQLite, where one writes at a time, they share the wait for the disk.
pub(super) struct Uploads {
    begun: Arc<Gather<Reservation, Reserved>>,
    complete: Arc<Gather<AttachmentId, bool>>,
}

impl Uploads {
    pub(super) fn new() -> Self {
        Self { begun: Arc::new(Gather::new(1, UPLOADS)), complete: Arc::new(Gather::new(1, UPLOADS)) }
    }
}

/// An upload that asks for room.
#[derive(Clone, Copy, Debug)]
pub struct Reservation {
    /// Whose quota and day it counts against.
    pub user: UserId,
    /// What it will be.
    pub id: AttachmentId,
    /// Bytes.
    pub size: u64,
    /// When it begins.
    pub now: Timestamp,
    /// How much the account may upload.
    pub allowance: Allowance,
}

impl Store {
    /// Reserves room for an upload, unless the account would pass its allowance. Everything that is stored or being
    /// uploaded counts against the quota; every upload that was begun counts against the day. To be awaited to the end.
    pub async fn reserve_attachment(&self, upload: Reservation) -> Result<Reserved> {
        match &self.database {
            Database::Sqlite(_) => self.uploads.begun.ask(upload, async |all| self.reserve(all).await).await,
            Database::Postgres(_) => Ok(self.reserve(&[upload]).await?.remove(0)),
        }
    }

    async fn reserve(&self, uploads: &[Reservation]) -> Result<Vec<Reserved>> {
        let mut tx = self.begin().await?;
        let mut reserved = Vec::with_capacity(uploads.len());
        for upload in uploads {
            reserved.push(reserve(&mut tx, upload).await?);
        }
        tx.commit().await?;
        Ok(reserved)
    }

    /// Forgets up to `limit` accounts whose uploads of the last day don't count any more.
    pub async fn expire_upload_debts(&self, now: Timestamp, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let statement = "DELETE FROM upload_debts WHERE paid_at <= $1 AND user_id IN (
                 SELECT user_id FROM upload_debts WHERE paid_at <= $1 ORDER BY paid_at LIMIT $2)";
        let forgotten = run!(&mut tx, sqlx::query(statement).bind(now).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(forgotten)
    }

    /// Makes a pending attachment downloadable. False when its reservation was given up meanwhile: then its bytes have
    /// to go. To be awaited to the end.
    pub async fn attachment_stored(&self, id: AttachmentId) -> Result<bool> {
        match &self.database {
            Database::Sqlite(_) => self.uploads.complete.ask(id, async |all| self.complete(all).await).await,
            Database::Postgres(_) => Ok(self.complete(&[id]).await?.contains(&true)),
        }
    }

    async fn complete(&self, ids: &[AttachmentId]) -> Result<Vec<bool>> {
        let mut tx = self.begin().await?;
        let statement = "UPDATE attachments SET stored = $2 WHERE id = $1 AND stored = $3";
        let mut complete = Vec::with_capacity(ids.len());
        for id in ids {
            complete.push(run!(&mut tx, sqlx::query(statement).bind(id).bind(STORED).bind(PENDING))? == 1);
        }
        tx.commit().await?;
        Ok(complete)
    }

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
        let statement = "UPDATE attachments SET stored = $1 WHERE stored <> 1 AND id IN (
                 SELECT id FROM attachments
                 WHERE stored <> 1 AND created_at < $2 AND (created_at, id) > ($3, $4)
                 ORDER BY created_at, id LIMIT $5)
             RETURNING created_at, id";
        let mut stale: Vec<AttachmentAge> = on!(&mut tx, |db| sqlx::query_as(statement)
            .bind(ABANDONED)
            .bind(before)
            .bind(after.created_at)
            .bind(after.id)
            .bind(i64::from(limit))
            .fetch_all(db))?;
        tx.commit().await?;
        stale.sort_unstable();
        Ok(stale)
    }

    /// Forgets attachments whose bytes are gone, whatever state they were in.
    pub async fn forget_attachments(&self, ids: &[AttachmentId]) -> Result<()> {
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

async fn reserve(tx: &mut Tx, upload: &Reservation) -> Result<Reserved> {
    let Reservation { user, id, size, now, allowance } = *upload;
    if is_over_quota(tx, user, size, allowance.quota_bytes).await? {
        return Ok(Reserved::QuotaExceeded);
    }
    if let Some(wait) = charge(tx, user, size, allowance.bytes_per_day, now).await? {
        return Ok(Reserved::TooMuchToday(wait));
    }
    let statement = "INSERT INTO attachments (id, user_id, size, stored, created_at) VALUES ($1, $2, $3, $4, $5)";
    let created_at = Timestamp::from_seconds(now.seconds());
    run!(tx, sqlx::query(statement).bind(id).bind(user).bind(whole(size)).bind(PENDING).bind(created_at))?;
    Ok(Reserved::Yes)
}

async fn is_over_quota(tx: &mut Tx, user: UserId, size: u64, quota: u64) -> Result<bool> {
    if quota == 0 {
        return Ok(false);
    }
    let (size, quota) = (whole(size), whole(quota));
    // So that two uploads don't pass the quota together.
    devices::lock_account(tx, user).await?;
    let statement = "SELECT COUNT(*), CAST(COALESCE(SUM(size), 0) AS BIGINT) FROM attachments WHERE user_id = $1";
    let (count, used): (i64, i64) = on!(tx, |db| sqlx::query_as(statement).bind(user).fetch_one(db))?;
    Ok(used.saturating_add(size) > quota || count >= (quota / BLOCK_BYTES).max(MIN_COUNT))
}

/// Counts an upload against the day, or answers how long the account has to wait for that. The sizes of stored
/// attachments would not do: of an upload that was broken off nothing is left.
async fn charge(tx: &mut Tx, user: UserId, size: u64, bytes_per_day: u64, now: Timestamp) -> Result<Option<Duration>> {
    if bytes_per_day == 0 {
        return Ok(None);
    }
    let millis = (u128::from(size) * DAY.as_millis()).div_ceil(u128::from(bytes_per_day));
    // The largest attachment may be larger than what is allowed in a day. It then takes all of it.
    let cost = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)).min(DAY);
    let statement = "INSERT INTO upload_debts (user_id, paid_at) VALUES ($1, $2 + $3)
         ON CONFLICT (user_id) DO UPDATE
         SET paid_at = CASE WHEN upload_debts.paid_at > $2 THEN upload_debts.paid_at ELSE $2 END + $3
         WHERE upload_debts.paid_at <= $4";
    let cost_millis = i64::try_from(cost.as_millis()).expect("at most a day");
    let latest = now + DAY - cost;
    if run!(tx, sqlx::query(statement).bind(user).bind(now).bind(cost_millis).bind(latest))? == 1 {
        return Ok(None);
    }
    let statement = "SELECT paid_at FROM upload_debts WHERE user_id = $1";
    let paid_at: Timestamp = on!(tx, |db| sqlx::query_scalar(statement).bind(user).fetch_one(db))?;
    Ok(Some(Duration::from_millis(paid_at.millis().saturating_sub(latest.millis()).unsigned_abs())))
}

/// A number of bytes as the database counts them.
fn whole(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
