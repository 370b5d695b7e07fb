//! Queueing in PostgreSQL. Lists travel as arrays: a group is a fixed number of statements, however much is in it.
//!
//! The accounts that are written to are locked first, in ascending order, and stay so until the commit. Everything that
//! is read afterwards (devices, inboxes) holds until then, and the block of positions that is taken afterwards is
//! higher than those of all groups that have been visible in these inboxes. Whatever else two groups could do to each
//! other (the same send at the same moment, the same messages deleted in another order) makes one of them start over.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use crate::model::mail::{Outgoing, Sent};
use crate::store::database::{PostgresTx, timely};
use crate::store::outcome::{self, Devices};
use crate::store::postgres::PostgresStore;
use crate::store::send::{self, Found, Judgement, Known, Locking, NewMessage, Receipt, Tally};
use crate::store::{Limits, Result, Store};
use crate::telemetry::traces::Span;

/// Positions in a block of the sequence, as the migration says.
const BLOCK: usize = 65_536;
/// Accounts whose full inboxes are cut in one group.
const FULL_AT_ONCE: usize = 16;

/// $1 are accounts in ascending order, $2 how many more messages a device of each gets.
const LOCK: &str = "
    WITH locked AS MATERIALIZED (
        SELECT l.user_id, asked.more FROM unnest($1, $2) AS asked (user_id, more) JOIN account_locks l USING (user_id)
        ORDER BY l.user_id FOR NO KEY UPDATE OF l)
    UPDATE account_locks l SET at_most = l.at_most + locked.more FROM locked
    WHERE l.user_id = locked.user_id RETURNING l.user_id, l.at_most";

/// The same without those that somebody else holds. Those that are not there at all are answered with 0.
const LOCK_WHAT_IS_FREE: &str = "
    WITH locked AS MATERIALIZED (
        SELECT l.user_id, asked.more FROM unnest($1, $2) AS asked (user_id, more) JOIN account_locks l USING (user_id)
        ORDER BY l.user_id FOR NO KEY UPDATE OF l SKIP LOCKED),
    counted AS (
        UPDATE account_locks l SET at_most = l.at_most + locked.more FROM locked
        WHERE l.user_id = locked.user_id RETURNING l.user_id, l.at_most)
    SELECT user_id, at_most FROM counted UNION ALL
    SELECT user_id, 0 FROM unnest($1) AS asked (user_id)
    WHERE NOT EXISTS (SELECT 1 FROM account_locks l WHERE l.user_id = asked.user_id)";

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
const ASK: &str = "
    SELECT s.sender_no, s.idempotency_key, NULL::uuid, NULL::uuid, s.outcome, s.digest
    FROM unnest($1, $2) AS asked (sender_no, idempotency_key) CROSS JOIN LATERAL (
        SELECT * FROM sends known
        WHERE known.sender_no = asked.sender_no AND known.idempotency_key = asked.idempotency_key OFFSET 0) s
    WHERE s.sent_at > $3 OR EXISTS (
        SELECT 1 FROM messages m
        WHERE m.received_at = s.sent_at AND m.position BETWEEN s.first_position AND s.last_position)
    UNION ALL
    SELECT no, NULL, user_id, id, NULL, NULL FROM devices WHERE user_id = ANY($4)
    UNION ALL
    SELECT nextval('message_blocks'), NULL, NULL, NULL, NULL, NULL FROM generate_series(1, $5)";

/// A row of the answer to `ASK`: a sender with its key, outcome and digest; or a device with its account; or a block.
type Answer = (i64, Option<IdempotencyKey>, Option<UserId>, Option<DeviceId>, Option<Vec<u8>>, Option<Vec<u8>>);

/// A row of `sends` that is replaced is past its age and has no message waiting: see `ASK`.
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
type InOrder = (Vec<DeviceNo>, Vec<Position>);

fn in_order(messages: &[(DeviceNo, Position)]) -> InOrder {
    let mut messages = messages.to_vec();
    messages.sort_unstable();
    messages.dedup();
    messages.into_iter().unzip()
}

