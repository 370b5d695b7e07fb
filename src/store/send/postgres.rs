//! Queueing in PostgreSQL. Lists travel as arrays: a group is a fixed number of statements, however much is in it.
//!
//! The accounts that are written to are locked first, in ascending order, and stay so until the commit. Everything that
//! is read afterwards (devices, inboxes) holds until then, and the block of positions that is taken afterwards is
//! higher than those of all groups that have been visible in these inboxes. Whatever else two groups could do to each
//! other (the same send at the same moment, the same messages deleted in another order) makes one of them start over.

mod rows;

use std::collections::HashSet;

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use crate::model::message::SendRequest;
use crate::store::database::{PostgresTx, timely};
use crate::store::inbox_limiter::{AccountBound, AccountRow, Counting, Unsure};
use crate::store::notices::{self, NoticeKind};
use crate::store::outcome::Devices;
use crate::store::postgres::PostgresStore;
use crate::store::send::evaluate::Evaluation;
use crate::store::send::postgres::rows::Locked;
use crate::store::send::{
    self, GroupContext, GroupCounts, GroupResult, IdempotencyRecord, Locking, NewMessage, PreviousSends,
};
use crate::store::{Result, Store};
use crate::telemetry::traces::Span;

/// Positions in a block of the sequence, as the migration says.
const BLOCK: usize = 65_536;
/// The device is compared too, so that nothing but its own mail can ever be deleted.
///
/// Two things keep each look-up on the primary key, also when it is planned while there are no messages: `OFFSET 0`,
/// without which all messages may be read and looked for among the acks; and the comparison of whole rows, which
/// `messages_by_age`, having positions too, can't serve.
macro_rules! delete_messages {
    ($arrays:literal) => {
        concat!(
            "DELETE FROM messages WHERE ctid = ANY (ARRAY (
                 SELECT found.place FROM unnest(",
            $arrays,
            ") AS gone (device_no, position) CROSS JOIN LATERAL (
                     SELECT m.ctid AS place FROM messages m
                     WHERE (m.device_no, m.position) >= (gone.device_no, gone.position)
                       AND (m.device_no, m.position) <= (gone.device_no, gone.position) OFFSET 0) found))"
        )
    };
}

/// The outcomes that are stored for the keys $2 of the senders $1; all devices of the accounts $4; and $5 blocks of positions.
/// An outcome that is older than $3 still counts while a message of it waits, so that no message is ever queued twice.
const LOOKUP: &str = "
    SELECT s.sender_no, s.idempotency_key, NULL::uuid, NULL::uuid, s.outcome, s.digest, s.first_position
    FROM unnest($1, $2) AS asked (sender_no, idempotency_key) CROSS JOIN LATERAL (
        SELECT * FROM sends known
        WHERE known.sender_no = asked.sender_no AND known.idempotency_key = asked.idempotency_key OFFSET 0) s
    WHERE s.sent_at > $3 OR EXISTS (
        SELECT 1 FROM messages m
        WHERE m.received_at = s.sent_at AND m.position BETWEEN s.first_position AND s.last_position)
    UNION ALL
    SELECT no, NULL, user_id, id, NULL, NULL, NULL FROM devices WHERE user_id = ANY($4)
    UNION ALL
    SELECT nextval('message_blocks'), NULL, NULL, NULL, NULL, NULL, NULL FROM generate_series(1, $5)";

/// A row of the answer to `LOOKUP`: a sender with its key, outcome, digest and first place; or a device with its account; or a block.
type LookupRow =
    (i64, Option<IdempotencyKey>, Option<UserId>, Option<DeviceId>, Option<Vec<u8>>, Option<Vec<u8>>, Option<Position>);

/// A row of `sends` that is replaced is past its age ($9) and has no message waiting: see `LOOKUP`, which goes by the same time.
const WRITE: &str = concat!(
    "WITH receipts AS (
        INSERT INTO sends
            (sender_no, idempotency_key, digest, outcome, first_position, last_position, sent_at, review_at)
        SELECT *, $7, $8 FROM unnest($1, $2, $3, $4, $5, $6)
        ON CONFLICT (sender_no, idempotency_key) DO UPDATE SET
            digest = excluded.digest, outcome = excluded.outcome, sent_at = excluded.sent_at,
            review_at = excluded.review_at, first_position = excluded.first_position,
            last_position = excluded.last_position
        WHERE sends.sent_at <= $9 RETURNING 1),
    queued AS (
        INSERT INTO messages (position, device_no, id, sender_user, sender_device, body, received_at)
        SELECT *, $7 FROM unnest($10, $11, $12, $13, $14, $15) RETURNING 1),
    acked AS (",
    delete_messages!("$16, $17"),
    " RETURNING 1)
    SELECT (SELECT COUNT(*) FROM receipts) AS receipts, (SELECT COUNT(*) FROM queued) AS messages,
           (SELECT COUNT(*) FROM acked) AS acked"
);

