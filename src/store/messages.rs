//! The inboxes: read, find, expire. Queueing is in `send`.

use std::time::Duration;

use bytes::Bytes;
use sqlx::FromRow;

use crate::clock::{Moment, Timestamp};
use crate::model::ids::{DeviceId, DeviceNo, MessageId, Position, UserId};
use crate::model::message::{Envelope, Sealed};
use crate::store::database::{Database, Tx, on, run};
use crate::store::inbox_limiter::MAX_DEBT;
use crate::store::notices::Counts;
use crate::store::postgres::PostgresStore;
use crate::store::{Limits, Result, Store, json_list};
use crate::telemetry::metrics::Left;

/// Bytes that an envelope takes on the wire beside its sealed ones: ids, time and framing.
const ENVELOPE_OVERHEAD: i32 = 80;

/// How far ahead of the clock a time of receipt may be, the clock having been corrected meanwhile.
pub(super) const CLOCK_TOLERANCE: Duration = Duration::from_hours(24);
/// Bytes of bodies that one transaction deletes at most.
const STEP_BYTES: i64 = 16 << 20;

/// A part of an inbox, oldest first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The messages.
    pub envelopes: Vec<Envelope>,
    /// Whether there may be more behind them.
    pub more: bool,
    /// What the next message weighs, in bytes on the wire, if that is more than was asked for. The page is then empty.
    pub oversized: Option<usize>,
}

/// What a step of the sweep over old messages did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// Messages deleted.
    pub deleted: u64,
    /// Whether there may be more to delete, or to correct.
    pub more: bool,
}

/// A look into an inbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct InboxQuery {
    device: DeviceNo,
    after: Position,
    not_before: Timestamp,
    limit: u32,
    max_bytes: usize,
}

impl InboxQuery {
    fn max_weight(&self) -> i64 {
        i64::try_from(self.max_bytes).unwrap_or(i64::MAX)
    }

    fn page(&self, rows: Vec<MessageRow>) -> Page {
        if let [MessageRow { body: None, size, .. }] = rows[..] {
            return Page {
                envelopes: Vec::new(),
                more: true,
                oversized: Some(usize::try_from(size).unwrap_or_default()),
            };
        }
        let found = rows.first().map_or(0, |row| row.found);
        // Exact below the limit of messages: otherwise each frame would be followed by a look that finds nothing.
        let more = rows.len() >= self.limit as usize || found > rows.len() as i64;
        Page {
            more: more && !rows.is_empty(),
            envelopes: rows.into_iter().map(Envelope::from).collect(),
            oversized: None,
        }
    }
}

impl PostgresStore {
    /// A page for each look.
    async fn pages(&self, queries: &[InboxQuery]) -> Result<Vec<Page>> {
        let column = |of: fn(&InboxQuery) -> i64| queries.iter().map(of).collect::<Vec<i64>>();
        let question = sqlx::query_as(UNSENT_IN_POSTGRES)
            .bind(column(|query| query.device.0))
            .bind(column(|query| query.after.0))
            .bind(column(|query| query.not_before.millis()))
            .bind(column(|query| i64::from(query.limit)))
            .bind(column(InboxQuery::max_weight))
            .bind(ENVELOPE_OVERHEAD);
        let rows: Vec<PlacedRow> = self.all(question).await?;
        let mut pages: Vec<Vec<MessageRow>> = queries.iter().map(|_| Vec::new()).collect();
        for row in rows {
            let of_query = usize::try_from(row.place - 1).ok().and_then(|place| pages.get_mut(place));
            of_query
                .ok_or_else(|| sqlx::Error::Protocol("a row for a look that was not in the statement".into()))?
                .push(row.row);
        }
        Ok(queries.iter().zip(pages).map(|(query, rows)| query.page(rows)).collect())
    }
}

