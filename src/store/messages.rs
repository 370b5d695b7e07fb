//! The inboxes: queue, read, acknowledge, expire.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sqlx::{Row, Sqlite, SqlitePool, Transaction};

use crate::clock::Timestamp;
use crate::model::ids::{Address, DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use crate::model::mail::{Envelope, MAX_MESSAGE_BYTES, Outcome, Outgoing, Replay, Sealed, Sent};
use crate::store::outcome::{self, Devices, Queued};
use crate::store::{Result, Store, commit};

/// What an envelope weighs on the wire beside its sealed bytes: ids, time and framing.
const ENVELOPE_OVERHEAD: i64 = 80;
/// Devices whose inbox size is remembered. Past that all are forgotten, and counted again when they get mail.
const REMEMBERED_INBOXES: usize = 100_000;

/// What the writer remembers between groups. There is one writer, so nobody else changes it.
pub(super) struct Inboxes {
    state: Mutex<InboxState>,
}

#[derive(Default)]
struct InboxState {
    last_position: i64,
    /// At most so many messages wait for a device. Acks don't lower it, so it may be too high, never too low; a
    /// device that seems to pass its limit is counted afresh. So the inbox that is emptied in time costs nothing.
    at_most: HashMap<DeviceNo, u32>,
}

impl Inboxes {
    pub(super) async fn load(pool: &SqlitePool) -> std::result::Result<Self, sqlx::Error> {
        let last: Option<i64> =
            sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetch_optional(pool).await?;
        Ok(Self { state: Mutex::new(InboxState { last_position: last.unwrap_or_default(), at_most: HashMap::new() }) })
    }

    fn state(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves `count` positions and answers the first. They are lost if the transaction fails, which does no harm.
    fn take_positions(&self, count: usize) -> i64 {
        let mut state = self.state();
        let first = state.last_position + 1;
        state.last_position += i64::try_from(count).unwrap_or(i64::MAX);
        first
    }

    /// Counts new mail in, and answers the devices that have to be counted because they may have passed `max`.
    fn add(&self, queued: &[Queued<'_>], max: u32) -> Vec<DeviceNo> {
        let mut state = self.state();
        if state.at_most.len() > REMEMBERED_INBOXES {
            state.at_most.clear();
        }
        let mut unsure = HashSet::new();
        for message in queued {
            let at_most = state.at_most.entry(message.device).or_insert(u32::MAX);
            *at_most = at_most.saturating_add(1);
            if *at_most > max {
                unsure.insert(message.device);
            }
        }
        unsure.into_iter().collect()
    }

    fn set(&self, device: DeviceNo, count: u32) {
        self.state().at_most.insert(device, count);
    }
}

/// A part of an inbox, oldest first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The messages.
    pub envelopes: Vec<Envelope>,
    /// Whether there may be more behind them.
    pub more: bool,
}

/// What a step of the sweep over old messages did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// Messages deleted.
    pub deleted: u64,
    /// Whether there may be more to delete.
    pub more: bool,
}

impl Store {
    /// Deletes acknowledged messages and queues new ones, all in one transaction, in the order given. Durable when it
    /// returns. Each send is judged by itself; repeats of a send within one group are found as well.
    pub async fn settle(&self, sends: &[Outgoing], acks: &[(DeviceNo, Position)], now: Timestamp) -> Result<Vec<Sent>> {
        let mut tx = self.begin().await?;
        delete_acknowledged(&mut tx, acks).await?;
        let sent = if sends.is_empty() { Vec::new() } else { self.queue(&mut tx, sends, now).await? };
        commit(tx).await?;
        Ok(sent)
    }

    async fn queue(&self, tx: &mut Transaction<'_, Sqlite>, sends: &[Outgoing], now: Timestamp) -> Result<Vec<Sent>> {
        let mut known = self.known_outcomes(tx, sends, now).await?;
        let devices = current_devices(tx, sends).await?;
        let (mut rows, mut receipts, mut sent) = (Vec::new(), Vec::new(), Vec::with_capacity(sends.len()));
        for mail in sends {
            let id = (mail.sender.no, mail.key);
            if let Some((outcome, digest)) = known.get(&id) {
                let replay = if *digest == mail.digest { Replay::SameBody } else { Replay::OtherBody };
                sent.push(Sent { outcome: outcome.clone(), woken: Vec::new(), replay: Some(replay) });
                continue;
            }
            let (outcome, queued) = outcome::evaluate(mail, &devices);
            receipts.push(Receipt { mail, outcome: outcome::encode(&outcome), first: rows.len(), count: queued.len() });
            let woken = queued.iter().map(|row| Address { user: row.user, device: row.device }).collect();
            rows.extend(queued.into_iter().map(|row| (mail, row)));
            known.insert(id, (outcome.clone(), mail.digest));
            sent.push(Sent { outcome, woken, replay: None });
        }
        let first_position = self.inboxes.take_positions(rows.len());
        insert_messages(tx, &rows, first_position, now).await?;
        insert_receipts(tx, &receipts, first_position, now, now + self.limits.idempotency_lifetime).await?;
        let queued: Vec<_> = rows.iter().map(|(_, row)| *row).collect();
        self.hold_inbox_limit(tx, &queued, now).await?;
        Ok(sent)
    }

    /// The outcomes that are stored for the keys of `sends`. One that is past its age still counts while a message of
    /// it waits, so that no message is ever queued twice.
    async fn known_outcomes(
        &self,
        tx: &mut Transaction<'_, Sqlite>,
        sends: &[Outgoing],
        now: Timestamp,
    ) -> Result<HashMap<(DeviceNo, IdempotencyKey), (Outcome, [u8; 16])>> {
        let senders = json_list(sends.iter().map(|mail| mail.sender.no.0));
        let keys: Vec<u8> = sends.iter().flat_map(|mail| *mail.key.as_bytes()).collect();
        let rows = sqlx::query(
            "SELECT s.sender_no, s.idempotency_key, s.outcome, s.digest
             FROM json_each($1) asked
             CROSS JOIN sends s ON s.sender_no = asked.value AND s.idempotency_key = substr($2, asked.key * 16 + 1, 16)
             WHERE s.sent_at > $3
                OR EXISTS (SELECT 1 FROM messages m WHERE m.position BETWEEN s.first_position AND s.last_position)",
        )
        .bind(senders)
        .bind(keys)
        .bind(now - self.limits.idempotency_lifetime)
        .fetch_all(&mut **tx)
        .await?;
        let mut known = HashMap::with_capacity(rows.len());
        for row in rows {
            let digest: Vec<u8> = row.get(3);
            let outcome = outcome::decode(row.get(2)).ok_or_else(|| malformed("outcome"))?;
            let digest = digest.try_into().map_err(|_| malformed("digest"))?;
            known.insert((row.get(0), row.get(1)), (outcome, digest));
        }
        Ok(known)
    }

    /// Cuts every inbox that has just passed its maximum back to it.
    async fn hold_inbox_limit(
        &self,
        tx: &mut Transaction<'_, Sqlite>,
        queued: &[Queued<'_>],
        now: Timestamp,
    ) -> Result<()> {
        let max = self.limits.max_inbox_size;
        let unsure = self.inboxes.add(queued, max);
        if unsure.is_empty() {
            return Ok(());
        }
        let counts: Vec<(DeviceNo, u32)> = sqlx::query_as(
            "SELECT asked.value, (SELECT COUNT(*) FROM messages m WHERE m.device_no = asked.value)
             FROM json_each($1) asked",
        )
        .bind(json_list(unsure.iter().map(|device| device.0)))
        .fetch_all(&mut **tx)
        .await?;
        for (device, count) in counts {
            if count > max {
                self.cut_inbox(tx, device, now).await?;
            }
            self.inboxes.set(device, count.min(max));
        }
        Ok(())
    }

    async fn cut_inbox(&self, tx: &mut Transaction<'_, Sqlite>, device: DeviceNo, now: Timestamp) -> Result<()> {
        let inbox: Vec<(i64, UserId, bool)> = sqlx::query_as(
            "SELECT position, sender_user, received_at <= $2 FROM messages WHERE device_no = $1 ORDER BY position",
        )
        .bind(device)
        .bind(now - self.limits.retention)
        .fetch_all(&mut **tx)
        .await?;
        let gone = outcome::cut(&inbox, self.limits.max_inbox_size as usize);
        sqlx::query("DELETE FROM messages WHERE position IN (SELECT value FROM json_each($1))")
            .bind(json_list(gone.into_iter()))
            .execute(&mut **tx)
            .await?;
        tracing::debug!("an inbox was full; its oldest mail was cut");
        Ok(())
    }

    /// The messages of an inbox behind `after` that have not expired, oldest first: at most `limit` of them, and as
    /// many as weigh `max_bytes` on the wire, but at least one.
    pub async fn unsent(
        &self,
        device: DeviceNo,
        after: Position,
        now: Timestamp,
        limit: u32,
        max_bytes: usize,
    ) -> Result<Page> {
        // The sizes are summed up before any body is read, so that no more bodies are in memory than are sent.
        let rows = sqlx::query(
            "WITH page AS MATERIALIZED (
                 SELECT position, LENGTH(body) + $5 AS size FROM messages
                 WHERE device_no = $1 AND position > $2 AND received_at > $3 ORDER BY position LIMIT $4),
             weighed AS (SELECT position, size, SUM(size) OVER (ORDER BY position ROWS UNBOUNDED PRECEDING) AS total FROM page)
             SELECT m.position, m.id, m.sender_user, m.sender_device, m.received_at, m.body, weighed.position
             FROM weighed CROSS JOIN messages m ON m.position = weighed.position
             WHERE weighed.total <= $6 OR weighed.total = weighed.size ORDER BY m.position",
        )
        .bind(device)
        .bind(after)
        .bind(now - self.limits.retention)
        .bind(limit)
        .bind(ENVELOPE_OVERHEAD)
        .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX))
        .fetch_all(&self.read)
        .await?;
        let envelopes: Vec<_> = rows
            .into_iter()
            .map(|row| Envelope {
                position: row.get(0),
                id: row.get(1),
                sender_user: row.get(2),
                sender_device: row.get(3),
                received_at: row.get(4),
                body: Sealed(Bytes::from(row.get::<Vec<u8>, _>(5))),
            })
            .collect();
        let bytes: usize = envelopes.iter().map(|envelope| envelope.body.0.len() + ENVELOPE_OVERHEAD as usize).sum();
        // A page that another large message would not have fitted into may have been cut short.
        let more = envelopes.len() >= limit as usize || bytes + MAX_MESSAGE_BYTES > max_bytes;
        Ok(Page { more: more && !envelopes.is_empty(), envelopes })
    }

    /// Where these messages lie in the inbox of `device`. Ids of other devices' messages, and unknown ones, are left out.
    pub async fn positions(&self, device: DeviceNo, ids: &[MessageId]) -> Result<Vec<Position>> {
        let offsets = json_list((0..ids.len()).map(|n| n * 16 + 1));
        let ids: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
        let positions = sqlx::query_scalar(
            "SELECT position FROM messages
             WHERE device_no = $1 AND id IN (SELECT substr($2, value, 16) FROM json_each($3))",
        )
        .bind(device)
        .bind(ids)
        .bind(offsets)
        .fetch_all(&self.read)
        .await?;
        Ok(positions)
    }

    /// Deletes up to `limit` messages that are past the retention. It looks at the oldest end of the table only, where
    /// the expired ones are, since positions ascend in the order of receipt.
    pub async fn expire_messages(&self, now: Timestamp, limit: u32) -> Result<Expired> {
        let mut tx = self.begin().await?;
        let deleted = sqlx::query(
            "DELETE FROM messages WHERE position <= (
                 SELECT MAX(position) FROM (SELECT position, received_at FROM messages ORDER BY position LIMIT $2)
                 WHERE received_at <= $1)",
        )
        .bind(now - self.limits.retention)
        .bind(limit)
        .execute(&mut *tx)
        .await?
        .rows_affected();
        commit(tx).await?;
        Ok(Expired { deleted, more: deleted >= u64::from(limit) })
    }

    /// Forgets up to about `limit` outcomes that are past their age. One whose messages still wait is kept, and looked
    /// at again later. Answers how many were looked at.
    pub async fn expire_sends(&self, now: Timestamp, limit: u32) -> Result<u64> {
        let mut tx = self.begin().await?;
        let last: Option<Timestamp> = sqlx::query_scalar(
            "SELECT MAX(review_at) FROM
                 (SELECT review_at FROM sends WHERE review_at <= $1 ORDER BY review_at LIMIT $2)",
        )
        .bind(now)
        .bind(limit)
        .fetch_one(&mut *tx)
        .await?;
        let Some(last) = last else { return Ok(0) };
        let deleted = sqlx::query(
            "DELETE FROM sends WHERE review_at <= $1 AND NOT EXISTS
                 (SELECT 1 FROM messages m WHERE m.position BETWEEN sends.first_position AND sends.last_position)",
        )
        .bind(last)
        .execute(&mut *tx)
        .await?
        .rows_affected();
        let kept = sqlx::query("UPDATE sends SET review_at = $2 WHERE review_at <= $1")
            .bind(last)
            .bind(now + self.limits.idempotency_lifetime)
            .execute(&mut *tx)
            .await?
            .rows_affected();
        commit(tx).await?;
        Ok(deleted + kept)
    }
}

