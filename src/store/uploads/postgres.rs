//! Uploads on PostgreSQL, each in a transaction of its own.

use std::time::Duration;

use crate::model::ids::AttachmentId;
use crate::store::attachments::{PENDING, STORED};
use crate::store::database::{Tx, on, run};
use crate::store::uploads::{AccountUsage, DAY, MAX_DEBT, Reservation, Reserved, began, cost, counted, wait, whole};
use crate::store::{Result, devices};

pub(super) async fn reserve(mut tx: Tx, upload: Reservation) -> Result<Reserved> {
    let reserved = admit(&mut tx, &upload).await?;
    tx.commit().await?;
    Ok(reserved)
}

async fn admit(tx: &mut Tx, upload: &Reservation) -> Result<Reserved> {
    if upload.allowance.quota_bytes > 0 {
        // So that two uploads don't pass the quota together.
        devices::lock_account(tx, upload.user).await?;
        let statement =
            "SELECT CAST(COALESCE(SUM(GREATEST(size, $2)), 0) AS BIGINT) FROM attachments WHERE user_id = $1";
        let bytes = on!(tx, |db| sqlx::query_scalar(statement).bind(upload.user).bind(counted(0)).fetch_one(db))?;
        if (AccountUsage { bytes, paid_at: None }).has_no_room(upload) {
            return Ok(Reserved::QuotaExceeded);
        }
    }
    if let Some(wait) = charge(tx, upload).await? {
        return Ok(Reserved::TooMuchToday(wait));
    }
    let statement = "INSERT INTO attachments (id, user_id, size, stored, created_at) VALUES ($1, $2, $3, $4, $5)";
    let Reservation { user, id, .. } = *upload;
    let (size, created_at) = (whole(upload.size), began(upload.born));
    run!(tx, sqlx::query(statement).bind(id).bind(user).bind(size).bind(PENDING).bind(created_at))?;
    Ok(Reserved::Yes)
}

/// Counts an upload against the day, or answers how long the account has to wait for that.
async fn charge(tx: &mut Tx, upload: &Reservation) -> Result<Option<Duration>> {
    let Some(cost) = cost(upload) else { return Ok(None) };
    let statement = "INSERT INTO upload_debts (user_id, paid_at) VALUES ($1, $2 + $3)
         ON CONFLICT (user_id) DO UPDATE
         SET paid_at = CASE WHEN upload_debts.paid_at > $2 AND upload_debts.paid_at <= $5 THEN upload_debts.paid_at \
             ELSE $2 END + $3
         WHERE upload_debts.paid_at <= $4 OR upload_debts.paid_at > $5";
    let cost_millis = i64::try_from(cost.as_millis()).expect("at most a day");
    let (latest, absurd) = (upload.now + DAY - cost, upload.now + MAX_DEBT);
    let charged = run!(
        tx,
        sqlx::query(statement).bind(upload.user).bind(upload.now).bind(cost_millis).bind(latest).bind(absurd)
    )?;
    if charged == 1 {
        return Ok(None);
    }
    let statement = "SELECT paid_at FROM upload_debts WHERE user_id = $1";
    let paid_at = on!(tx, |db| sqlx::query_scalar(statement).bind(upload.user).fetch_one(db))?;
    Ok(Some(wait(paid_at, latest)))
}

pub(super) async fn complete(mut tx: Tx, id: AttachmentId) -> Result<bool> {
    let statement = "UPDATE attachments SET stored = $2 WHERE id = $1 AND stored = $3";
    let completed = run!(&mut tx, sqlx::query(statement).bind(id).bind(STORED).bind(PENDING))? == 1;
    tx.commit().await?;
    Ok(completed)
}