/// How many rows each part of `WRITE` touched.
#[derive(sqlx::FromRow)]
struct Written {
    receipts: i64,
    messages: i64,
    acked: i64,
}

/// Messages that are deleted, each once, in the order of the index that they are looked up in: their devices, and their
/// positions. Rows are deleted, and locked, in the order of their places in the table, so two groups don't wait for each
/// other in a circle.
pub(super) type SortedAcks = (Vec<DeviceNo>, Vec<Position>);

fn sort_acks(messages: &[(DeviceNo, Position)]) -> SortedAcks {
    let mut messages = messages.to_vec();
    messages.sort_unstable();
    messages.dedup();
    messages.into_iter().unzip()
}

impl Store {
    pub(super) async fn commit_in_postgres(
        &self,
        postgres: &PostgresStore,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        now: Moment,
        locking: Locking,
    ) -> Result<Option<(GroupResult, GroupCounts)>> {
        let mut tx = Span::within("store.begin").attempt(postgres.begin_group()).await?;
        let mut touched = Vec::new();
        let written = async {
            let write = self.write_group(&mut tx, sends, acks, (now, locking), &mut touched);
            let result = Span::within("store.write").attempt(write).await?;
            match result {
                Some(_) => Span::within("store.commit").attempt(tx.end("COMMIT")).await?,
                None => tx.end("ROLLBACK").await?,
            }
            Ok(result)
        };
        let result = written.await;
        match &result {
            Ok(Some((GroupResult { locked_devices, .. }, _))) => {
                self.inbox_limiter.left(send::acked(acks).filter(|(device, _)| !locked_devices.contains(device)));
            }
            Ok(None) | Err(_) => self.inbox_limiter.clear(&touched),
        }
        result
    }

    /// Everything but the beginning and the end. `touched` is given the devices whose inboxes are remembered by what is not
    /// committed yet.
    async fn write_group(
        &self,
        tx: &mut PostgresTx,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        (Moment { earliest, latest: now }, locking): (Moment, Locking),
        touched: &mut Vec<DeviceNo>,
    ) -> Result<Option<(GroupResult, GroupCounts)>> {
        let mut counts = GroupCounts::default();
        let acks = &sort_acks(acks);
        if sends.is_empty() {
            let locked_devices;
            (counts.acked, locked_devices) = tx.delete_acked(acks, locking).await?;
            return Ok(Some((GroupResult { sent: Vec::new(), locked_devices }, counts)));
        }
        let not_before = earliest - self.limits.idempotency_lifetime;
        self.inbox_limiter.evict();
        let locked = tx.lock_accounts(sends, locking).await?;
        let (found, blocks) = tx.lookup(sends, not_before).await?;
        touched.extend(found.device_numbers());
        // The rows of accounts with an inbox that may be more than half full.
        let row = |user: UserId| locked.get(&user).copied().filter(|row| self.inbox_limiter.is_over_half(row.now));
        let mut deferred = held_back(sends, &locked, locking);
        let (mut counting, mut counted) = (self.inbox_limiter.counting(), HashSet::new());
        let (cases, admissions, mut charges) = loop {
            let cases = send::classify(sends, &found, |send| deferred.contains(&(send.sender.no, send.key)));
            let incoming = send::candidates(sends, &cases);
            let uncertain = self.inbox_limiter.uncertain(&incoming, |user| row(user).map(|row| row.before));
            let count = self.count_accounts(tx, &uncertain, &found.devices, &locked, (&mut counting, &mut counted));
            let uncounted = count.await?;
            if !uncounted.is_empty() {
                deferred.extend(send::waiting_for(sends, &cases, &uncounted));
            } else if let Some((admissions, charges)) = self.inbox_limiter.admit(&incoming, now, row) {
                break (cases, admissions, charges);
            }
        };
        let evaluation = send::evaluate(sends, cases, admissions);
        let (rows, new_sends) = (&evaluation.rows, &evaluation.new_sends);
        let assigned = self.message_sequence.assign_ids(rows.len(), now);
        let position = |n: usize| blocks[n / BLOCK] + (n % BLOCK) as i64;
        let records = send::records(new_sends, position);
        let messages = send::new_messages(rows, &assigned.ids, position);
        // Acks that may not wait are written by a statement of their own.
        let at_once = if locking == Locking::Wait { acks } else { &SortedAcks::default() };
        let times = (assigned.received_at, assigned.received_at + self.limits.idempotency_lifetime, not_before);
        let written = tx.write(&records, &messages, at_once, times).await?;
        // Another group has just written the outcome of one of these sends down.
        if written.receipts < records.len() as i64 {
            return Ok(None);
        }
        let locked_devices;
        (counts.acked, locked_devices) = tx.delete_remaining(acks, written.acked.unsigned_abs(), locking).await?;
        counts.add(&messages, written.messages.unsigned_abs());
        if !evaluation.is_plain() {
            let period = notices::period(Position(position(0)));
            tx.change(&evaluation.changed, send::changed_at(&self.limits, now)).await?;
            notices::add_in_postgres(tx, &evaluation.refused, NoticeKind::Refused, (period, now)).await?;
            notices::retract_in_postgres(tx, &evaluation.retracted).await?;
        }
        let debts = charges.debts();
        if !debts.is_empty() {
            charges.written(&tx.add_debts(&debts, now).await?);
        }
        counts.charges = Some(charges);
        let rows = self.corrected_rows(&counted, &evaluation, &found.devices, &locked);
        if !rows.is_empty() {
            tx.set_upper_bounds(&rows).await?;
        }
        Ok(Some((GroupResult { sent: evaluation.sent, locked_devices }, counts)))
    }

