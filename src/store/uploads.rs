//! How an upload begins and ends in the database: the room that it asks for, and the moment from which it can be
//! downloaded.
//!
//! On SQLite, where one writes at a time, those that come at the same time share a transaction.

mod postgres;
mod sqlite;

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{AttachmentId, UserId};
use crate::store::batcher::QueryBatcher;
use crate::store::database::{Database, run};
use crate::store::shares::Rows;
use crate::store::sqlite::SqliteStore;
use crate::store::{Result, Store};

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

/// An upload that asks for room.
#[derive(Clone, Copy, Debug)]
pub struct Reservation {
    /// Whose quota and day it counts against.
    pub user: UserId,
    /// What it will be.
    pub id: AttachmentId,
    /// Bytes.
    pub size: u64,
    /// When it begins, by the trusted time.
    pub now: Timestamp,
    /// From when on its age counts.
    pub born: Timestamp,
    /// How much the account may upload.
    pub allowance: Allowance,
}

/// Uploads that share one commit.
const UPLOADS: usize = 64;
const DAY: Duration = Duration::from_hours(24);
/// No account owes more than a day. A later time was stored while a clock was wrong, and is ignored. The additional hour is for
/// clocks that differ.
const MAX_DEBT: Duration = Duration::from_hours(25);

/// An upload counts at least this many bytes, since that is what a file takes. Otherwise a million attachments of a byte
/// each would fill the disk without passing any quota.
const BLOCK_BYTES: u64 = 4096;

/// Uploads that begin or end at the same time.
pub(super) type Uploads = QueryBatcher<Step, StepResult>;

/// What an upload asks of the database.
#[derive(Clone, Copy)]
pub(super) enum Step {
    Begin(Reservation),
    Complete(AttachmentId),
}

/// The result of a step.
pub(super) enum StepResult {
    Begun(Reserved),
    Completed(bool),
}

/// None are under way yet.
pub(super) fn new_batcher() -> Arc<Uploads> {
    Arc::new(QueryBatcher::new(1, UPLOADS))
}

/// What counts against an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct AccountUsage {
    /// Bytes that the attachments stored or being uploaded count. Zero when there is no quota.
    bytes: i64,
    /// When, at the allowed bytes a day, all that was uploaded lately will have been allowed.
    paid_at: Option<Timestamp>,
}

impl Store {
    /// Reserves room for an upload, unless the account would pass its allowance. Everything that is stored or being
    /// uploaded counts against the quota; every upload that was begun counts against the day. To be awaited to the end.
    pub async fn reserve_attachment(&self, upload: Reservation) -> Result<Reserved> {
        match &self.database {
            Database::Postgres(_) => {
                postgres::reserve(self.begin_on(Rows::OfAccount(upload.user)).await?, upload).await
            }
            Database::Sqlite(sqlite) => match self.step(sqlite, Step::Begin(upload)).await? {
                StepResult::Begun(reserved) => Ok(reserved),
                StepResult::Completed(_) => unreachable!("who begins is told what came of that"),
            },
        }
    }

    /// Makes a pending attachment downloadable. False when its reservation was given up meanwhile: then its bytes have
    /// to go. To be awaited to the end.
    pub async fn attachment_stored(&self, id: AttachmentId) -> Result<bool> {
        match &self.database {
            Database::Postgres(_) => postgres::complete(self.begin().await?, id).await,
            Database::Sqlite(sqlite) => match self.step(sqlite, Step::Complete(id)).await? {
                StepResult::Completed(stored) => Ok(stored),
                StepResult::Begun(_) => unreachable!("who completes is told what came of that"),
            },
        }
    }

    /// Forgets up to `limit` accounts whose uploads of the last day don't count any more, and up to as many with a debt that
    /// a wrong clock has stored.
    pub async fn expire_upload_debts(&self, now: impl Into<Moment>, limit: u32) -> Result<u64> {
        let Moment { earliest, latest } = now.into();
        let mut tx = self.begin().await?;
        let old = "DELETE FROM upload_debts WHERE paid_at <= $1 AND user_id IN (
                 SELECT user_id FROM upload_debts WHERE paid_at <= $1 ORDER BY paid_at LIMIT $2)";
        let absurd = "DELETE FROM upload_debts WHERE paid_at > $1 AND user_id IN (
                 SELECT user_id FROM upload_debts WHERE paid_at > $1 ORDER BY paid_at LIMIT $2)";
        let mut forgotten = run!(&mut tx, sqlx::query(old).bind(earliest).bind(i64::from(limit)))?;
        forgotten += run!(&mut tx, sqlx::query(absurd).bind(latest + MAX_DEBT).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(forgotten)
    }

    async fn step(&self, sqlite: &SqliteStore, step: Step) -> Result<StepResult> {
        self.uploads.run(step, async |steps| sqlite::take(sqlite, steps).await).await
    }
}

impl AccountUsage {
    /// Admits an upload and counts it, or says why not.
    fn admit(&mut self, upload: &Reservation) -> Reserved {
        if self.has_no_room(upload) {
            return Reserved::QuotaExceeded;
        }
        if let Some(cost) = cost(upload) {
            let latest = upload.now + DAY - cost;
            match self.paid_at.filter(|paid_at| *paid_at <= upload.now + MAX_DEBT) {
                Some(paid_at) if paid_at > latest => return Reserved::TooMuchToday(wait(paid_at, latest)),
                paid_at => self.paid_at = Some(paid_at.unwrap_or(upload.now).max(upload.now) + cost),
            }
        }
        self.bytes = self.bytes.saturating_add(counted(upload.size));
        Reserved::Yes
    }

    /// True when the account would pass its quota.
    fn has_no_room(&self, upload: &Reservation) -> bool {
        let quota = whole(upload.allowance.quota_bytes);
        quota != 0 && self.bytes.saturating_add(counted(upload.size)) > quota
    }
}

/// What part of a day an upload takes of its account, if days are limited. The sizes of stored attachments would not do: of
/// an upload that was broken off nothing is left.
fn cost(upload: &Reservation) -> Option<Duration> {
    let bytes_per_day = upload.allowance.bytes_per_day;
    if bytes_per_day == 0 {
        return None;
    }
    let millis = (u128::from(upload.size.max(BLOCK_BYTES)) * DAY.as_millis()).div_ceil(u128::from(bytes_per_day));
    // The largest attachment may be larger than what is allowed in a day. It then takes all of it.
    Some(Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)).min(DAY))
}

/// How long until what is owed until `paid_at` is owed no longer than until `latest`.
fn wait(paid_at: Timestamp, latest: Timestamp) -> Duration {
    Duration::from_millis(paid_at.millis().saturating_sub(latest.millis()).unsigned_abs())
}

/// Beginnings are stored in whole seconds.
fn began(now: Timestamp) -> Timestamp {
    Timestamp::from_seconds(now.seconds())
}

/// The bytes that an attachment of this size counts.
fn counted(size: u64) -> i64 {
    whole(size.max(BLOCK_BYTES))
}

/// A number of bytes as the database counts them.
fn whole(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
