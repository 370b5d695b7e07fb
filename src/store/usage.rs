//! When accounts were last used, and the removal of those that are not used any more.
//!
//! A use is counted in service days: days on which at least one server of the deployment ran. So neither a long downtime
//! nor a wrong clock makes an account look unused; a clock that jumps ahead by a year adds one day. A log-in or a refresh
//! writes the day in its own transaction. Any other request with a valid token only notes the account in memory, and a job
//! writes what was noted. Each account is written at most once a day and node.

use std::collections::HashSet;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::ids::{Address, DeviceNo, UserId};
use crate::store::database::{Database, Tx, on, reading, run};
use crate::store::{Result, Store, devices, json_list, spent_prekeys};
use crate::telemetry::metrics::Left;

/// Cells that remember which accounts were noted today; a collision costs one more write.
const CELLS: usize = 1 << 14;
/// Noted accounts that wait to be written. Above that an account is noted with a later request.
const MAX_PENDING: usize = 50_000;
/// Accounts in one statement.
const BATCH: usize = 500;

/// The uses that this node has seen.
pub(super) struct Usage {
    /// The number of the current service day, as far as this node knows; zero before it knows.
    number: AtomicI64,
    recorded: Box<[AtomicU64]>,
    pending: Mutex<HashSet<UserId>>,
}

/// From which service day on an account counts as used. `None` means that it does not expire.
#[derive(Clone, Copy, Debug)]
pub struct IdleCutoffs {
    /// For accounts that have been used after their sign-up.
    pub used_before: Option<i64>,
    /// For accounts that have not.
    pub signed_up_before: Option<i64>,
}

impl Usage {
    pub(super) fn new() -> Self {
        let recorded = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        Self { number: AtomicI64::new(0), recorded, pending: Mutex::default() }
    }

    /// The number of the current service day, from 1 on; `None` until [`Store::service_day`] has been asked.
    pub(super) fn day(&self) -> Option<i64> {
        Some(self.number.load(Ordering::Relaxed)).filter(|number| *number > 0)
    }

    /// True when the account's use of today is written, or waits to be.
    pub(super) fn is_recorded(&self, user: UserId) -> bool {
        let (cell, tag) = self.cell(user);
        cell.load(Ordering::Relaxed) == tag
    }

    /// Remembers that the account's use of today is written, or waits to be.
    pub(super) fn set_recorded(&self, user: UserId) {
        let (cell, tag) = self.cell(user);
        cell.store(tag, Ordering::Relaxed);
    }

    /// Ids are random, so their bits need no hashing: some choose the cell, others tell the accounts of a cell apart.
    fn cell(&self, user: UserId) -> (&AtomicU64, u64) {
        let [head, tail] = [0, 8].map(|at| {
            let bytes = user.as_bytes()[at..at + 8].try_into().expect("half of a UUID");
            u64::from_be_bytes(bytes)
        });
        let day = self.number.load(Ordering::Relaxed).unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (&self.recorded[tail as usize % CELLS], head ^ day)
    }

    fn pending(&self) -> MutexGuard<'_, HashSet<UserId>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Notes a use of the account, to be written later. It costs one look at memory if the account was noted today.
    pub fn record_use(&self, user: UserId) {
        if self.usage.is_recorded(user) {
            return;
        }
        let mut pending = self.usage.pending();
        if pending.len() < MAX_PENDING {
            pending.insert(user);
            self.usage.set_recorded(user);
        }
    }

    /// The number of the service day for `today`, which is in days since 1970. The first call on a later day gets the next
    /// number, however many days of the calendar lie between.
    pub async fn service_day(&self, today: i64) -> Result<i64> {
        let mut tx = self.begin().await?;
        let statement = "INSERT INTO service_days (id, day, number) VALUES (1, $1, 1) ON CONFLICT (id) DO UPDATE \
                         SET day = excluded.day, number = service_days.number + 1 WHERE service_days.day < excluded.day";
        run!(&mut tx, sqlx::query(statement).bind(today))?;
        let statement = "SELECT number FROM service_days WHERE id = 1";
        let number: i64 = on!(&mut tx, |db| sqlx::query_scalar(statement).fetch_one(db))?;
        tx.commit().await?;
        self.usage.number.fetch_max(number, Ordering::Relaxed);
        Ok(number)
    }

