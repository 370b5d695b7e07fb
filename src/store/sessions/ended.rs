//! Clears the seconds up to which a device's access tokens are void or issued, when all its tokens have expired.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::ids::DeviceNo;
use crate::store::database::{on, run};
use crate::store::{Result, Store};

/// How long the seconds are kept after they have passed: by then an open socket has noticed that its session was ended.
const KEPT: Duration = Duration::from_hours(24);

impl Store {
    /// Sets `tokens_revoked_until` and `tokens_issued_to` to zero where they lie more than a day before `now`: they only tell when
    /// the device logged in or out. Looks at up to `limit` devices with numbers above `after`, and returns the last of them,
    /// or `None` when there are no more.
    pub async fn clear_expired_revocations(
        &self,
        after: DeviceNo,
        now: Timestamp,
        limit: u32,
    ) -> Result<Option<DeviceNo>> {
        let mut tx = self.begin().await?;
        let statement = "SELECT no FROM devices WHERE no > $1 ORDER BY no LIMIT 1 OFFSET $2";
        let full: Option<DeviceNo> =
            on!(&mut tx, |db| sqlx::query_scalar(statement).bind(after).bind(i64::from(limit) - 1).fetch_optional(db))?;
        let statement = tx.sql(
            "UPDATE devices SET \
             tokens_void_to = CASE WHEN tokens_void_to <= $3 THEN 0 ELSE tokens_void_to END, \
             tokens_issued_to = CASE WHEN tokens_issued_to <= $3 THEN 0 ELSE tokens_issued_to END \
             WHERE no > $1 AND no <= $2 \
             AND (tokens_void_to BETWEEN 1 AND $3 OR tokens_issued_to BETWEEN 1 AND $3)",
            // A row that another transaction holds has its turn in the next walk.
            "UPDATE devices SET \
             tokens_void_to = CASE WHEN tokens_void_to <= $3 THEN 0 ELSE tokens_void_to END, \
             tokens_issued_to = CASE WHEN tokens_issued_to <= $3 THEN 0 ELSE tokens_issued_to END \
             WHERE no IN (SELECT no FROM devices WHERE no > $1 AND no <= $2 \
             AND (tokens_void_to BETWEEN 1 AND $3 OR tokens_issued_to BETWEEN 1 AND $3) FOR NO KEY UPDATE SKIP LOCKED)",
        );
        let last = full.unwrap_or(DeviceNo(i64::MAX));
        run!(&mut tx, sqlx::query(statement).bind(after).bind(last).bind((now - KEPT).seconds()))?;
        tx.commit().await?;
        Ok(full)
    }
}
