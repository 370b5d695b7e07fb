//! The rows other than messages that a group in PostgreSQL reads and writes: the bounds of accounts' inboxes, changed
//! outcomes, and the bytes that senders have queued in their day.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceId, DeviceNo, IdempotencyKey, UserId};
use crate::model::message::SendRequest;
use crate::store::Result;
use crate::store::database::PostgresTx;
use crate::store::inbox_limiter::{self, AccountBound, AccountRow, Counted, MAX_DEBT};
use crate::store::send::{self, Changed, Locking};

/// No message was ever larger. Where a node of the former version has changed only the number of messages, each of them counts
/// as this many bytes.
macro_rules! largest {
    () => {
        "2097152"
    };
}

/// Counts new mail in, in messages and in bytes.
macro_rules! count_in {
    () => {
        concat!(
            "UPDATE account_locks l SET at_most = l.at_most + locked.more, bytes_of = l.at_most + locked.more,
                 bytes_at_most = locked.bytes
                     + CASE WHEN l.bytes_of = l.at_most THEN l.bytes_at_most ELSE l.at_most::bigint * ",
            largest!(),
            " END FROM locked WHERE l.user_id = locked.user_id RETURNING l.user_id, l.at_most, l.bytes_at_most"
        )
    };
}

/// $1 are accounts in ascending order, $2 and $3 how many more messages and bytes a device of each gets.
const LOCK: &str = concat!(
    "WITH locked AS MATERIALIZED (
        SELECT l.user_id, asked.more, asked.bytes
        FROM unnest($1, $2, $3) AS asked (user_id, more, bytes) JOIN account_locks l USING (user_id)
        ORDER BY l.user_id FOR NO KEY UPDATE OF l)
    ",
    count_in!()
);

/// The same without the accounts that another transaction holds. Accounts that don't exist are returned with 0.
const LOCK_AVAILABLE: &str = concat!(
    "WITH locked AS MATERIALIZED (
        SELECT l.user_id, asked.more, asked.bytes
        FROM unnest($1, $2, $3) AS asked (user_id, more, bytes) JOIN account_locks l USING (user_id)
        ORDER BY l.user_id FOR NO KEY UPDATE OF l SKIP LOCKED),
    counted AS (",
    count_in!(),
    ")
    SELECT user_id, at_most, bytes_at_most FROM counted UNION ALL
    SELECT user_id, 0, 0 FROM unnest($1) AS asked (user_id)
    WHERE NOT EXISTS (SELECT 1 FROM account_locks l WHERE l.user_id = asked.user_id)"
);

/// The rows of locked accounts.
pub(super) type Locked = HashMap<UserId, AccountRow>;

impl PostgresTx {
    /// Locks the accounts that are written to, and adds their mail to the bounds. Returns the row of each account that is
    /// locked now.
    pub(super) async fn lock_accounts(&mut self, sends: &[SendRequest], locking: Locking) -> Result<Locked> {
        // How many of these messages, and bytes, one device of an account gets at most.
        let mut per_device: HashMap<(UserId, DeviceId), AccountBound> = HashMap::new();
        for recipient in sends.iter().flat_map(|send| &send.recipients) {
            for (device, sealed) in &recipient.submissions {
                let (count, bytes) = per_device.entry((recipient.user, *device)).or_default();
                (*count, *bytes) = (*count + 1, *bytes + i64::try_from(sealed.0.len()).unwrap_or(i64::MAX));
            }
        }
        let users = send::accounts(sends);
        let mut more: HashMap<UserId, AccountBound> = HashMap::with_capacity(users.len());
        for ((user, _), (count, bytes)) in per_device {
            let (most, most_bytes) = more.entry(user).or_default();
            (*most, *most_bytes) = (count.max(*most), bytes.max(*most_bytes));
        }
        let of = |user: &UserId| more.get(user).copied().unwrap_or_default();
        let (counts, bytes): (Vec<i32>, Vec<i64>) = users.iter().map(of).unzip();
        let statement = match locking {
            Locking::Wait => LOCK,
            Locking::SkipLocked => LOCK_AVAILABLE,
        };
        let locked: Vec<(UserId, i32, i64)> =
            self.all(sqlx::query_as(statement).bind(&users).bind(counts).bind(bytes)).await?;
        let before = |user: &UserId, (at_most, bytes): AccountBound| (at_most - of(user).0, bytes - of(user).1);
        Ok(locked
            .into_iter()
            .map(|(user, at_most, bytes)| {
                let now = (at_most, bytes);
                (user, AccountRow { before: before(&user, now), now })
            })
            .collect())
    }