impl Store {
    /// The messages of an inbox behind `after` that have not expired, oldest first: at most `limit` of them, and as
    /// many as weigh `max_bytes` on the wire. If the first one weighs more, it isn't read: see [`Page::oversized`].
    pub async fn unsent(
        &self,
        device: DeviceNo,
        after: Position,
        now: Timestamp,
        limit: u32,
        max_bytes: usize,
    ) -> Result<Page> {
        let query = InboxQuery { device, after, not_before: now - self.limits.retention, limit, max_bytes };
        match &self.database {
            Database::Sqlite(sqlite) => {
                let rows = sqlx::query_as(UNSENT)
                    .bind(device)
                    .bind(after)
                    .bind(query.not_before)
                    .bind(limit)
                    .bind(ENVELOPE_OVERHEAD)
                    .bind(query.max_weight());
                let rows: Vec<MessageRow> = rows.fetch_all(&mut *sqlite.read.get().await?).await?;
                Ok(query.page(rows))
            }
            Database::Postgres(postgres) => {
                self.inbox_reads.run(query, async |queries: &[InboxQuery]| postgres.pages(queries).await).await
            }
        }
    }

    /// Where these messages lie in the inbox of `device`. Ids of other devices' messages, and unknown ones, are left out.
    pub async fn positions(&self, device: DeviceNo, ids: &[MessageId]) -> Result<Vec<Position>> {
        match &self.database {
            Database::Sqlite(sqlite) => {
                let offsets = json_list((0..ids.len()).map(|n| n * 16 + 1));
                let ids: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
                let statement = "SELECT position FROM messages
                     WHERE device_no = $1 AND id IN (SELECT substr($2, value, 16) FROM json_each($3))";
                let find = sqlx::query_scalar(statement).bind(device).bind(ids).bind(offsets);
                Ok(find.fetch_all(&mut *sqlite.read.get().await?).await?)
            }
            Database::Postgres(postgres) => {
                let statement = "SELECT position FROM messages WHERE device_no = $1 AND id = ANY($2)";
                let found: Vec<(Position,)> = postgres.all(sqlx::query_as(statement).bind(device).bind(ids)).await?;
                Ok(found.into_iter().map(|(position,)| position).collect())
            }
        }
    }

    /// Deletes messages that are past the retention, in a step of up to `limit` messages and 16 MiB, so that no one
    /// waits long for the writer. `now` is the earliest that it may be, `latest` the latest. A message that is a day behind
    /// that was received while the clock was wrong; it counts as received now, or it would outlive its age. Its device is
    /// told how many expired: see [`Store::notice`].
    pub async fn expire_messages(&self, now: Timestamp, latest: Timestamp, limit: u32) -> Result<Expired> {
        let mut tx = self.begin().await?;
        let corrected = self.correct_times(&mut tx, now, latest + CLOCK_TOLERANCE, limit).await?;
        let expired = tx.sql(EXPIRE, EXPIRE_IN_POSTGRES);
        let before = now - self.limits.retention;
        let gone: Vec<DeviceNo> = on!(&mut tx, |db| sqlx::query_scalar(expired)
            .bind(before)
            .bind(i64::from(limit))
            .bind(STEP_BYTES)
            .fetch_all(db))?;
        let deleted = gone.len() as u64;
        let mut counts = Counts::new();
        gone.into_iter().for_each(|device| *counts.entry(device).or_default() += 1);
        self.add_expired(&mut tx, &counts, now).await?;
        self.inbox_limiter.left(counts.iter().map(|(device, count)| (*device, count.unsigned_abs())));
        tx.commit().await?;
        self.metrics.left.add(Left::Expired, deleted);
        Ok(Expired { deleted, more: deleted > 0 || corrected > 0 })
    }

