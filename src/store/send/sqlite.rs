//! Queueing in SQLite. Lists travel as JSON, and ids and bodies in one blob that the statement cuts up by offset: so a
//! group is a fixed number of statements, however much is in it.
//!
//! A trip to the thread of the connection costs as much as a statement, so a group makes two: one text begins, deletes
//! and asks, the other one writes and commits.

use std::fmt::Write;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{FromRow, Row, Sqlite};

use crate::clock::Timestamp;
use crate::model::ids::{DeviceId, DeviceNo, Position, UserId};
use crate::model::mail::{Outgoing, Sent};
use crate::store::outcome::{self, Devices};
use crate::store::send::{self, Found, Judgement, Known, NewMessage, Receipt, Tally};
use crate::store::sqlite::{SqliteStore, Transaction};
use crate::store::{Result, Store, json_list};
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
const DELETE_AND_ASK: &str = concat!(
    "BEGIN IMMEDIATE;",
    delete_acknowledged!(),
    "SELECT s.sender_no, s.idempotency_key, s.outcome, s.digest
     FROM json_each($2) asked
     CROSS JOIN sends s ON s.sender_no = asked.value AND s.idempotency_key = substr($3, asked.key * 16 + 1, 16)
     WHERE s.sent_at > $4
        OR EXISTS (SELECT 1 FROM messages m WHERE m.position BETWEEN s.first_position AND s.last_position);

     SELECT d.user_id, d.id, d.no FROM json_each($5) asked
     CROSS JOIN devices d ON d.user_id = substr($6, asked.value, 16)"
);

/// A row of `sends` that is replaced is past its age and has no message waiting: see `DELETE_AND_ASK`.
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
    pub(super) async fn settle_in_sqlite(
        &self,
        sqlite: &SqliteStore,
        sends: &[Outgoing],
        acks: &[(DeviceNo, Position)],
        now: Timestamp,
    ) -> Result<(Vec<Option<Sent>>, Tally)> {
        let mut tx = Span::within("store.begin").attempt(sqlite.unbegun()).await?;
        if sends.is_empty() {
            let text = sqlx::query(DELETE).bind(acknowledged(acks));
            let [_begun, deleted, _committed] = Span::within("store.commit").attempt(tx.finish(text)).await?;
            return Ok((Vec::new(), Tally { acked: deleted.changed, ..Tally::default() }));
        }
        let lifetime = self.limits.idempotency_lifetime;
        let question = tx.run(question(sends, acks, now - lifetime));
        let [_begun, deleted, known, devices] = Span::within("store.write").attempt(question).await?;
        let mut tally = Tally { acked: deleted.changed, ..Tally::default() };
        let found = Found { known: outcomes_of(&known.rows)?, devices: devices_of(&devices.rows)? };
        let Judgement { sent, rows, judged } = send::judge(sends, found, |_| false);

        let received = self.numbering.receive(rows.len(), now);
        let first = self.numbering.place(rows.len());
        let position = |n: usize| first + n as i64;
        let messages = send::numbered(&rows, &received.ids, position);
        let receipts = send::receipts(&judged, position);
        let queued: Vec<_> = rows.iter().map(|(_, row)| *row).collect();
        let unsure = self.numbering.add(&queued, self.limits.max_inbox_size);
        let insert = |text| insertion(text, (&messages, first, received.received_at), (&receipts, now, now + lifetime));
        if unsure.is_empty() {
            let write = tx.finish(insert(INSERT_AND_COMMIT));
            let [inserted, _receipts, _committed] = Span::within("store.commit").attempt(write).await?;
            tally.add(&messages, inserted.changed);
        } else {
            let write = self.insert_and_cut(&mut tx, insert(INSERT), &unsure, now);
            let (inserted, cut) = Span::within("store.write").attempt(write).await?;
            tally.add(&messages, inserted);
            tally.cut = cut;
            Span::within("store.commit").attempt(tx.commit()).await?;
        }
        Ok((sent, tally))
    }

    /// Inserts, then counts the inboxes of these devices and cuts each that has passed its maximum back to it. Answers how
    /// many messages came and how many went.
    async fn insert_and_cut(
        &self,
        tx: &mut Transaction,
        insertion: Query<'_, Sqlite, SqliteArguments>,
        unsure: &[DeviceNo],
        now: Timestamp,
    ) -> Result<(u64, u64)> {
        let [inserted, _receipts] = tx.run(insertion).await?;
        let (max, mut cut) = (self.limits.max_inbox_size, 0);
        let counts: Vec<(DeviceNo, u32)> = sqlx::query_as(
            "SELECT asked.value, (SELECT COUNT(*) FROM messages m WHERE m.device_no = asked.value)
             FROM json_each($1) asked",
        )
        .bind(json_list(unsure.iter().map(|device| device.0)))
        .fetch_all(&mut **tx)
        .await?;
        for (device, count) in counts {
            if count > max {
                cut += self.cut_inbox(tx, device, now).await?;
            }
            self.numbering.set(device, count.min(max));
        }
        Ok((inserted.changed, cut))
    }

    async fn cut_inbox(&self, tx: &mut Transaction, device: DeviceNo, now: Timestamp) -> Result<u64> {
        let inbox: Vec<(i64, UserId, bool)> = sqlx::query_as(
            "SELECT position, sender_user, received_at <= $2 FROM messages WHERE device_no = $1 ORDER BY position",
        )
        .bind(device)
        .bind(now - self.limits.retention)
        .fetch_all(&mut **tx)
        .await?;
        let gone = outcome::cut(&inbox, self.limits.max_inbox_size as usize);
        let cut = sqlx::query("DELETE FROM messages WHERE position IN (SELECT value FROM json_each($1))")
            .bind(json_list(gone.into_iter()))
            .execute(&mut **tx)
            .await?;
        tracing::debug!("an inbox was full; its oldest mail was cut");
        Ok(cut.rows_affected())
    }
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