    /// What waits for each device of these accounts, by sending account. The length of a body is read without the body.
    pub(super) async fn count(&mut self, users: &[UserId]) -> Result<Vec<Counted>> {
        let statement = "
            SELECT m.device_no, m.sender_user, COUNT(*), SUM(octet_length(m.body))::bigint
            FROM devices d CROSS JOIN LATERAL (
                SELECT * FROM messages waiting WHERE waiting.device_no = d.no OFFSET 0) m
            WHERE d.user_id = ANY($1) GROUP BY 1, 2";
        let rows: Vec<(DeviceNo, UserId, i64, i64)> = self.all(sqlx::query_as(statement).bind(users)).await?;
        Ok(rows.into_iter().map(inbox_limiter::counted).collect())
    }

    pub(super) async fn set_upper_bounds(&mut self, rows: &[(UserId, AccountBound)]) -> Result<()> {
        let users: Vec<UserId> = rows.iter().map(|(user, _)| *user).collect();
        let (sizes, bytes): (Vec<i32>, Vec<i64>) = rows.iter().map(|(_, account_bound)| *account_bound).unzip();
        let statement = "
            UPDATE account_locks l SET at_most = counted.at_most, bytes_of = counted.at_most, bytes_at_most = counted.bytes
            FROM unnest($1, $2, $3) AS counted (user_id, at_most, bytes) WHERE l.user_id = counted.user_id";
        self.run(sqlx::query(statement).bind(users).bind(sizes).bind(bytes)).await?;
        Ok(())
    }

    /// Replaces outcomes that a repeat has changed. Their accounts are locked, so no other repeat does so now.
    pub(super) async fn change(
        &mut self,
        changed: &[Changed<'_>],
        (sent_at, review_at): (Timestamp, Timestamp),
    ) -> Result<()> {
        if changed.is_empty() {
            return Ok(());
        }
        let senders: Vec<DeviceNo> = changed.iter().map(|changed| changed.send.sender.no).collect();
        let keys: Vec<IdempotencyKey> = changed.iter().map(|changed| changed.send.key).collect();
        let outcomes: Vec<&[u8]> = changed.iter().map(|changed| &changed.outcome[..]).collect();
        let statement = "
            UPDATE sends s SET outcome = changed.outcome, sent_at = $4, review_at = $5,
                last_position = s.first_position - 1
            FROM unnest($1, $2, $3) AS changed (sender_no, idempotency_key, outcome)
            WHERE s.sender_no = changed.sender_no AND s.idempotency_key = changed.idempotency_key";
        let change = sqlx::query(statement).bind(senders).bind(keys).bind(outcomes).bind(sent_at).bind(review_at);
        self.run(change).await?;
        Ok(())
    }

    /// Stores what accounts have queued, in milliseconds of their day. Returns the time until which each has paid. In the
    /// order of the accounts, so that no two groups wait for each other in a circle.
    pub(super) async fn add_debts(
        &mut self,
        debts: &[(UserId, i64)],
        now: Timestamp,
    ) -> Result<Vec<(UserId, Timestamp)>> {
        let (users, costs): (Vec<UserId>, Vec<i64>) = debts.iter().copied().unzip();
        let statement = "
            INSERT INTO send_debts (user_id, paid_at)
            SELECT owed.user_id, $3 + owed.cost FROM unnest($1, $2) AS owed (user_id, cost) ORDER BY owed.user_id
            ON CONFLICT (user_id) DO UPDATE SET paid_at = excluded.paid_at
                + CASE WHEN send_debts.paid_at > $3 AND send_debts.paid_at <= $4 THEN send_debts.paid_at - $3 ELSE 0 END
            RETURNING user_id, paid_at";
        self.all(sqlx::query_as(statement).bind(users).bind(costs).bind(now).bind(now + MAX_DEBT)).await
    }
}