    /// Sets messages received later than `ahead` to `now`, together with the sends that they belong to. Takes about `limit`
    /// messages: those with one time stay together. Sends are updated first, so that nothing waits while messages are locked.
    /// Returns the number of messages.
    async fn correct_times(&self, tx: &mut Tx, now: Timestamp, ahead: Timestamp, limit: u32) -> Result<u64> {
        let statement = "SELECT received_at FROM messages WHERE received_at > $1 ORDER BY received_at LIMIT $2";
        let mut times: Vec<Timestamp> =
            on!(&mut *tx, |db| sqlx::query_scalar(statement).bind(ahead).bind(i64::from(limit)).fetch_all(db))?;
        let is_cut_short = times.len() >= limit as usize;
        times.dedup();
        // All messages of one time, and so of one send, have to move together.
        if is_cut_short && times.len() > 1 {
            times.pop();
        }
        let Some(first) = times.first() else { return Ok(0) };
        // A send is reviewed later than it was sent.
        let (review_at, after) = (now + self.limits.idempotency_lifetime, *first);
        match tx {
            Tx::Sqlite(tx) => {
                let list = json_list(times.iter().map(|time| time.millis()));
                let sends = sqlx::query(CORRECT_SENDS).bind(now).bind(review_at).bind(after).bind(&list);
                sends.execute(&mut **tx).await?;
                Ok(sqlx::query(CORRECT).bind(now).bind(&list).execute(&mut **tx).await?.rows_affected())
            }
            Tx::Postgres(tx) => {
                let sends = sqlx::query(CORRECT_SENDS_IN_POSTGRES).bind(now).bind(review_at).bind(after);
                tx.run(sends.bind(&times)).await?;
                tx.run(sqlx::query(CORRECT_IN_POSTGRES).bind(now).bind(&times)).await
            }
        }
    }

    /// Forgets up to `limit` accounts whose sends of the last day don't count any more, and up to as many with a debt that a
    /// wrong clock has stored.
    pub async fn expire_send_debts(&self, now: impl Into<Moment>, limit: u32) -> Result<u64> {
        let Moment { earliest, latest } = now.into();
        let mut tx = self.begin().await?;
        let old = "DELETE FROM send_debts WHERE paid_at <= $1 AND user_id IN (
                 SELECT user_id FROM send_debts WHERE paid_at <= $1 ORDER BY paid_at LIMIT $2)";
        let absurd = "DELETE FROM send_debts WHERE paid_at > $1 AND user_id IN (
                 SELECT user_id FROM send_debts WHERE paid_at > $1 ORDER BY paid_at LIMIT $2)";
        let mut forgotten = run!(&mut tx, sqlx::query(old).bind(earliest).bind(i64::from(limit)))?;
        forgotten += run!(&mut tx, sqlx::query(absurd).bind(latest + MAX_DEBT).bind(i64::from(limit)))?;
        tx.commit().await?;
        Ok(forgotten)
    }

    /// Forgets up to about `limit` outcomes that are past their age. One whose messages still wait is kept, and looked
    /// at again later. An outcome that was stored while the clock was wrong, and so would be kept for too long, counts as
    /// stored now. Answers how many were looked at.
    pub async fn expire_sends(&self, now: impl Into<Moment>, limit: u32) -> Result<u64> {
        let Moment { earliest: now, latest } = now.into();
        let mut tx = self.begin().await?;
        let mut seen = self.correct_reviews(&mut tx, now, latest, limit).await?;
        let statement = "SELECT MAX(review_at) FROM
                 (SELECT review_at FROM sends WHERE review_at <= $1 ORDER BY review_at LIMIT $2) due";
        let last: Option<Timestamp> =
            on!(&mut tx, |db| sqlx::query_scalar(statement).bind(now).bind(i64::from(limit)).fetch_one(db))?;
        if let Some(last) = last {
            let delete = tx.sql(DELETE_SENDS, DELETE_SENDS_IN_POSTGRES);
            seen += run!(&mut tx, sqlx::query(delete).bind(last))?;
            let later = now + self.limits.idempotency_lifetime;
            let keep = "UPDATE sends SET review_at = $2 WHERE review_at <= $1";
            seen += run!(&mut tx, sqlx::query(keep).bind(last).bind(later))?;
        }
        tx.commit().await?;
        Ok(seen)
    }

    /// Brings reviews nearer that no right clock has put off so far. Those of sends that name no messages may be of repeats,
    /// whose messages may wait for the whole retention: see `changed_at`.
    async fn correct_reviews(&self, tx: &mut Tx, now: Timestamp, latest: Timestamp, limit: u32) -> Result<u64> {
        let Limits { retention, idempotency_lifetime: lifetime, .. } = self.limits;
        let longest = retention.max(lifetime);
        let statement = tx.sql(CORRECT_REVIEWS, CORRECT_REVIEWS_IN_POSTGRES);
        let absurd = latest + longest + CLOCK_TOLERANCE;
        let (limit, later) = (i64::from(limit), i64::try_from((longest - lifetime).as_millis()).unwrap_or(i64::MAX));
        run!(&mut *tx, sqlx::query(statement).bind(absurd).bind(limit).bind(now).bind(now + lifetime).bind(later))
    }
}