fn question(
    sends: &[Outgoing],
    acks: &[(DeviceNo, Position)],
    alive_since: Timestamp,
) -> Query<'static, Sqlite, SqliteArguments> {
    let users = send::accounts(sends);
    sqlx::query(DELETE_AND_ASK)
        .bind(acknowledged(acks))
        .bind(json_list(sends.iter().map(|mail| mail.sender.no.0)))
        .bind(sends.iter().flat_map(|mail| *mail.key.as_bytes()).collect::<Vec<u8>>())
        .bind(alive_since)
        .bind(json_list((0..users.len()).map(|n| n * 16 + 1)))
        .bind(users.iter().flat_map(|user| *user.as_bytes()).collect::<Vec<u8>>())
}

fn outcomes_of(rows: &[SqliteRow]) -> Result<Known> {
    let mut known = Known::with_capacity(rows.len());
    for row in rows {
        known.insert((row.try_get(0)?, row.try_get(1)?), send::decoded(row.try_get(2)?, row.try_get(3)?)?);
    }
    Ok(known)
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
    (receipts, sent_at, review_at): (&[Receipt<'_>], Timestamp, Timestamp),
) -> Query<'static, Sqlite, SqliteArguments> {
    let mut list = String::with_capacity(messages.len() * 24 + 2);
    let mut blob = Vec::with_capacity(messages.iter().map(|message| message.queued.sealed.0.len() + 48).sum());
    list.push('[');
    for NewMessage { mail, queued, id, .. } in messages {
        let _ = write!(list, "[{},{},{}],", queued.device.0, blob.len() + 1, queued.sealed.0.len());
        blob.extend_from_slice(id.as_bytes());
        blob.extend_from_slice(mail.sender.user.as_bytes());
        blob.extend_from_slice(mail.sender.device.as_bytes());
        blob.extend_from_slice(&queued.sealed.0);
    }
    let messages = sqlx::query(text).bind(close(list)).bind(blob).bind(first).bind(received_at);

    let mut list = String::with_capacity(receipts.len() * 40 + 2);
    let mut blob = Vec::with_capacity(receipts.iter().map(|receipt| receipt.outcome.len() + 32).sum());
    list.push('[');
    for Receipt { mail, outcome, first, last } in receipts {
        let (offset, length) = (blob.len() + 1, outcome.len());
        let _ = write!(list, "[{},{offset},{length},{},{}],", mail.sender.no.0, first.0, last.0);
        blob.extend_from_slice(mail.key.as_bytes());
        blob.extend_from_slice(&mail.digest);
        blob.extend_from_slice(outcome);
    }
    messages.bind(close(list)).bind(blob).bind(sent_at).bind(review_at)
}