    /// Writes the uses that were noted. What could not be written is noted again.
    pub async fn flush_uses(&self) -> Result<()> {
        let mut recorded: Vec<UserId> = std::mem::take(&mut *self.usage.pending()).into_iter().collect();
        recorded.sort_unstable();
        for (n, batch) in recorded.chunks(BATCH).enumerate() {
            if let Err(error) = self.mark_used(batch).await {
                self.usage.pending().extend(&recorded[n * BATCH..]);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Counts an open socket as a use of its account: notes the accounts of these devices.
    pub async fn record_device_uses(&self, open: &[DeviceNo]) -> Result<()> {
        for batch in open.chunks(BATCH) {
            let users: Vec<UserId> = match &self.database {
                Database::Sqlite(sqlite) => {
                    let statement =
                        "SELECT d.user_id FROM json_each($1) asked CROSS JOIN devices d ON d.no = asked.value";
                    let find = sqlx::query_scalar(statement).bind(json_list(batch.iter().map(|no| no.0)));
                    find.fetch_all(&mut *sqlite.read.get().await?).await?
                }
                Database::Postgres(postgres) => {
                    let statement = "SELECT user_id FROM devices WHERE no = ANY($1)";
                    let rows: Vec<(UserId,)> = postgres.all(sqlx::query_as(statement).bind(batch)).await?;
                    rows.into_iter().map(|(user,)| user).collect()
                }
            };
            users.into_iter().for_each(|user| self.record_use(user));
        }
        Ok(())
    }

    /// Dates up to `limit` accounts whose last use is unknown: those of before the upgrade, and those that a node of the
    /// former version makes. They count as used today. Returns how many there were.
    pub async fn date_unknown_uses(&self, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let statement = tx.sql(
            "UPDATE users SET used_on = $1 WHERE id IN \
             (SELECT id FROM users WHERE is_unused = $3 AND used_on IS NULL LIMIT $2)",
            // What another transaction holds is being used.
            "UPDATE users SET used_on = $1 WHERE id IN \
             (SELECT id FROM users WHERE is_unused = $3 AND used_on IS NULL LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED)",
        );
        let day = self.usage.day();
        let dated = run!(&mut tx, sqlx::query(statement).bind(day).bind(i64::from(limit)).bind(false))?;
        tx.commit().await?;
        Ok(dated)
    }

    /// Up to `limit` accounts that are not used any more.
    pub async fn idle_accounts(&self, disuse: IdleCutoffs, limit: u32) -> Result<Vec<UserId>> {
        let mut found = Vec::new();
        for (is_unused, before) in [(false, disuse.used_before), (true, disuse.signed_up_before)] {
            let Some(before) = before else { continue };
            let statement = "SELECT id FROM users WHERE is_unused = $1 AND used_on < $2 ORDER BY used_on LIMIT $3";
            let some: Vec<UserId> = reading!(self, |db| sqlx::query_scalar(statement)
                .bind(is_unused)
                .bind(before)
                .bind(i64::from(limit))
                .fetch_all(db))?;
            found.extend(some);
        }
        found.truncate(limit as usize);
        Ok(found)
    }

    /// Removes an account that is still not used, with its devices, keys, waiting mail and link sessions; its name is free
    /// again. What it sent to others, attachments included, stays until its own age. Returns the devices that are gone, or
    /// `None` when the account is gone or was used meanwhile.
    pub async fn remove_idle_account(&self, user: UserId, disuse: IdleCutoffs) -> Result<Option<Vec<Address>>> {
        let mut tx = self.begin().await?;
        devices::lock_account(&mut tx, user).await?;
        // In the order in which a log-in takes them: the devices, then the account. So either the log-in is seen here, or
        // it finds the device gone.
        let statement = tx.sql(
            "SELECT no FROM devices WHERE user_id = $1 ORDER BY no",
            "SELECT no FROM devices WHERE user_id = $1 ORDER BY no FOR UPDATE",
        );
        let gone: Vec<DeviceNo> = on!(&mut tx, |db| sqlx::query_scalar(statement).bind(user).fetch_all(db))?;
        let statement = tx.sql(
            "SELECT used_on, is_unused FROM users WHERE id = $1",
            "SELECT used_on, is_unused FROM users WHERE id = $1 FOR UPDATE",
        );
        let found: Option<(Option<i64>, bool)> =
            on!(&mut tx, |db| sqlx::query_as(statement).bind(user).fetch_optional(db))?;
        let is_disused = found.is_some_and(|(used_on, is_unused)| {
            let before = if is_unused { disuse.signed_up_before } else { disuse.used_before };
            used_on.zip(before).is_some_and(|(used_on, before)| used_on < before)
        });
        if !is_disused || self.usage.is_recorded(user) {
            return Ok(None);
        }
        let mail = devices::delete_devices(&mut tx, &gone).await?;
        delete_account(&mut tx, user).await?;
        tx.commit().await?;
        self.metrics.left.add(Left::Removed, mail);
        self.metrics.accounts_expired.increment(());
        Ok(Some(gone.into_iter().map(|device| Address { user, device }).collect()))
    }

    async fn mark_used(&self, users: &[UserId]) -> Result<()> {
        let Some(day) = self.usage.day() else { return Ok(()) };
        let mut tx = self.begin().await?;
        match &mut tx {
            Tx::Sqlite(tx) => {
                let statement = "UPDATE users SET used_on = $1, is_unused = 0 \
                     WHERE id IN (SELECT substr($2, asked.value, 16) FROM json_each($3) asked) \
                     AND (used_on IS NULL OR used_on < $1 OR is_unused)";
                let ids: Vec<u8> = users.iter().flat_map(|user| *user.as_bytes()).collect();
                let offsets = json_list((0..users.len()).map(|n| n * 16 + 1));
                sqlx::query(statement).bind(day).bind(ids).bind(offsets).execute(&mut **tx).await?;
            }
            // In one order on all nodes, so that two that mark the same accounts never wait for each other.
            Tx::Postgres(tx) => {
                let statement = "UPDATE users SET used_on = $1, is_unused = false WHERE id IN \
                     (SELECT id FROM users WHERE id = ANY($2) AND (used_on IS NULL OR used_on < $1 OR is_unused) \
                      ORDER BY id FOR NO KEY UPDATE)";
                tx.run(sqlx::query(statement).bind(day).bind(users)).await?;
            }
        }
        tx.commit().await
    }
}

/// Counts a use of the account in this transaction.
pub(super) async fn mark(tx: &mut Tx, user: UserId, day: Option<i64>) -> Result<()> {
    let Some(day) = day else { return Ok(()) };
    let statement = "UPDATE users SET used_on = $2, is_unused = $3 \
                     WHERE id = $1 AND (used_on IS NULL OR used_on < $2 OR is_unused)";
    run!(tx, sqlx::query(statement).bind(user).bind(day).bind(false))?;
    Ok(())
}

/// Deletes what belongs to the account and not to a device of it.
async fn delete_account(tx: &mut Tx, user: UserId) -> Result<()> {
    // In an account that was used for years more are left, which [`Store::forget_leftovers`] deletes.
    spent_prekeys::forget(tx, user).await?;
    for statement in [
        "DELETE FROM link_sessions WHERE user_id = $1",
        "DELETE FROM upload_debts WHERE user_id = $1",
        "DELETE FROM send_debts WHERE user_id = $1",
    ] {
        run!(tx, sqlx::query(statement).bind(user))?;
    }
    if matches!(tx, Tx::Postgres(_)) {
        run!(tx, sqlx::query("DELETE FROM account_locks WHERE user_id = $1").bind(user))?;
    }
    run!(tx, sqlx::query("DELETE FROM users WHERE id = $1").bind(user))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_noted_once_a_day() {
        let (usage, user, other) = (Usage::new(), UserId::random(), UserId::random());
        assert!(!usage.is_recorded(user));
        usage.set_recorded(user);
        assert!(usage.is_recorded(user) && !usage.is_recorded(other));
        usage.number.store(8, Ordering::Relaxed);
        assert!(!usage.is_recorded(user), "it is another day");
    }
}
