//! Queueing in SQLite. Lists travel as JSON, and ids and bodies in one blob that the statement cuts up by offset: so a
//! group is a fixed number of statements, however much is in it.
//!
//! A trip to the thread of the connection costs as much as a statement, so a group makes two: one text begins, deletes
//! and asks, the other one writes and commits.

use std::collections::HashSet;
use std::fmt::Write;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{FromRow, Row, Sqlite};

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{DeviceId, DeviceNo, Position, UserId};
use crate::model::message::{SendRequest, SendResult};
use crate::store::inbox_limiter::{self, AccountBound, AccountRow, Counted, Counting, MAX_DEBT, Unsure};
use crate::store::notices::{self, NoticeKind};
use crate::store::outcome::Devices;
use crate::store::send::{self, Changed, GroupContext, GroupCounts, IdempotencyRecord, NewMessage, PreviousSends};
use crate::store::sqlite::{SqliteStore, Transaction};
use crate::store::{Result, Store, StoreError, json_list};
use crate::telemetry::traces::Span;

/// The device is compared too, so that nothing but its own mail can ever be deleted.
macro_rules! delete_acknowledged {
    () => {
        "DELETE FROM messages WHERE position IN (
             SELECT m.position FROM json_each($1) acked
             CROSS JOIN messages m ON m.position = acked.value ->> 0 WHERE m.device_no = acked.value ->> 1);"
    };
}

const DELETE: &str = concat!("BEGIN IMMEDIATE;", delete_acknowledged!(), "COMMIT");

/// Deletes, and asks what the sends depend on: the outcomes that are stored for their keys, and all devices of all
/// accounts that are written to. An outcome that is past its age still counts while a message of it waits, so that no
/// message is ever queued twice.
const DELETE_AND_LOOKUP: &str = concat!(
    "BEGIN IMMEDIATE;",
    delete_acknowledged!(),
    "SELECT s.sender_no, s.idempotency_key, s.outcome, s.digest, s.first_position
     FROM json_each($2) asked
     CROSS JOIN sends s ON s.sender_no = asked.value AND s.idempotency_key = substr($3, asked.key * 16 + 1, 16)
     WHERE s.sent_at > $4
        OR EXISTS (SELECT 1 FROM messages m WHERE m.position BETWEEN s.first_position AND s.last_position);

     SELECT d.user_id, d.id, d.no FROM json_each($5) asked
     CROSS JOIN devices d ON d.user_id = substr($6, asked.value, 16)"
);

