//! Queueing in PostgreSQL. Lists travel as arrays: a group is a fixed number of statements, however much is in it.
//!
//! The accounts that are written to are locked first, in ascending order, and stay so until the commit. Everything that
//! is read afterwards (devices, inboxes) holds until then, and the block of positions that is taken afterwards is
//! higher than those of all groups that have been visible in these inboxes. Whatever else two groups could do to each
//! other (the same send at the same moment, the same messages deleted in another order) makes one of them start over.

mod rows;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{DeviceId, DeviceNo, IdempotencyKey, MessageId, Position, UserId};
use crate::model::mail::Outgoing;
use crate::store::database::{PostgresTx, timely};
use crate::store::notices::{self, Unread};
use crate::store::outcome::Devices;
use crate::store::postgres::PostgresStore;
use crate::store::room::Candidate;
use crate::store::send::postgres::rows::Locked;
use crate::store::send::{self, Found, Known, Locking, NewMessage, Receipt, Settled, Tally};
use crate::store::{Result, Store};
use crate::telemetry::traces::Span;

/// Positions in a block of the sequence, as the migration says.
const BLOCK: usize = 65_536;
/// Accounts whose inboxes are counted in one group.
const COUNTED_AT_ONCE: usize = 16;
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

/// A row of the answer to `ASK`: a sender with its key, outcome, digest and first place; or a device with its account; or a block.
type Answer =
    (i64, Option<IdempotencyKey>, Option<UserId>, Option<DeviceId>, Option<Vec<u8>>, Option<Vec<u8>>, Option<Position>);

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
pub(super) type InOrder = (Vec<DeviceNo>, Vec<Position>);

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
        now: Moment,
        locking: Locking,
    ) -> Result<Option<(Settled, Tally)>> {
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
        Moment { earliest, latest: now }: Moment,
        locking: Locking,
    ) -> Result<Option<(Settled, Tally)>> {
        let mut tally = Tally::default();
        let acks = &in_order(acks);
        if sends.is_empty() {
            let held;
            (tally.acked, held) = tx.delete_acked(acks, locking).await?;
            return Ok(Some((Settled { sent: Vec::new(), held }, tally)));
        }
        let lifetime = self.limits.idempotency_lifetime;
        self.rooms.bound();
        let locked = tx.lock_accounts(sends, locking).await?;
        // The rows of accounts with an inbox that may be more than half full, as they are now and were before this group.
        let row = |user: UserId| locked.get(&user).filter(|row| self.rooms.is_over_half(row.now));
        let is_unsure = |user: &UserId| row(*user).is_some_and(|row| !self.rooms.knows(*user, row.before));
        let later = left_for_later(sends, &locked, is_unsure, locking);
        let (found, blocks) = tx.ask(sends, earliest - lifetime).await?;
        let is_later = |mail: &Outgoing| later.contains(&(mail.sender.no, mail.key));
        let cases = send::cases(sends, &found, is_later);
        let coming = send::candidates(sends, &cases);
        let mut counted = Vec::new();
        let (verdicts, mut charges) = loop {
            counted.extend(self.count_the_unsure(tx, &coming, &found.devices, &locked).await?);
            if let Some(judged) = self.rooms.judge(&coming, now, |user| row(user).map(|row| row.now)) {
                break judged;
            }
        };
        counted.sort_unstable();
        counted.dedup();
        self.rooms.learn(coming.iter().filter_map(|one| row(one.user).map(|row| (one.user, row.now))));
        let judgement = send::judge(sends, cases, verdicts);
        let (rows, judged) = (&judgement.rows, &judgement.judged);
        let received = self.numbering.receive(rows.len(), now);
        let position = |n: usize| blocks[n / BLOCK] + (n % BLOCK) as i64;
        let receipts = send::receipts(judged, position);
        let messages = send::numbered(rows, &received.ids, position);
        // Acks that may not wait are written by a statement of their own.
        let at_once = if locking == Locking::Wait { acks } else { &InOrder::default() };
        let written = tx.write(&receipts, &messages, at_once, received.received_at, lifetime).await?;
        // Another group has just written the outcome of one of these sends down.
        if written.receipts < receipts.len() as i64 {
            return Ok(None);
        }
        let held;
        (tally.acked, held) = tx.delete_rest(acks, written.acked.unsigned_abs(), locking).await?;
        tally.add(&messages, written.messages.unsigned_abs());
        if !judgement.is_plain() {
            let period = notices::period(Position(position(0)));
            tx.change(&judgement.changed, send::changed_at(&self.limits, now)).await?;
            notices::add_in_postgres(tx, &judgement.refused, Unread::Refused, (period, now)).await?;
            notices::take_back_in_postgres(tx, &judgement.taken_back).await?;
        }
        let debts = charges.debts();
        if !debts.is_empty() {
            charges.written(&tx.owe(&debts, now).await?);
        }
        tally.charges = Some(charges);
        if !counted.is_empty() {
            self.set_counted(tx, &counted, &found.devices).await?;
        }
        Ok(Some((Settled { sent: judgement.sent, held }, tally)))
    }

    /// Counts the inboxes of those accounts of which too little is known to judge these messages. Returns the accounts.
    async fn count_the_unsure(
        &self,
        tx: &mut PostgresTx,
        coming: &[Candidate],
        devices: &Devices,
        locked: &HashMap<UserId, Locked>,
    ) -> Result<Vec<UserId>> {
        let row = |user: UserId| locked.get(&user).filter(|row| self.rooms.is_over_half(row.now));
        let unsure = self.rooms.unsure(coming, |user| row(user).map(|row| row.before));
        let mut users: Vec<UserId> = unsure.into_iter().map(|(user, _)| user).collect();
        users.sort_unstable();
        users.dedup();
        if users.is_empty() {
            return Ok(users);
        }
        let found = tx.count(&users).await?;
        for user in &users {
            let of_user = devices.get(user).map(Vec::as_slice).unwrap_or_default();
            let stamp = row(*user).map(|row| row.before).unwrap_or_default();
            self.rooms.counted(of_user.iter().map(|(_, no)| *no), &found, stamp);
        }
        Ok(users)
    }

    /// Stores how much waits at most for a device of these accounts, which have just been counted, if that is still
    /// remembered.
    async fn set_counted(&self, tx: &mut PostgresTx, users: &[UserId], devices: &Devices) -> Result<()> {
        let mut rows = Vec::with_capacity(users.len());
        for user in users {
            let of_user: Vec<DeviceNo> =
                devices.get(user).map(Vec::as_slice).unwrap_or_default().iter().map(|(_, no)| *no).collect();
            rows.extend(self.rooms.stamped(*user, &of_user).map(|stamp| (*user, stamp)));
        }
        if rows.is_empty() {
            return Ok(());
        }
        tx.set_at_most(&rows).await
    }
}