#[derive(FromRow)]
struct MessageRow {
    position: Position,
    id: MessageId,
    sender_user: UserId,
    sender_device: DeviceId,
    received_at: Timestamp,
    /// `None` when it weighs more than was asked for.
    body: Option<Vec<u8>>,
    /// On the wire, in bytes.
    size: i64,
    /// How many messages the look found, those included that weigh too much together to be on the page.
    found: i64,
}

#[derive(FromRow)]
struct PlacedRow {
    place: i64,
    #[sqlx(flatten)]
    row: MessageRow,
}

impl From<MessageRow> for Envelope {
    fn from(row: MessageRow) -> Self {
        Self {
            position: row.position,
            id: row.id,
            sender_user: row.sender_user,
            sender_device: row.sender_device,
            received_at: row.received_at,
            body: Sealed(Bytes::from(row.body.unwrap_or_default())),
        }
    }
}

/// The sizes are summed up before any body is read, so that no more bodies are in memory than are sent. The limit is an
/// expression, because SQLite prepares a statement anew each time a bare parameter behind LIMIT is bound.
const UNSENT: &str = "\
    WITH page AS MATERIALIZED ( \
        SELECT position, LENGTH(body) + $5 AS size FROM messages \
        WHERE device_no = $1 AND position > $2 AND received_at > $3 ORDER BY position LIMIT $4 + 0), \
    weighed AS ( \
        SELECT position, size, SUM(size) OVER (ORDER BY position ROWS UNBOUNDED PRECEDING) AS total FROM page) \
    SELECT m.position, m.id, m.sender_user, m.sender_device, m.received_at, weighed.size, \
        CASE WHEN weighed.size <= $6 THEN m.body END AS body, (SELECT COUNT(*) FROM page) AS found \
    FROM weighed CROSS JOIN messages m ON m.position = weighed.position \
    WHERE weighed.total <= $6 OR weighed.total = weighed.size ORDER BY m.position";

/// $1 to $5 are the columns of the looks. Large bodies lie outside of their rows, and are fetched only for what is
/// answered.
const UNSENT_IN_POSTGRES: &str = "\
    SELECT look.place, m.position, m.id, m.sender_user, m.sender_device, m.received_at, m.size::int8 AS size, \
        CASE WHEN m.size <= look.max_weight THEN m.body END AS body, m.found \
    FROM unnest($1, $2, $3, $4, $5) WITH ORDINALITY \
         AS look (device_no, after, alive_since, most, max_weight, place) \
    CROSS JOIN LATERAL ( \
        SELECT *, SUM(size) OVER (ORDER BY position) AS total, COUNT(*) OVER () AS found FROM ( \
            SELECT position, id, sender_user, sender_device, received_at, body, octet_length(body) + $6 AS size \
            FROM messages \
            WHERE device_no = look.device_no AND position > look.after AND received_at > look.alive_since \
            ORDER BY position LIMIT look.most) page) m \
    WHERE m.total <= look.max_weight OR m.total = m.size ORDER BY look.place, m.position";