/// A row of `sends` that is replaced is past its age and has no message waiting: see `DELETE_AND_LOOKUP`.
macro_rules! insert {
    () => {
        "INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
         SELECT $3 + row.key, row.value ->> 0, substr($2, row.value ->> 1, 16), substr($2, (row.value ->> 1) + 16, 16),
                substr($2, (row.value ->> 1) + 32, 16), $4, substr($2, (row.value ->> 1) + 48, row.value ->> 2)
         FROM json_each($1) row;

         INSERT OR REPLACE INTO sends
             (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
         SELECT row.value ->> 0, substr($6, row.value ->> 1, 16), substr($6, (row.value ->> 1) + 16, 16),
                substr($6, (row.value ->> 1) + 32, row.value ->> 2), $7, $8, row.value ->> 3, row.value ->> 4
         FROM json_each($5) row;"
    };
}

const INSERT: &str = insert!();
const INSERT_AND_COMMIT: &str = concat!(insert!(), "COMMIT");

impl Store {
    pub(super) async fn commit_in_sqlite(
        &self,
        sqlite: &SqliteStore,
        sends: &[SendRequest],
        acks: &[(DeviceNo, Position)],
        now: Moment,
    ) -> Result<(Vec<Option<SendResult>>, GroupCounts)> {
        let mut tx = Span::within("store.begin").attempt(sqlite.without_begin()).await?;
        // From here on no other group counts until this one has ended.
        self.inbox_limiter.left(send::acked(acks));
        if sends.is_empty() {
            let text = sqlx::query(DELETE).bind(acknowledged(acks));
            let [_begun, deleted, _committed] = Span::within("store.commit").attempt(tx.finish(text)).await?;
            return Ok((Vec::new(), GroupCounts { acked: deleted.changed, ..GroupCounts::default() }));
        }
        let lookup = tx.run(lookup(sends, acks, now.earliest - self.limits.idempotency_lifetime));
        let [_begun, deleted, previous_sends, devices] = Span::within("store.write").attempt(lookup).await?;
        let found =
            GroupContext { previous_sends: outcomes_of(&previous_sends.rows)?, devices: devices_of(&devices.rows)? };
        let written = self.write_in_sqlite(tx, sends, &found, now.latest).await;
        let (sent, counts) =
            written.inspect_err(|_| self.inbox_limiter.clear(&found.device_numbers().collect::<Vec<DeviceNo>>()))?;
        Ok((sent, GroupCounts { acked: deleted.changed, ..counts }))
    }

    /// Evaluates the sends, and stores what is queued. Commits.
    async fn write_in_sqlite(
        &self,
        mut tx: Transaction,
        sends: &[SendRequest],
        found: &GroupContext,
        now: Timestamp,
    ) -> Result<(Vec<Option<SendResult>>, GroupCounts)> {
        let (lifetime, mut counts) = (self.limits.idempotency_lifetime, GroupCounts::default());
        // There is no other writer, so what is remembered of an inbox holds until it is counted again.
        self.inbox_limiter.evict();
        let (mut later, mut counting) = (HashSet::new(), self.inbox_limiter.counting());
        let (cases, admissions, mut charges) = loop {
            let cases = send::classify(sends, found, |send| later.contains(&(send.sender.no, send.key)));
            let incoming = send::candidates(sends, &cases);
            let uncertain = self.inbox_limiter.uncertain(&incoming, |_| Some(AccountBound::default()));
            let uncounted = self.count_in_sqlite(&mut tx, &uncertain, &mut counting).await?;
            if !uncounted.is_empty() {
                later.extend(send::waiting_for(sends, &cases, &uncounted));
            } else if let Some((admissions, charges)) =
                self.inbox_limiter.admit(&incoming, now, |_| Some(AccountRow::default()))
            {
                break (cases, admissions, charges);
            }
        };
        let evaluation = send::evaluate(sends, cases, admissions);

        let assigned = self.message_sequence.assign_ids(evaluation.rows.len(), now);
        let first = self.message_sequence.reserve_positions(evaluation.rows.len());
        let position = |n: usize| first + n as i64;
        let messages = send::new_messages(&evaluation.rows, &assigned.ids, position);
        let records = send::records(&evaluation.new_sends, position);
        let debts = charges.debts();
        let insert = |text| insertion(text, (&messages, first, assigned.received_at), (&records, now, now + lifetime));
        if debts.is_empty() && evaluation.is_plain() {
            let write = tx.finish(insert(INSERT_AND_COMMIT));
            let [inserted, _records, _committed] = Span::within("store.commit").attempt(write).await?;
            counts.add(&messages, inserted.changed);
        } else {
            let write = async {
                let [inserted, _records] = tx.run(insert(INSERT)).await?;
                let period = notices::period(Position(first));
                notices::add_in_sqlite(&mut tx, &evaluation.refused, NoticeKind::Refused, (period, now)).await?;
                notices::retract_in_sqlite(&mut tx, &evaluation.retracted).await?;
                change(&mut tx, &evaluation.changed, send::changed_at(&self.limits, now)).await?;
                charges.written(&add_debts(&mut tx, &debts, now).await?);
                Ok::<_, StoreError>(inserted.changed)
            };
            let inserted = Span::within("store.write").attempt(write).await?;
            counts.add(&messages, inserted);
            Span::within("store.commit").attempt(tx.commit()).await?;
        }
        counts.charges = Some(charges);
        Ok((evaluation.sent, counts))
    }

    /// Counts inboxes, the unknown ones first, until the group has counted enough. Returns the unknown ones that are left.
    async fn count_in_sqlite(
        &self,
        tx: &mut Transaction,
        Unsure { unknown, stale }: &Unsure,
        counting: &mut Counting,
    ) -> Result<HashSet<DeviceNo>> {
        let asked: Vec<DeviceNo> = unknown.iter().chain(stale).map(|(_, device)| *device).collect();
        let mut counted = 0;
        for devices in asked.chunks(self.inbox_limiter.counted_at_once()) {
            if counting.is_over() {
                break;
            }
            let found = Span::within("store.write").attempt(count(tx, devices)).await?;
            self.metrics.counted.add((), counting.add(devices.len(), &found));
            self.inbox_limiter.counted(devices.iter().map(|device| (*device, AccountBound::default())), &found);
            counted += devices.len();
        }
        Ok(unknown.iter().skip(counted).map(|(_, device)| *device).collect())
    }
}

/// What waits for these devices, by sending account. The length of a body is read without the body.
async fn count(tx: &mut Transaction, devices: &[DeviceNo]) -> Result<Vec<Counted>> {
    let rows: Vec<(DeviceNo, UserId, i64, i64)> = sqlx::query_as(
        "SELECT m.device_no, m.sender_user, COUNT(*), SUM(LENGTH(m.body))
         FROM json_each($1) asked CROSS JOIN messages m ON m.device_no = asked.value GROUP BY 1, 2",
    )
    .bind(json_list(devices.iter().map(|device| device.0)))
    .fetch_all(&mut **tx)
    .await?;
    Ok(rows.into_iter().map(inbox_limiter::counted).collect())
}

/// Replaces outcomes that a repeat has changed.
async fn change(
    tx: &mut Transaction,
    changed: &[Changed<'_>],
    (sent_at, review_at): (Timestamp, Timestamp),
) -> Result<()> {
    if changed.is_empty() {
        return Ok(());
    }
    let (mut list, mut blob) = (String::from("["), Vec::new());
    for Changed { send, outcome } in changed {
        let _ = write!(list, "[{},{},{}],", send.sender.no.0, blob.len() + 1, outcome.len());
        blob.extend_from_slice(send.key.as_bytes());
        blob.extend_from_slice(outcome);
    }
    let statement = "
        UPDATE sends SET outcome = substr($2, (row.value ->> 1) + 16, row.value ->> 2), sent_at = $3, review_at = $4,
            last_position = first_position - 1
        FROM json_each($1) row
        WHERE sender_no = row.value ->> 0 AND idempotency_key = substr($2, row.value ->> 1, 16)";
    sqlx::query(statement).bind(close(list)).bind(blob).bind(sent_at).bind(review_at).execute(&mut **tx).await?;
    Ok(())
}

/// Stores what accounts have queued, in milliseconds of their day. Returns the time until which each has paid.
async fn add_debts(tx: &mut Transaction, debts: &[(UserId, i64)], now: Timestamp) -> Result<Vec<(UserId, Timestamp)>> {
    if debts.is_empty() {
        return Ok(Vec::new());
    }
    let (mut list, mut users) = (String::from("["), Vec::new());
    for (user, cost) in debts {
        let _ = write!(list, "[{},{cost}],", users.len() + 1);
        users.extend_from_slice(user.as_bytes());
    }
    let statement = "
        INSERT INTO send_debts (user_id, paid_at) SELECT substr($2, row.value ->> 0, 16), $3 + (row.value ->> 1)
        FROM json_each($1) row WHERE true
        ON CONFLICT (user_id) DO UPDATE SET paid_at = excluded.paid_at
            + CASE WHEN paid_at > $3 AND paid_at <= $4 THEN paid_at - $3 ELSE 0 END
        RETURNING user_id, paid_at";
    let add_debts = sqlx::query_as(statement).bind(close(list)).bind(users).bind(now).bind(now + MAX_DEBT);
    Ok(add_debts.fetch_all(&mut **tx).await?)
}

/// The list for `delete_acknowledged!`.
fn acknowledged(acks: &[(DeviceNo, Position)]) -> String {
    let mut list = String::with_capacity(acks.len() * 16 + 2);
    list.push('[');
    for (device, position) in acks {
        let _ = write!(list, "[{},{}],", position.0, device.0);
    }
    close(list)
}

fn close(mut list: String) -> String {
    if list.len() > 1 {
        list.pop();
    }
    list.push(']');
    list
}

fn lookup(
    sends: &[SendRequest],
    acks: &[(DeviceNo, Position)],
    not_before: Timestamp,
) -> Query<'static, Sqlite, SqliteArguments> {
    let users = send::accounts(sends);
    sqlx::query(DELETE_AND_LOOKUP)
        .bind(acknowledged(acks))
        .bind(json_list(sends.iter().map(|send| send.sender.no.0)))
        .bind(sends.iter().flat_map(|send| *send.key.as_bytes()).collect::<Vec<u8>>())
        .bind(not_before)
        .bind(json_list((0..users.len()).map(|n| n * 16 + 1)))
        .bind(users.iter().flat_map(|user| *user.as_bytes()).collect::<Vec<u8>>())
}

fn outcomes_of(rows: &[SqliteRow]) -> Result<PreviousSends> {
    let mut previous_sends = PreviousSends::with_capacity(rows.len());
    for row in rows {
        previous_sends.insert(
            (row.try_get(0)?, row.try_get(1)?),
            send::decoded(row.try_get(2)?, row.try_get(3)?, row.try_get(4)?)?,
        );
    }
    Ok(previous_sends)
}

fn devices_of(rows: &[SqliteRow]) -> Result<Devices> {
    let mut devices = Devices::with_capacity(rows.len());
    for row in rows {
        let (user, id, no) = <(UserId, DeviceId, DeviceNo)>::from_row(row)?;
        devices.entry(user).or_default().push((id, no));
    }
    Ok(devices)
}

/// The messages with the place of the first one and the time of receipt; the receipts with the times of the send and of
/// their review.
fn insertion(
    text: &'static str,
    (messages, first, received_at): (&[NewMessage<'_>], i64, Timestamp),
    (records, sent_at, review_at): (&[IdempotencyRecord<'_>], Timestamp, Timestamp),
) -> Query<'static, Sqlite, SqliteArguments> {
    let mut list = String::with_capacity(messages.len() * 24 + 2);
    let mut blob = Vec::with_capacity(messages.iter().map(|message| message.queued.sealed.0.len() + 48).sum());
    list.push('[');
    for NewMessage { send, queued, id, .. } in messages {
        let _ = write!(list, "[{},{},{}],", queued.device.0, blob.len() + 1, queued.sealed.0.len());
        blob.extend_from_slice(id.as_bytes());
        blob.extend_from_slice(send.sender.user.as_bytes());
        blob.extend_from_slice(send.sender.device.as_bytes());
        blob.extend_from_slice(&queued.sealed.0);
    }
    let messages = sqlx::query(text).bind(close(list)).bind(blob).bind(first).bind(received_at);

    let mut list = String::with_capacity(records.len() * 40 + 2);
    let mut blob = Vec::with_capacity(records.iter().map(|record| record.outcome.len() + 32).sum());
    list.push('[');
    for IdempotencyRecord { send, outcome, first, last } in records {
        let (offset, length) = (blob.len() + 1, outcome.len());
        let _ = write!(list, "[{},{offset},{length},{},{}],", send.sender.no.0, first.0, last.0);
        blob.extend_from_slice(send.key.as_bytes());
        blob.extend_from_slice(&send.digest);
        blob.extend_from_slice(outcome);
    }
    messages.bind(close(list)).bind(blob).bind(sent_at).bind(review_at)
}
