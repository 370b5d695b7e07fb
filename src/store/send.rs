//! Queueing: the one transaction in which sends are judged and stored, and acknowledged messages deleted.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use sqlx::{Row, Sqlite, Transaction};

use crate::clock::Timestamp;
use crate::model::ids::{Address, DeviceId, DeviceNo, IdempotencyKey, Position, UserId};
use crate::model::mail::{Outcome, Outgoing, Replay, Sent};
use crate::store::inboxes::Numbered;
use crate::store::outcome::{self, Devices, Queued};
use crate::store::{Result, Store, commit, json_list};

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

    /// Whether this device has sent under this key before, so that a repeat would queue nothing new.
    pub async fn has_outcome(&self, sender: DeviceNo, key: IdempotencyKey) -> Result<bool> {
        let found = sqlx::query("SELECT 1 FROM sends WHERE sender_no = $1 AND idempotency_key = $2");
        Ok(found.bind(sender).bind(key).fetch_optional(&mut *self.read.get().await?).await?.is_some())
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
        let numbered = self.inboxes.number(rows.len(), now);
        insert_messages(tx, &rows, &numbered).await?;
        insert_receipts(tx, &receipts, numbered.first_position, now, now + self.limits.idempotency_lifetime).await?;
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
    numbered: &Numbered,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut list = String::with_capacity(rows.len() * 24);
    let mut blob = Vec::with_capacity(rows.iter().map(|(_, row)| row.sealed.0.len() + 48).sum());
    list.push('[');
    for ((mail, row), id) in rows.iter().zip(&numbered.ids) {
        let _ = write!(list, "[{},{},{}],", row.device.0, blob.len() + 1, row.sealed.0.len());
        blob.extend_from_slice(id.as_bytes());
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
    .bind(numbered.first_position)
    .bind(numbered.received_at)
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

fn malformed(column: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: "not what this server writes".into() }
}