impl Store {
    pub(super) async fn settle_in_postgres(
        &self,
        postgres: &PostgresStore,
        sends: &[Outgoing],
        acks: &[(DeviceNo, Position)],
        now: Timestamp,
        locking: Locking,
    ) -> Result<Option<(Vec<Option<Sent>>, Tally)>> {
        let mut tx = Span::within("store.begin").attempt(postgres.begin_group()).await?;
        let write = self.write_group(&mut tx, sends, acks, now, locking);
        let settled = Span::within("store.write").attempt(write).await?;
        match settled {
            Some(_) => Span::within("store.commit").attempt(tx.end("COMMIT")).await?,
            None => tx.end("ROLLBACK").await?,
        }
        Ok(settled)
    }

    async fn write_group(
        &self,
        tx: &mut PostgresTx,
        sends: &[Outgoing],
        acks: &[(DeviceNo, Position)],
        now: Timestamp,
        locking: Locking,
    ) -> Result<Option<(Vec<Option<Sent>>, Tally)>> {
        let mut tally = Tally::default();
        let acks = &in_order(acks);
        if sends.is_empty() {
            tally.acked = tx.delete_messages(acks).await?;
            return Ok(Some((Vec::new(), tally)));
        }
        let (lifetime, max) = (self.limits.idempotency_lifetime, self.limits.max_inbox_size);
        let locked = tx.lock_accounts(sends, locking).await?;
        let full = |at_most: i32| i64::from(at_most) > i64::from(max);
        let (later, cut) =
            left_for_later(sends, &locked, |user| locked.get(user).is_some_and(|most| full(*most)), locking);
        let (found, blocks) = tx.ask(sends, now - lifetime).await?;
        let is_later = |mail: &Outgoing| later.contains(&(mail.sender.no, mail.key));
        let Judgement { sent, rows, judged } = send::judge(sends, found, is_later);
        let received = self.numbering.receive(rows.len(), now);
        let position = |n: usize| blocks[n / BLOCK] + (n % BLOCK) as i64;
        let receipts = send::receipts(&judged, position);
        let messages = send::numbered(&rows, &received.ids, position);
        let written = tx.write(&receipts, &messages, acks, received.received_at, lifetime).await?;
        // Another group has just written the outcome of one of these sends down.
        if written.receipts < receipts.len() as i64 {
            return Ok(None);
        }
        tally.acked = written.acked.unsigned_abs();
        if tally.acked < acks.1.len() as u64 {
            tally.acked += tx.delete_once(acks).await?;
        }
        tally.add(&messages, written.messages.unsigned_abs());
        if !cut.is_empty() {
            tally.cut = tx.hold_inbox_limit(&self.limits, &cut, now).await?;
        }
        Ok(Some((sent, tally)))
    }
}

/// The sends that are left for a later group, and the accounts whose inboxes have to be counted now. A send is left when
/// one of its accounts could not be locked; and, but for the first one, when with it too many full accounts would come
/// together, since cutting an inbox takes time, and everybody waits for it.
fn left_for_later(
    sends: &[Outgoing],
    locked: &HashMap<UserId, i32>,
    is_full: impl Fn(&UserId) -> bool,
    locking: Locking,
) -> (HashSet<(DeviceNo, IdempotencyKey)>, Vec<UserId>) {
    let (mut later, mut cut) = (HashSet::new(), HashSet::new());
    for mail in sends {
        let users = || mail.accounts();
        // Accounts that never were have no lock, and nobody holds it.
        let is_held = locking == Locking::PassOver && users().any(|user| !locked.contains_key(&user));
        let full: Vec<UserId> = users().filter(&is_full).filter(|user| !cut.contains(user)).collect();
        let is_too_much = !full.is_empty() && !cut.is_empty() && cut.len() + full.len() > FULL_AT_ONCE;
        if is_held || is_too_much {
            later.insert((mail.sender.no, mail.key));
        } else {
            cut.extend(full);
        }
    }
    (later, cut.into_iter().collect())
}