/// The sends that are left for a later group: one of their accounts could not be locked, or too many accounts would have to be
/// counted with them, for which the whole group would wait. The first send that needs a count always gets it.
fn left_for_later(
    sends: &[Outgoing],
    locked: &HashMap<UserId, Locked>,
    is_unsure: impl Fn(&UserId) -> bool,
    locking: Locking,
) -> HashSet<(DeviceNo, IdempotencyKey)> {
    let (mut later, mut counted) = (HashSet::new(), HashSet::new());
    for mail in sends {
        let users = || mail.accounts();
        // Accounts that never were have no lock, and nobody holds it.
        let is_held = locking == Locking::PassOver && users().any(|user| !locked.contains_key(&user));
        let unsure: Vec<UserId> = users().filter(&is_unsure).filter(|user| !counted.contains(user)).collect();
        let is_too_much = !unsure.is_empty() && !counted.is_empty() && counted.len() + unsure.len() > COUNTED_AT_ONCE;
        if is_held || is_too_much {
            later.insert((mail.sender.no, mail.key));
        } else {
            counted.extend(unsure);
        }
    }
    later
}

impl PostgresTx {
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
                (sender, Some(key), .., Some(outcome), Some(digest), Some(first)) => {
                    known.insert((DeviceNo(sender), key), send::decoded(&outcome, digest, first)?);
                }
                (no, _, Some(user), Some(device), ..) => {
                    devices.entry(user).or_default().push((device, DeviceNo(no)));
                }
                (block, None, None, None, None, None, None) => blocks.push(block),
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

    /// Deletes what it finds. A row that was moved while it was waited for, as the correction of a clock does
    /// ([`Store::expire_messages`]), is passed over, since it is not in its place any more; the next try finds it.
    pub(super) async fn delete_once(&mut self, (devices, positions): &InOrder) -> Result<u64> {
        self.run(sqlx::query(delete_messages!("$1, $2")).bind(devices).bind(positions)).await
    }
}
