//! Queueing: the one transaction in which sends are evaluated and stored, and acknowledged messages deleted.
//!
//! The judgement and its order are the same on both databases; their statements are in `sqlite` and `postgres`.

mod evaluate;
mod locked_rows;
mod postgres;
mod sqlite;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use crate::model::message::{Outcome, RefusalReason, Replay, SendRequest, SendResult};
use crate::store::database::{Database, reading};
use crate::store::inbox_limiter::Charges;
use crate::store::outcome::{self, Devices, Queued};
use crate::store::send::evaluate::{Changed, NewSend, candidates, classify, evaluate, waiting_for};
use crate::store::{Limits, Result, Store, StoreError};
use crate::telemetry::metrics::{Left, Metrics, QueueRefusal, Repeat};

/// How often a group is tried in all, when it meets another one.
const ATTEMPTS: u32 = 5;

/// Groups that a node has under way in PostgreSQL. The second one uses what the first one leaves idle while it waits for
/// the disk and the network; further ones made no difference.
const GROUPS_IN_POSTGRES: usize = 2;

/// So long after a group met accounts that another transaction held, the next ones don't wait for any.
const CONTENTION_WINDOW: Duration = Duration::from_secs(1);

/// The outcomes of former sends.
type PreviousSends = HashMap<(DeviceNo, IdempotencyKey), PreviousSend>;

/// The outcome of a former send.
struct PreviousSend {
    outcome: Outcome,
    digest: [u8; 16],
    /// The place in the queue of its first message, or that it would have had.
    first: Position,
}

/// What became of a group.
#[derive(Debug)]
pub struct GroupResult {
    /// An answer for each send, in the order given; `None` for one that has to come again with a later group.
    pub sent: Vec<Option<SendResult>>,
    /// Devices of which at least one acknowledged message could not be deleted, because another session of the database
    /// holds it. Their acks have to come again. Empty on SQLite.
    pub locked_devices: Vec<DeviceNo>,
}

/// A message that is about to be queued.
struct NewMessage<'a> {
    send: &'a SendRequest,
    queued: Queued<'a>,
    id: MessageId,
    position: Position,
}

/// The outcome of a send, about to be written down.
struct IdempotencyRecord<'a> {
    send: &'a SendRequest,
    outcome: Vec<u8>,
    /// Its messages; an empty range when none were queued.
    first: Position,
    last: Position,
}

/// What a group has done to the queue, in rows that were really there.
#[derive(Default)]
struct GroupCounts {
    accepted: u64,
    accepted_bytes: u64,
    acked: u64,
    charges: Option<Charges>,
}

impl GroupCounts {
    /// Only once it is certain: after the commit.
    fn record(self, sent: &[Option<SendResult>], metrics: &Metrics) {
        metrics.accepted.add((), self.accepted);
        metrics.accepted_bytes.add((), self.accepted_bytes);
        metrics.left.add(Left::Acked, self.acked);
        if let Some(charges) = self.charges {
            charges.commit();
        }
        for replay in sent.iter().flatten().filter_map(|sent| sent.replay) {
            metrics.repeats.increment(match replay {
                Replay::SameBody => Repeat::Same,
                Replay::OtherBody => Repeat::Other,
            });
        }
        for refused in sent.iter().flatten().flat_map(|sent| &sent.outcome.refused) {
            metrics.refused_messages.increment(match refused.reason {
                RefusalReason::Inbox => QueueRefusal::Inbox,
                RefusalReason::Share => QueueRefusal::Share,
                RefusalReason::Day => QueueRefusal::Day,
                RefusalReason::Target => QueueRefusal::Target,
            });
        }
    }

    fn add(&mut self, messages: &[NewMessage<'_>], rows: u64) {
        self.accepted += rows;
        self.accepted_bytes += messages.iter().map(|message| message.queued.sealed.0.len() as u64).sum::<u64>();
    }
}

/// What a group does about an account, or an acknowledged message, that another session of the database holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Locking {
    /// Waits, in a fair queue and not for long: usually it is another group, which is about to be committed.
    Wait,
    /// Leaves the sends to this account, or the ack of this message, for later.
    SkipLocked,
}

/// What a group of sends depends on.
struct GroupContext {
    previous_sends: PreviousSends,
    devices: Devices,
}

impl GroupContext {
    /// All devices of the accounts that are written to.
    fn device_numbers(&self) -> impl Iterator<Item = DeviceNo> {
        self.devices.values().flatten().map(|(_, no)| *no)
    }
}

impl Store {
    /// How many groups can be settled at the same time, to some use. SQLite has one writer.
    pub fn max_concurrent_groups(&self) -> usize {
        match &self.database {
            Database::Sqlite(_) => 1,
            Database::Postgres(_) => GROUPS_IN_POSTGRES,
        }
    }