    /// Counts the inboxes of accounts, those with unknown ones first, until the group has counted enough. `counted` is given
    /// the accounts. Returns the unknown inboxes that are left.
    async fn count_accounts(
        &self,
        tx: &mut PostgresTx,
        Unsure { unknown, stale }: &Unsure,
        devices: &Devices,
        locked: &Locked,
        (counting, counted): (&mut Counting, &mut HashSet<UserId>),
    ) -> Result<HashSet<DeviceNo>> {
        let of_user = |user: &UserId| devices.get(user).map(Vec::as_slice).unwrap_or_default();
        let mut seen = HashSet::new();
        let users = unknown.iter().chain(stale).map(|(user, _)| *user).filter(|user| seen.insert(*user));
        let users: Vec<UserId> = users.collect();
        let (mut rest, mut done) = (&users[..], HashSet::<UserId>::new());
        while !rest.is_empty() && !counting.is_over() {
            // One row stands for all inboxes of an account, so they are counted together.
            let mut inboxes = 0;
            let fits = |user: &&UserId| {
                inboxes += of_user(user).len();
                inboxes <= self.inbox_limiter.counted_at_once()
            };
            let (chunk, deferred) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let found = tx.count(chunk).await?;
            let stamped = |user: &UserId| {
                let account_bound = locked.get(user).map(|row| row.before).unwrap_or_default();
                of_user(user).iter().map(move |(_, no)| (*no, account_bound))
            };
            let devices: Vec<(DeviceNo, AccountBound)> = chunk.iter().flat_map(stamped).collect();
            self.metrics.counted.add((), counting.add(devices.len(), &found));
            self.inbox_limiter.counted(devices, &found);
            done.extend(chunk);
            rest = deferred;
        }
        let left = unknown.iter().filter(|(user, _)| !done.contains(user)).map(|(_, device)| *device).collect();
        counted.extend(done);
        Ok(left)
    }

    /// What the rows of accounts should say after this group, where they say too much: those of the accounts that were
    /// counted, if that is still remembered, and of those for which nothing was queued. If refusals raised a row, another
    /// node would take them for mail, and count.
    fn corrected_rows(
        &self,
        counted: &HashSet<UserId>,
        evaluation: &Evaluation<'_>,
        devices: &Devices,
        locked: &Locked,
    ) -> Vec<(UserId, AccountBound)> {
        let of_user = |user: &UserId| devices.get(user).into_iter().flatten().map(|(_, no)| *no);
        let stamped =
            |user: &UserId| Some((*user, self.inbox_limiter.new_account_bound(&of_user(user).collect::<Vec<_>>())?));
        let mut rows: Vec<(UserId, AccountBound)> = counted.iter().filter_map(stamped).collect();
        let is_over_half = |row: &AccountRow| self.inbox_limiter.is_over_half(row.now);
        if locked.values().any(is_over_half) {
            let queued: HashSet<UserId> = evaluation.rows.iter().map(|(_, message)| message.user).collect();
            let is_raised = |user: &UserId, row: &AccountRow| is_over_half(row) && !queued.contains(user);
            for (user, row) in locked.iter().filter(|(user, row)| is_raised(user, row) && !counted.contains(user)) {
                self.inbox_limiter.restored(of_user(user), *row);
                rows.push((*user, row.before));
            }
        }
        rows
    }
}

