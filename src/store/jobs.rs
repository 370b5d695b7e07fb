//! Repeated jobs that one node does for all.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::store::database::run;
use crate::store::{Result, Store};

impl Store {
    /// Whether the job is due and ours to do. Of several nodes one gets it, and no other one before `period` is over; if
    /// that node dies meanwhile, another one does it then. On SQLite there is one node, and every job is its own.
    pub async fn claim_job(&self, name: &'static str, period: Duration, now: Timestamp) -> Result<bool> {
        if self.is_exclusive() {
            return Ok(true);
        }
        let mut tx = self.begin().await?;
        // A due time more than two periods ahead was written by a clock that was wrong.
        let statement = "INSERT INTO jobs (name, due_at) VALUES ($1, $3) ON CONFLICT (name) DO UPDATE \
                         SET due_at = excluded.due_at WHERE jobs.due_at <= $2 OR jobs.due_at > $4";
        let (due_at, absurd) = (now + period, now + 2 * period);
        let claimed = run!(&mut tx, sqlx::query(statement).bind(name).bind(now).bind(due_at).bind(absurd))?;
        tx.commit().await?;
        Ok(claimed == 1)
    }

    /// Gives a claimed job back that could not be done.
    pub async fn release_job(&self, name: &'static str, now: Timestamp) -> Result<()> {
        if self.is_exclusive() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        run!(&mut tx, sqlx::query("UPDATE jobs SET due_at = $2 WHERE name = $1").bind(name).bind(now))?;
        tx.commit().await
    }
}
