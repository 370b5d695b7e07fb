//! What has to be done to a database that was restored from a backup.

use crate::model::ids::UserId;
use crate::store::database::Tx;
use crate::store::spent_prekeys::{self, fingerprint};
use crate::store::{Result, Store};

/// One-time prekeys dropped by one transaction: up to 8 MB, if they are post-quantum ones.
const BATCH: i64 = 5000;

impl Store {
    /// Drops all one-time prekeys of all devices, and returns how many. For a database restored from a backup: some of its
    /// keys may have been handed out since the backup was made. All of them are remembered as used, so that no device stores
    /// one again.
    pub async fn delete_one_time_prekeys(&self) -> Result<u64> {
        let mut dropped = 0;
        loop {
            let mut tx = self.begin().await?;
            let some = delete_batch(&mut tx).await?;
            tx.commit().await?;
            dropped += some;
            if some == 0 {
                return Ok(dropped);
            }
        }
    }
}

/// Drops the oldest keys, and returns how many.
async fn delete_batch(tx: &mut Tx) -> Result<u64> {
    let dropped: Vec<(Option<UserId>, Vec<u8>)> = match tx {
        Tx::Sqlite(tx) => sqlx::query_as(DELETE).bind(BATCH).fetch_all(&mut **tx).await?,
        Tx::Postgres(tx) => {
            let counts: Vec<(i64,)> = tx.all(sqlx::query_as(DELETE_IN_POSTGRES).bind(BATCH)).await?;
            return Ok(counts.iter().map(|(count,)| count.unsigned_abs()).sum());
        }
    };
    let used = dropped.iter().filter_map(|(user, public_key)| user.map(|user| (user, fingerprint(user, public_key))));
    spent_prekeys::record(tx, &used.collect::<Vec<_>>()).await?;
    Ok(dropped.len() as u64)
}

const DELETE: &str = "\
    DELETE FROM one_time_prekeys WHERE no IN (SELECT no FROM one_time_prekeys ORDER BY no LIMIT $1) \
    RETURNING (SELECT d.user_id FROM devices d WHERE d.no = one_time_prekeys.device_no), public_key";

/// Records them in the same statement.
const DELETE_IN_POSTGRES: &str = "\
    WITH dropped AS ( \
        DELETE FROM one_time_prekeys WHERE no IN (SELECT no FROM one_time_prekeys ORDER BY no LIMIT $1) \
        RETURNING device_no, public_key), \
    recorded AS ( \
        INSERT INTO spent_prekeys (user_id, fingerprint) \
        SELECT d.user_id, substr(sha256(uuid_send(d.user_id) || dropped.public_key), 1, 8) \
        FROM dropped JOIN devices d ON d.no = dropped.device_no ON CONFLICT DO NOTHING) \
    SELECT count(*) FROM dropped";