/// The outcome of a send, about to be written down.
struct Receipt<'a> {
    mail: &'a Outgoing,
    outcome: Vec<u8>,
    first: usize,
    count: usize,
}

async fn delete_acknowledged(tx: &mut Transaction<'_, Sqlite>, acks: &[(DeviceNo, Position)]) -> Result<()> {
    if acks.is_empty() {
        return Ok(());
    }
    // The device is compared too, so that nothing but its own mail can ever be deleted.
    let mut list = String::from("[");
    for (device, position) in acks {
        let _ = write!(list, "[{},{}],", position.0, device.0);
    }
    list.pop();
    list.push(']');
    sqlx::query(
        "DELETE FROM messages WHERE position IN (
             SELECT m.position FROM json_each($1) acked
             CROSS JOIN messages m ON m.position = acked.value ->> 0 WHERE m.device_no = acked.value ->> 1)",
    )
    .bind(list)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// All devices of all accounts that are written to.
async fn current_devices(tx: &mut Transaction<'_, Sqlite>, sends: &[Outgoing]) -> Result<Devices> {
    let users: HashSet<UserId> =
        sends.iter().flat_map(|mail| &mail.recipients).map(|recipient| recipient.user).collect();
    let offsets = json_list((0..users.len()).map(|n| n * 16 + 1));
    let ids: Vec<u8> = users.iter().flat_map(|user| *user.as_bytes()).collect();
    let rows: Vec<(UserId, DeviceId, DeviceNo)> = sqlx::query_as(
        "SELECT d.user_id, d.id, d.no FROM json_each($1) asked
         CROSS JOIN devices d ON d.user_id = substr($2, asked.value, 16)",
    )
    .bind(offsets)
    .bind(ids)
    .fetch_all(&mut **tx)
    .await?;
    let mut devices = Devices::with_capacity(users.len());
    for (user, id, no) in rows {
        devices.entry(user).or_default().push((id, no));
    }
    Ok(devices)
}

