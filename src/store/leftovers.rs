//! Rows of devices and accounts that are gone. A removal deletes its own rows, with three exceptions: a node of the former
//! version knows no notices, a notice may be written while its device is being removed, and of the used prekeys of an account
//! one transaction deletes a bounded number.

use crate::model::ids::{DeviceNo, UserId};
use crate::store::database::{Tx, reading};
use crate::store::{Result, Store, json_list, spent_prekeys};

/// Where a walk over what is kept for devices and accounts has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// Behind the notice of this device.
    Notices(DeviceNo),
    /// Behind the used prekeys of this account.
    SpentPrekeys(UserId),
}

impl Leftovers {
    /// The beginning of the walk.
    pub const START: Self = Self::Notices(DeviceNo(0));
}

impl Store {
    /// Goes on with a walk: looks at up to `limit` devices or accounts, and deletes the rows of those that are gone, of an
    /// account at most 10 000. Returns where to go on; `None` at the end.
    pub async fn forget_leftovers(&self, from: Leftovers, limit: u32) -> Result<Option<Leftovers>> {
        match from {
            Leftovers::Notices(after) => self.forget_notices(after, limit).await.map(Some),
            Leftovers::SpentPrekeys(after) => {
                Ok(self.forget_spent_prekeys(after, limit).await?.map(Leftovers::SpentPrekeys))
            }
        }
    }

    async fn forget_notices(&self, after: DeviceNo, limit: u32) -> Result<Leftovers> {
        let rows: Vec<(DeviceNo, bool)> =
            reading!(self, |db| sqlx::query_as(NOTICES).bind(after).bind(i64::from(limit)).fetch_all(db))?;
        let gone: Vec<DeviceNo> = rows.iter().filter(|row| !row.1).map(|row| row.0).collect();
        // Numbers are never used again, so what is gone now is gone for good.
        if !gone.is_empty() {
            let mut tx = self.begin().await?;
            match &mut tx {
                Tx::Sqlite(tx) => {
                    let statement = "DELETE FROM inbox_notices WHERE device_no IN (SELECT value FROM json_each($1))";
                    let list = json_list(gone.iter().map(|no| no.0));
                    sqlx::query(statement).bind(list).execute(&mut **tx).await?;
                }
                Tx::Postgres(tx) => {
                    let statement = "DELETE FROM inbox_notices WHERE device_no = ANY($1)";
                    tx.run(sqlx::query(statement).bind(&gone)).await?;
                }
            }
            tx.commit().await?;
        }
        Ok(match rows.last() {
            Some((last, _)) if rows.len() >= limit as usize => Leftovers::Notices(*last),
            _ => Leftovers::SpentPrekeys(UserId::NIL),
        })
    }

    async fn forget_spent_prekeys(&self, after: UserId, limit: u32) -> Result<Option<UserId>> {
        let rows: Vec<(UserId, bool)> =
            reading!(self, |db| sqlx::query_as(HOLDERS).bind(after).bind(i64::from(limit)).fetch_all(db))?;
        let mut done = after;
        for (user, exists) in &rows {
            if !exists {
                let mut tx = self.begin().await?;
                let forgotten = spent_prekeys::forget(&mut tx, *user).await?;
                tx.commit().await?;
                if forgotten >= u64::from(spent_prekeys::FORGOTTEN_AT_ONCE) {
                    return Ok(Some(done));
                }
            }
            done = *user;
        }
        Ok((rows.len() >= limit as usize).then_some(done))
    }
}

/// Devices with a notice, and whether they exist.
const NOTICES: &str = "\
    SELECT n.device_no, EXISTS (SELECT 1 FROM devices d WHERE d.no = n.device_no) \
    FROM (SELECT device_no FROM inbox_notices WHERE device_no > $1 ORDER BY device_no LIMIT $2) n ORDER BY n.device_no";

/// Accounts with used prekeys, and whether they exist. It jumps from account to account in the index: one may have a million
/// rows.
const HOLDERS: &str = "\
    WITH RECURSIVE holders (user_id, place) AS ( \
        SELECT (SELECT user_id FROM spent_prekeys WHERE user_id > $1 ORDER BY user_id LIMIT 1), 1 \
        UNION ALL \
        SELECT (SELECT u.user_id FROM spent_prekeys u WHERE u.user_id > h.user_id ORDER BY u.user_id LIMIT 1), h.place + 1 \
        FROM holders h WHERE h.user_id IS NOT NULL AND h.place < $2) \
    SELECT h.user_id, EXISTS (SELECT 1 FROM users u WHERE u.id = h.user_id) \
    FROM holders h WHERE h.user_id IS NOT NULL ORDER BY h.user_id";
