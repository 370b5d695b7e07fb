//! What has to be done to a database that was restored from a backup.

use crate::store::database::run;
use crate::store::{Result, Store};

/// One-time prekeys dropped by one transaction.
const FORGOTTEN_AT_ONCE: i64 = 20_000;

impl Store {
    /// Drops all one-time prekeys of everybody, and answers how many. For a database restored from a backup: some of its
    /// keys may have been handed out since the backup was made.
    pub async fn forget_one_time_prekeys(&self) -> Result<u64> {
        let statement =
            "DELETE FROM one_time_prekeys WHERE no IN (SELECT no FROM one_time_prekeys ORDER BY no LIMIT $1)";
        let mut dropped = 0;
        loop {
            let mut tx = self.begin().await?;
            let some = run!(&mut tx, sqlx::query(statement).bind(FORGOTTEN_AT_ONCE))?;
            tx.commit().await?;
            dropped += some;
            if some == 0 {
                return Ok(dropped);
            }
        }
    }
}