impl PostgresTx {
    /// Locks the accounts that are written to, and counts their mail in. Answers how many messages may wait at the most for
    /// a device of each account that is locked now.
    async fn lock_accounts(&mut self, sends: &[Outgoing], locking: Locking) -> Result<HashMap<UserId, i32>> {
        // How many of these messages one device of an account gets at the most.
        let mut per_device: HashMap<(UserId, DeviceId), i32> = HashMap::new();
        for recipient in sends.iter().flat_map(|mail| &mail.recipients) {
            for (device, _) in &recipient.submissions {
                *per_device.entry((recipient.user, *device)).or_default() += 1;
            }
        }
        let users = send::accounts(sends);
        let mut more: HashMap<UserId, i32> = HashMap::with_capacity(users.len());
        for ((user, _), count) in per_device {
            more.entry(user).and_modify(|most| *most = count.max(*most)).or_insert(count);
        }
        let more: Vec<i32> = users.iter().map(|user| more.get(user).copied().unwrap_or_default()).collect();
        let statement = match locking {
            Locking::Wait => LOCK,
            Locking::PassOver => LOCK_WHAT_IS_FREE,
        };
        let locked: Vec<(UserId, i32)> = self.all(sqlx::query_as(statement).bind(users).bind(more)).await?;
        Ok(locked.into_iter().collect())
    }

    /// What the sends depend on, and blocks of positions, enough for all of their messages. See `ASK`.
    async fn ask(&mut self, sends: &[Outgoing], alive_since: Timestamp) -> Result<(Found, Vec<i64>)> {
        let senders: Vec<DeviceNo> = sends.iter().map(|mail| mail.sender.no).collect();
        let keys: Vec<IdempotencyKey> = sends.iter().map(|mail| mail.key).collect();
        let most: usize = sends.iter().flat_map(|mail| &mail.recipients).map(|to| to.submissions.len()).sum();
        let blocks = i64::try_from(most.div_ceil(BLOCK).max(1)).unwrap_or(i64::MAX);
        let ask =
            sqlx::query_as(ASK).bind(senders).bind(keys).bind(alive_since).bind(send::accounts(sends)).bind(blocks);
        let (mut known, mut devices, mut blocks) = (Known::default(), Devices::default(), Vec::new());
        for row in self.all::<Answer>(ask).await? {
            match row {
                (sender, Some(key), .., Some(outcome), Some(digest)) => {
                    known.insert((DeviceNo(sender), key), send::decoded(&outcome, digest)?);
                }
                (no, _, Some(user), Some(device), ..) => {
                    devices.entry(user).or_default().push((device, DeviceNo(no)));
                }
                (block, None, None, None, None, None) => blocks.push(block),
                _ => return Err(send::malformed("answer").into()),
            }
        }
        devices.values_mut().for_each(|devices| devices.sort_unstable_by_key(|(_, no)| *no));
        Ok((Found { known, devices }, blocks))
    }