/// One statement for all rows. Their ids and bodies travel in one blob, cut up by offset.
async fn insert_messages(
    tx: &mut Transaction<'_, Sqlite>,
    rows: &[(&Outgoing, Queued<'_>)],
    first_position: i64,
    now: Timestamp,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut list = String::with_capacity(rows.len() * 24);
    let mut blob = Vec::with_capacity(rows.iter().map(|(_, row)| row.sealed.0.len() + 48).sum());
    list.push('[');
    for (mail, row) in rows {
        let _ = write!(list, "[{},{},{}],", row.device.0, blob.len() + 1, row.sealed.0.len());
        blob.extend_from_slice(MessageId::at(now).as_bytes());
        blob.extend_from_slice(mail.sender.user.as_bytes());
        blob.extend_from_slice(mail.sender.device.as_bytes());
        blob.extend_from_slice(&row.sealed.0);
    }
    list.pop();
    list.push(']');
    sqlx::query(
        "INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
         SELECT $3 + row.key, row.value ->> 0, substr($2, row.value ->> 1, 16), substr($2, (row.value ->> 1) + 16, 16),
                substr($2, (row.value ->> 1) + 32, 16), $4, substr($2, (row.value ->> 1) + 48, row.value ->> 2)
         FROM json_each($1) row",
    )
    .bind(list)
    .bind(blob)
    .bind(first_position)
    .bind(now)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn insert_receipts(
    tx: &mut Transaction<'_, Sqlite>,
    receipts: &[Receipt<'_>],
    first_position: i64,
    now: Timestamp,
    review_at: Timestamp,
) -> Result<()> {
    if receipts.is_empty() {
        return Ok(());
    }
    let mut list = String::with_capacity(receipts.len() * 40);
    let mut blob = Vec::new();
    list.push('[');
    for receipt in receipts {
        let first = first_position + receipt.first as i64;
        let last = first + receipt.count as i64 - 1;
        let _ =
            write!(list, "[{},{},{},{first},{last}],", receipt.mail.sender.no.0, blob.len() + 1, receipt.outcome.len());
        blob.extend_from_slice(receipt.mail.key.as_bytes());
        blob.extend_from_slice(&receipt.mail.digest);
        blob.extend_from_slice(&receipt.outcome);
    }
    list.pop();
    list.push(']');
    // A row that is replaced is past its age and has no message waiting: see `known_outcomes`.
    sqlx::query(
        "INSERT OR REPLACE INTO sends
             (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
         SELECT row.value ->> 0, substr($2, row.value ->> 1, 16), substr($2, (row.value ->> 1) + 16, 16),
                substr($2, (row.value ->> 1) + 32, row.value ->> 2), $3, $4, row.value ->> 3, row.value ->> 4
         FROM json_each($1) row",
    )
    .bind(list)
    .bind(blob)
    .bind(now)
    .bind(review_at)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// `[1,2,3]`
pub(super) fn json_list<T: std::fmt::Display>(values: impl Iterator<Item = T>) -> String {
    let mut list = String::from("[");
    for value in values {
        let _ = write!(list, "{value},");
    }
    if list.len() > 1 {
        list.pop();
    }
    list.push(']');
    list
}

fn malformed(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: "not what this server writes".into() }
}