    /// Deletes acknowledged messages and queues new ones, all in one transaction, in the order given. Former sends are found
    /// until they are too old by the earliest time of `now`; new messages get the latest time. Durable when it
    /// returns. Each send is evaluated by itself; repeats of a send within one group are found as well.
    ///
    /// A send is left for a later group, so that the others need not wait for it, when too many inboxes would have to be
    /// counted at once, or when another transaction holds one of its accounts for too long; an ack, when another transaction
    /// holds its message. On SQLite there are no other transactions.
    pub async fn commit_group(
        &self,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        now: impl Into<Moment>,
    ) -> Result<GroupResult> {
        let now = now.into();
        // What held the last group up is likely to hold this one up too.
        let mut locking = if self.saw_lock_contention() { Locking::SkipLocked } else { Locking::Wait };
        for _ in 1..ATTEMPTS {
            match self.try_commit_group(sends, acks, now, locking).await {
                Err(error) if error.is_lock_timeout() => locking = Locking::SkipLocked,
                Err(error) if error.is_serialization_conflict() => {
                    tracing::debug!("a group met another one; once more")
                }
                Ok(Some(result)) => {
                    let is_incomplete = result.sent.iter().any(Option::is_none) || !result.locked_devices.is_empty();
                    if locking == Locking::SkipLocked && is_incomplete {
                        *last_contention(&self.last_contention) = Some(Instant::now());
                    }
                    return Ok(result);
                }
                Ok(None) => tracing::debug!("another group has the same send; once more"),
                Err(error) => return Err(error),
            }
            self.metrics.group_retries.increment(());
        }
        let result = self.try_commit_group(sends, acks, now, locking).await?;
        result.ok_or_else(|| StoreError(sqlx::Error::Protocol("another group keeps sending under the same key".into())))
    }

    /// Whether a group had to pass over accounts a moment ago.
    fn saw_lock_contention(&self) -> bool {
        last_contention(&self.last_contention).is_some_and(|last| last.elapsed() < CONTENTION_WINDOW)
    }

    /// Whether this device has sent under this key before, so that a repeat would queue nothing new.
    pub async fn has_outcome(&self, sender: DeviceNo, key: IdempotencyKey) -> Result<bool> {
        let statement = "SELECT outcome FROM sends WHERE sender_no = $1 AND idempotency_key = $2";
        let found: Option<Vec<u8>> =
            reading!(self, |db| sqlx::query_scalar(statement).bind(sender).bind(key).fetch_optional(db))?;
        let outcome = found.and_then(|outcome| outcome::decode(&outcome));
        Ok(outcome.is_some_and(|outcome| outcome.refused.is_empty()))
    }

    /// `None` when another group has stored one of the sends at this moment.
    async fn try_commit_group(
        &self,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        now: Moment,
        locking: Locking,
    ) -> Result<Option<GroupResult>> {
        let result = match &self.database {
            Database::Sqlite(sqlite) => {
                let result = self.commit_in_sqlite(sqlite, sends, acks, now).await;
                result.map(|(sent, counts)| Some((GroupResult { sent, locked_devices: Vec::new() }, counts)))
            }
            Database::Postgres(postgres) => self.commit_in_postgres(postgres, sends, acks, now, locking).await,
        };
        Ok(result?.map(|(result, counts)| {
            counts.record(&result.sent, &self.metrics);
            result
        }))
    }
}

/// Gives the messages their ids and places. The places ascend.
fn new_messages<'a>(
    rows: &[(&'a SendRequest, Queued<'a>)],
    ids: &[MessageId],
    position: impl Fn(usize) -> i64,
) -> Vec<NewMessage<'a>> {
    let rows = rows.iter().zip(ids).enumerate();
    rows.map(|(n, ((send, queued), id))| NewMessage { send, queued: *queued, id: *id, position: Position(position(n)) })
        .collect()
}

fn records<'a>(new_sends: &[NewSend<'a>], position: impl Fn(usize) -> i64) -> Vec<IdempotencyRecord<'a>> {
    let record = |NewSend { send, outcome, rows }: &NewSend<'a>| {
        let first = position(rows.start);
        let last = if rows.is_empty() { first - 1 } else { position(rows.end - 1) };
        IdempotencyRecord { send, outcome: outcome::encode(outcome), first: Position(first), last: Position(last) }
    };
    new_sends.iter().map(record).collect()
}

fn last_contention(last: &Mutex<Option<Instant>>) -> MutexGuard<'_, Option<Instant>> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

fn decoded(outcome: &[u8], digest: Vec<u8>, first: Position) -> Result<PreviousSend> {
    let outcome = outcome::decode(outcome).ok_or_else(|| malformed("outcome"))?;
    let digest = digest.try_into().map_err(|_| malformed("digest"))?;
    Ok(PreviousSend { outcome, digest, first })
}

fn malformed(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: "not what this server writes".into() }
}

/// The times that are stored with the outcome of a repeat that queued something: when it was sent, and when it may be deleted.
/// Its messages came at different times, so the row doesn't name them: it stays until the last of them has expired.
fn changed_at(limits: &Limits, now: Timestamp) -> (Timestamp, Timestamp) {
    let later = limits.retention.saturating_sub(limits.idempotency_lifetime);
    (now + later, now + limits.retention.max(limits.idempotency_lifetime))
}

/// How many messages these acks are for, by device. A device may appear several times.
fn acked(acks: &[(DeviceNo, Position)]) -> impl Iterator<Item = (DeviceNo, u64)> {
    acks.chunk_by(|one, next| one.0 == next.0).map(|acks| (acks[0].0, acks.len() as u64))
}

/// The accounts written to, each once, in ascending order.
fn accounts(sends: &[SendRequest]) -> Vec<UserId> {
    let mut users: Vec<UserId> = sends.iter().flat_map(SendRequest::accounts).collect();
    users.sort_unstable();
    users.dedup();
    users
}