    /// Writes outcomes and messages down, and deletes what is acknowledged, all in one statement.
    async fn write(
        &mut self,
        receipts: &[Receipt<'_>],
        messages: &[NewMessage<'_>],
        (acked_devices, acked_positions): &InOrder,
        received_at: Timestamp,
        lifetime: Duration,
    ) -> Result<Written> {
        let column = |of: fn(&Receipt<'_>) -> i64| receipts.iter().map(of).collect::<Vec<i64>>();
        let keys: Vec<IdempotencyKey> = receipts.iter().map(|receipt| receipt.mail.key).collect();
        let digests: Vec<&[u8]> = receipts.iter().map(|receipt| &receipt.mail.digest[..]).collect();
        let outcomes: Vec<&[u8]> = receipts.iter().map(|receipt| &receipt.outcome[..]).collect();
        let positions: Vec<Position> = messages.iter().map(|message| message.position).collect();
        let devices: Vec<DeviceNo> = messages.iter().map(|message| message.queued.device).collect();
        let ids: Vec<MessageId> = messages.iter().map(|message| message.id).collect();
        let users: Vec<UserId> = messages.iter().map(|message| message.mail.sender.user).collect();
        let senders: Vec<DeviceId> = messages.iter().map(|message| message.mail.sender.device).collect();
        let bodies: Vec<&[u8]> = messages.iter().map(|message| &message.queued.sealed.0[..]).collect();
        let write = sqlx::query_as(WRITE)
            .bind(column(|receipt| receipt.mail.sender.no.0))
            .bind(keys)
            .bind(digests)
            .bind(outcomes)
            .bind(column(|receipt| receipt.first.0))
            .bind(column(|receipt| receipt.last.0))
            .bind(received_at)
            .bind(received_at + lifetime)
            .bind(received_at - lifetime)
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

    /// Answers how many of them were still there.
    async fn delete_messages(&mut self, messages: &InOrder) -> Result<u64> {
        let deleted = self.delete_once(messages).await?;
        if deleted == messages.1.len() as u64 {
            return Ok(deleted);
        }
        Ok(deleted + self.delete_once(messages).await?)
    }

    /// Deletes what it finds. A row that was moved while it was waited for, as the correction of a clock does
    /// ([`Store::expire_messages`]), is passed over, since it is not in its place any more; the next try finds it.
    async fn delete_once(&mut self, (devices, positions): &InOrder) -> Result<u64> {
        self.run(sqlx::query(delete_messages!("$1, $2")).bind(devices).bind(positions)).await
    }

    /// How many messages wait for each device of these accounts.
    async fn inbox_sizes(&mut self, users: &[UserId]) -> Result<Vec<(UserId, DeviceNo, i64)>> {
        let statement = "
            SELECT d.user_id, d.no, (SELECT COUNT(*) FROM messages m WHERE m.device_no = d.no)
            FROM devices d WHERE d.user_id = ANY($1)";
        let count = sqlx::query_as(statement).bind(users);
        self.all(count).await
    }

    async fn set_at_most(&mut self, at_most: &HashMap<UserId, i32>) -> Result<()> {
        let (users, sizes): (Vec<UserId>, Vec<i32>) = at_most.iter().unzip();
        let statement = "
            UPDATE account_locks l SET at_most = counted.at_most FROM unnest($1, $2) AS counted (user_id, at_most)
            WHERE l.user_id = counted.user_id";
        self.run(sqlx::query(statement).bind(users).bind(sizes)).await?;
        Ok(())
    }

    /// Counts the inboxes of these accounts, and cuts each that has passed its maximum back to it. Answers how many
    /// messages that cost.
    async fn hold_inbox_limit(&mut self, limits: &Limits, users: &[UserId], now: Timestamp) -> Result<u64> {
        let max = limits.max_inbox_size;
        let mut at_most: HashMap<UserId, i32> = users.iter().map(|user| (*user, 0)).collect();
        let mut full = Vec::new();
        for (user, device, count) in self.inbox_sizes(users).await? {
            if count > i64::from(max) {
                full.push(device);
            }
            let left = i32::try_from(count.min(i64::from(max))).unwrap_or(i32::MAX);
            at_most.entry(user).and_modify(|most| *most = left.max(*most));
        }
        let cut = if full.is_empty() { 0 } else { self.cut_inboxes(limits, &full, now).await? };
        self.set_at_most(&at_most).await?;
        Ok(cut)
    }

    async fn cut_inboxes(&mut self, limits: &Limits, full: &[DeviceNo], now: Timestamp) -> Result<u64> {
        let statement = "
            SELECT device_no, position, sender_user, received_at <= $2 FROM messages
            WHERE device_no = ANY($1) ORDER BY device_no, position";
        let inboxes = sqlx::query_as(statement).bind(full).bind(now - limits.retention);
        let messages: Vec<(DeviceNo, i64, UserId, bool)> = self.all(inboxes).await?;
        let mut gone = Vec::new();
        for inbox in messages.chunk_by(|one, next| one.0 == next.0) {
            let of_senders: Vec<_> =
                inbox.iter().map(|(_, position, sender, expired)| (*position, *sender, *expired)).collect();
            let cut = outcome::cut(&of_senders, limits.max_inbox_size as usize);
            gone.extend(cut.into_iter().map(|position| (inbox[0].0, Position(position))));
        }
        let cut = self.delete_messages(&in_order(&gone)).await?;
        tracing::debug!(inboxes = full.len(), "full inboxes; their oldest mail was cut");
        Ok(cut)
    }
}