/// The sends that are left for a later group because one of their accounts could not be locked.
fn held_back(sends: &[SendRequest], locked: &Locked, locking: Locking) -> HashSet<(DeviceNo, IdempotencyKey)> {
    // An account that doesn't exist is in `locked` with zeros, so one that is missing is held by another transaction.
    let is_locked =
        |send: &&SendRequest| locking == Locking::SkipLocked && send.accounts().any(|user| !locked.contains_key(&user));
    sends.iter().filter(is_locked).map(|send| (send.sender.no, send.key)).collect()
}

impl PostgresTx {
    /// What the sends depend on, and blocks of positions, enough for all of their messages. See `LOOKUP`.
    async fn lookup(&mut self, sends: &[SendRequest], not_before: Timestamp) -> Result<(GroupContext, Vec<i64>)> {
        let senders: Vec<DeviceNo> = sends.iter().map(|send| send.sender.no).collect();
        let keys: Vec<IdempotencyKey> = sends.iter().map(|send| send.key).collect();
        let most: usize = sends.iter().flat_map(|send| &send.recipients).map(|to| to.submissions.len()).sum();
        let blocks = i64::try_from(most.div_ceil(BLOCK).max(1)).unwrap_or(i64::MAX);
        let lookup =
            sqlx::query_as(LOOKUP).bind(senders).bind(keys).bind(not_before).bind(send::accounts(sends)).bind(blocks);
        let (mut previous_sends, mut devices, mut blocks) = (PreviousSends::default(), Devices::default(), Vec::new());
        for row in self.all::<LookupRow>(lookup).await? {
            match row {
                (sender, Some(key), .., Some(outcome), Some(digest), Some(first)) => {
                    previous_sends.insert((DeviceNo(sender), key), send::decoded(&outcome, digest, first)?);
                }
                (no, _, Some(user), Some(device), ..) => {
                    devices.entry(user).or_default().push((device, DeviceNo(no)));
                }
                (block, None, None, None, None, None, None) => blocks.push(block),
                _ => return Err(send::malformed("answer").into()),
            }
        }
        devices.values_mut().for_each(|devices| devices.sort_unstable_by_key(|(_, no)| *no));
        Ok((GroupContext { previous_sends, devices }, blocks))
    }

    /// Writes outcomes and messages down, and deletes what is acknowledged, all in one statement. The times are those of
    /// the receipt, of the review of the outcomes, and up to which former outcomes are past their age.
    async fn write(
        &mut self,
        records: &[IdempotencyRecord<'_>],
        messages: &[NewMessage<'_>],
        (acked_devices, acked_positions): &SortedAcks,
        (received_at, review_at, not_before): (Timestamp, Timestamp, Timestamp),
    ) -> Result<Written> {
        let column = |of: fn(&IdempotencyRecord<'_>) -> i64| records.iter().map(of).collect::<Vec<i64>>();
        let keys: Vec<IdempotencyKey> = records.iter().map(|record| record.send.key).collect();
        let digests: Vec<&[u8]> = records.iter().map(|record| &record.send.digest[..]).collect();
        let outcomes: Vec<&[u8]> = records.iter().map(|record| &record.outcome[..]).collect();
        let positions: Vec<Position> = messages.iter().map(|message| message.position).collect();
        let devices: Vec<DeviceNo> = messages.iter().map(|message| message.queued.device).collect();
        let ids: Vec<MessageId> = messages.iter().map(|message| message.id).collect();
        let users: Vec<UserId> = messages.iter().map(|message| message.send.sender.user).collect();
        let senders: Vec<DeviceId> = messages.iter().map(|message| message.send.sender.device).collect();
        let bodies: Vec<&[u8]> = messages.iter().map(|message| &message.queued.sealed.0[..]).collect();
        let write = sqlx::query_as(WRITE)
            .bind(column(|record| record.send.sender.no.0))
            .bind(keys)
            .bind(digests)
            .bind(outcomes)
            .bind(column(|record| record.first.0))
            .bind(column(|record| record.last.0))
            .bind(received_at)
            .bind(review_at)
            .bind(not_before)
            .bind(positions)
            .bind(devices)
            .bind(ids)
            .bind(users)
            .bind(senders)
            .bind(bodies)
            .bind(acked_devices)
            .bind(acked_positions);
        timely(self.limit, write.fetch_one(&mut *self.connection)).await
    }

    /// Deletes what it finds. A row that was moved while it was waited for, as the correction of a clock does
    /// ([`Store::expire_messages`]), is passed over, since it is not in its place any more; the next try finds it.
    pub(super) async fn delete_once(&mut self, (devices, positions): &SortedAcks) -> Result<u64> {
        self.run(sqlx::query(delete_messages!("$1, $2")).bind(devices).bind(positions)).await
    }
}
