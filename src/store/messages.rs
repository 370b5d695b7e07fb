//! The inboxes: read, find, expire. Queueing is in `send`.

use std::time::Duration;

use bytes::Bytes;
use sqlx::Row;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, MessageId, Position};
use crate::model::mail::{Envelope, MAX_MESSAGE_BYTES, Sealed};
use crate::store::{Result, Store, commit, json_list};

/// What an envelope weighs on the wire beside its sealed bytes: ids, time and framing.
const ENVELOPE_OVERHEAD: i64 = 80;

/// How far ahead of the clock a time of receipt may be, the clock having been corrected meanwhile.
const CLOCK_TOLERANCE: Duration = Duration::from_hours(24);
/// Bytes of bodies that one transaction deletes at the most.
const STEP_BYTES: i64 = 16 << 20;

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
        // The sizes are summed up before any body is read, so that no more bodies are in memory than are sent. The limit
        // is an expression, because SQLite prepares a statement anew each time a bare parameter behind LIMIT is bound.
        let rows = sqlx::query(
            "WITH page AS MATERIALIZED (
                 SELECT position, LENGTH(body) + $5 AS size FROM messages
                 WHERE device_no = $1 AND position > $2 AND received_at > $3 ORDER BY position LIMIT $4 + 0),
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
        .fetch_all(&mut *self.read.get().await?)
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
        .fetch_all(&mut *self.read.get().await?)
        .await?;
        Ok(positions)
    }

    /// Deletes messages that are past the retention, in a step of up to `limit` messages and 16 MiB, so that nobody
    /// waits long for the writer. One that seems to come from the future was received while the clock was wrong; it
    /// counts as received now, or it would outlive its age.
    pub async fn expire_messages(&self, now: Timestamp, limit: u32) -> Result<Expired> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "UPDATE messages SET received_at = $1 WHERE position IN
                 (SELECT position FROM messages WHERE received_at > $2 ORDER BY received_at LIMIT $3)",
        )
        .bind(now)
        .bind(now + CLOCK_TOLERANCE)
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        let deleted = sqlx::query(
            "DELETE FROM messages WHERE position IN (
                 SELECT position FROM (
                     SELECT position, size, SUM(size) OVER (ORDER BY received_at, position) AS total FROM (
                         SELECT position, received_at, LENGTH(body) AS size FROM messages
                         WHERE received_at <= $1 ORDER BY received_at LIMIT $2))
                 WHERE total <= $3 OR total = size)",
        )
        .bind(now - self.limits.retention)
        .bind(limit)
        .bind(STEP_BYTES)
        .execute(&mut *tx)
        .await?
        .rows_affected();
        commit(tx).await?;
        Ok(Expired { deleted, more: deleted > 0 })
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