const CORRECT: &str =
    "UPDATE messages SET received_at = $1 WHERE received_at IN (SELECT wrong.value FROM json_each($2) wrong)";

const CORRECT_IN_POSTGRES: &str = "\
    UPDATE messages SET received_at = $1 WHERE (device_no, position) IN \
        (SELECT device_no, position FROM messages WHERE received_at = ANY($2) FOR UPDATE SKIP LOCKED)";

const CORRECT_SENDS: &str = "\
    UPDATE sends SET sent_at = $1, review_at = $2 WHERE review_at > $3 AND last_position >= first_position \
    AND sent_at IN (SELECT wrong.value FROM json_each($4) wrong)";

const CORRECT_SENDS_IN_POSTGRES: &str = "\
    UPDATE sends SET sent_at = $1, review_at = $2 WHERE review_at > $3 AND last_position >= first_position \
    AND sent_at = ANY($4)";

const CORRECT_REVIEWS: &str = "\
    UPDATE sends SET sent_at = $3 + CASE WHEN last_position < first_position THEN $5 ELSE 0 END, \
        review_at = $4 + CASE WHEN last_position < first_position THEN $5 ELSE 0 END \
    WHERE (sender_no, idempotency_key) IN \
        (SELECT sender_no, idempotency_key FROM sends WHERE review_at > $1 ORDER BY review_at LIMIT $2)";

/// Those whose messages wait are left to the correction of these messages, which finds them by the time of their review.
const CORRECT_REVIEWS_IN_POSTGRES: &str = "\
    UPDATE sends SET sent_at = $3 + CASE WHEN last_position < first_position THEN $5 ELSE 0 END, \
        review_at = $4 + CASE WHEN last_position < first_position THEN $5 ELSE 0 END \
    WHERE (sender_no, idempotency_key) IN \
        (SELECT sender_no, idempotency_key FROM sends s WHERE s.review_at > $1 AND NOT EXISTS \
            (SELECT 1 FROM messages m WHERE m.received_at = s.sent_at \
             AND m.position BETWEEN s.first_position AND s.last_position) ORDER BY s.review_at LIMIT $2)";

const EXPIRE: &str = "\
    DELETE FROM messages WHERE position IN ( \
        SELECT position FROM ( \
            SELECT position, size, SUM(size) OVER (ORDER BY received_at, position) AS total FROM ( \
                SELECT position, received_at, LENGTH(body) AS size FROM messages \
                WHERE received_at <= $1 ORDER BY received_at LIMIT $2)) \
        WHERE total <= $3 OR total = size) \
    RETURNING device_no";

/// What another transaction is deleting at this moment is left to it.
const EXPIRE_IN_POSTGRES: &str = "\
    WITH oldest AS MATERIALIZED ( \
        SELECT device_no, position, received_at, octet_length(body) AS size FROM messages \
        WHERE received_at <= $1 ORDER BY received_at, position LIMIT $2 FOR UPDATE SKIP LOCKED) \
    DELETE FROM messages m USING ( \
        SELECT device_no, position, size, SUM(size) OVER (ORDER BY received_at, position) AS total FROM oldest) gone \
    WHERE m.device_no = gone.device_no AND m.position = gone.position AND (gone.total <= $3 OR gone.total = gone.size) \
    RETURNING m.device_no";

const DELETE_SENDS: &str = "\
    DELETE FROM sends WHERE review_at <= $1 AND NOT EXISTS \
        (SELECT 1 FROM messages m WHERE m.position BETWEEN sends.first_position AND sends.last_position)";

const DELETE_SENDS_IN_POSTGRES: &str = "\
    DELETE FROM sends WHERE review_at <= $1 AND NOT EXISTS \
        (SELECT 1 FROM messages m WHERE m.received_at = sends.sent_at \
         AND m.position BETWEEN sends.first_position AND sends.last_position)";
