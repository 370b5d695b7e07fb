//! Queueing in SQLite. Lists travel as JSON, and ids and bodies in one blob that the statement cuts up by offset: so a
//! group is a fixed number of statements, however much is in it.

use std::fmt::Write;

use sqlx::Row;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceId, DeviceNo, Position, UserId};
use crate::model::mail::{Outgoing, Sent};
use crate::store::database::SqliteTx;
use crate::store::outcome::{self, Devices, Queued};
use crate::store::send::{self, Found, Judgement, Known, NewMessage, Receipt, Tally};
use crate::store::{Result, Store, json_list};

impl Store {
    pub(super) async fn settle_in_sqlite(
        &self,
        tx: &mut SqliteTx,
        sends: &[Outgoing],
        acks: &[(DeviceNo, Position)],
        now: Timestamp,
    ) -> Result<(Vec<Option<Sent>>, Tally)> {
        let mut tally = Tally { acked: delete_acknowledged(tx, acks).await?, ..Tally::default() };
        if sends.is_empty() {
            return Ok((Vec::new(), tally));
        }
        let alive_since = now - self.limits.idempotency_lifetime;
        let known = known_outcomes(tx, sends, alive_since).await?;
        let found = Found { known, devices: current_devices(tx, sends).await? };
        let Judgement { sent, rows, judged } = send::judge(sends, found, |_| false);
        let received = self.numbering.receive(rows.len(), now);
        let first = self.numbering.place(rows.len());
        let position = |n: usize| first + n as i64;
        let messages = send::numbered(&rows, &received.ids, position);
        tally.add(&messages, insert_messages(tx, &messages, received.received_at).await?);
        let review_at = now + self.limits.idempotency_lifetime;
        insert_receipts(tx, &send::receipts(&judged, position), now, review_at).await?;
        let queued: Vec<_> = rows.iter().map(|(_, row)| *row).collect();
        tally.cut = self.hold_inbox_limit(tx, &queued, now).await?;
        Ok((sent, tally))
    }

    /// Cuts every inbox that has just passed its maximum back to it. Answers how many messages that cost.
    async fn hold_inbox_limit(&self, tx: &mut SqliteTx, queued: &[Queued<'_>], now: Timestamp) -> Result<u64> {
        let max = self.limits.max_inbox_size;
        let unsure = self.numbering.add(queued, max);
        if unsure.is_empty() {
            return Ok(0);
        }
        let mut cut = 0;
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
        Ok(cut)
    }

    async fn cut_inbox(&self, tx: &mut SqliteTx, device: DeviceNo, now: Timestamp) -> Result<u64> {
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

/// The outcomes that are stored for the keys of `sends`. One that is past its age still counts while a message of it
/// waits, so that no message is ever queued twice.
async fn known_outcomes(tx: &mut SqliteTx, sends: &[Outgoing], alive_since: Timestamp) -> Result<Known> {
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
    .bind(alive_since)
    .fetch_all(&mut **tx)
    .await?;
    let mut known = Known::with_capacity(rows.len());
    for row in rows {
        known.insert((row.get(0), row.get(1)), send::decoded(row.get(2), row.get(3))?);
    }
    Ok(known)
}

/// Answers how many of them were still there.
async fn delete_acknowledged(tx: &mut SqliteTx, acks: &[(DeviceNo, Position)]) -> Result<u64> {
    if acks.is_empty() {
        return Ok(0);
    }
    // The device is compared too, so that nothing but its own mail can ever be deleted.
    let mut list = String::from("[");
    for (device, position) in acks {
        let _ = write!(list, "[{},{}],", position.0, device.0);
    }
    list.pop();
    list.push(']');
    let deleted = sqlx::query(
        "DELETE FROM messages WHERE position IN (
             SELECT m.position FROM json_each($1) acked
             CROSS JOIN messages m ON m.position = acked.value ->> 0 WHERE m.device_no = acked.value ->> 1)",
    )
    .bind(list)
    .execute(&mut **tx)
    .await?;
    Ok(deleted.rows_affected())
}

/// All devices of all accounts that are written to.
async fn current_devices(tx: &mut SqliteTx, sends: &[Outgoing]) -> Result<Devices> {
    let users = send::accounts(sends);
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

async fn insert_messages(tx: &mut SqliteTx, messages: &[NewMessage<'_>], received_at: Timestamp) -> Result<u64> {
    let Some(first) = messages.first() else { return Ok(0) };
    let mut list = String::with_capacity(messages.len() * 24);
    let mut blob = Vec::with_capacity(messages.iter().map(|message| message.queued.sealed.0.len() + 48).sum());
    list.push('[');
    for NewMessage { mail, queued, id, .. } in messages {
        let _ = write!(list, "[{},{},{}],", queued.device.0, blob.len() + 1, queued.sealed.0.len());
        blob.extend_from_slice(id.as_bytes());
        blob.extend_from_slice(mail.sender.user.as_bytes());
        blob.extend_from_slice(mail.sender.device.as_bytes());
        blob.extend_from_slice(&queued.sealed.0);
    }
    list.pop();
    list.push(']');
    let inserted = sqlx::query(
        "INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
         SELECT $3 + row.key, row.value ->> 0, substr($2, row.value ->> 1, 16), substr($2, (row.value ->> 1) + 16, 16),
                substr($2, (row.value ->> 1) + 32, 16), $4, substr($2, (row.value ->> 1) + 48, row.value ->> 2)
         FROM json_each($1) row",
    )
    .bind(list)
    .bind(blob)
    .bind(first.position)
    .bind(received_at)
    .execute(&mut **tx)
    .await?;
    Ok(inserted.rows_affected())
}

async fn insert_receipts(
    tx: &mut SqliteTx,
    receipts: &[Receipt<'_>],
    sent_at: Timestamp,
    review_at: Timestamp,
) -> Result<()> {
    if receipts.is_empty() {
        return Ok(());
    }
    let mut list = String::with_capacity(receipts.len() * 40);
    let mut blob = Vec::new();
    list.push('[');
    for Receipt { mail, outcome, first, last } in receipts {
        let (offset, length) = (blob.len() + 1, outcome.len());
        let _ = write!(list, "[{},{offset},{length},{},{}],", mail.sender.no.0, first.0, last.0);
        blob.extend_from_slice(mail.key.as_bytes());
        blob.extend_from_slice(&mail.digest);
        blob.extend_from_slice(outcome);
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
    .bind(sent_at)
    .bind(review_at)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
