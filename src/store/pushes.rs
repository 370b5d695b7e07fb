//! Which devices should be woken. The inbox decides: mail that has waited for longer than the grace, and for which no
//! push has been sent. What was sent is remembered beside the token, as a position, for a day; after that a push counts
//! as lost.

use std::time::Duration;

use sqlx::FromRow;

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, Position};
use crate::model::push::PushTarget;
use crate::store::database::{Database, reading, run};
use crate::store::push_tokens::target;
use crate::store::{Result, Store, json_list};

/// After so long a push after which no device came is sent once more.
const PUSH_VALID_FOR: Duration = Duration::from_hours(24);
/// A first 404 older than this is forgotten. Otherwise two 404s, days apart, would look like one that lasted. It has to exceed
/// the time between two attempts for a target that stays unknown: up to 10 h for ten attempts, then a day without a push.
const MISSING_COUNTS: Duration = Duration::from_hours(40);
/// A device is told at most so often that its prekeys run low.
const MIN_PREKEY_PUSH_INTERVAL: Duration = Duration::from_mins(15);

/// What is known about a device that may have to be woken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushCandidate {
    /// Which one.
    pub device: DeviceNo,
    /// How it is woken.
    pub target: PushTarget,
    /// When the oldest mail came that no push was sent for, if there is any.
    pub waiting_since: Option<Timestamp>,
    /// The newest mail of its inbox. A push is for everything up to here.
    pub newest: Position,
    /// No push for few prekeys was sent lately.
    pub may_push_prekeys_low: bool,
    /// Since when its provider has said that it doesn't know the target, in whole hours; `None` also when that began more than 40
    /// hours ago.
    pub missing_since: Option<Timestamp>,
}

/// A part of the walk over all devices that can be woken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverduePage {
    /// Those that should have been woken.
    pub devices: Vec<DeviceNo>,
    /// Where to go on; `None` at the end.
    pub next: Option<DeviceNo>,
}

impl Store {
    /// What is known about these devices. Those without a push token are left out.
    pub async fn push_candidates(&self, devices: &[DeviceNo], now: Timestamp) -> Result<Vec<PushCandidate>> {
        let statement = self.with_list(PUSH_CANDIDATES, PUSH_CANDIDATES_IN_POSTGRES);
        let rows: Vec<Row> = reading!(self, |db| sqlx::query_as(statement)
            .bind(list(devices))
            .bind(now - PUSH_VALID_FOR)
            .fetch_all(db))?;
        let candidate = |row: Row| {
            Some(PushCandidate {
                device: row.device_no,
                target: target(row.provider, row.token, row.p256dh, row.auth)?,
                waiting_since: row.waiting_since,
                newest: row.newest,
                // A time that lies far ahead is of a clock that was wrong.
                may_push_prekeys_low: row.keys_pushed_at <= now - MIN_PREKEY_PUSH_INTERVAL
                    || row.keys_pushed_at > now + PUSH_VALID_FOR,
                missing_since: (row.missing_since > Timestamp::from_seconds(0).max(now - MISSING_COUNTS)
                    && row.missing_since <= now + PUSH_VALID_FOR)
                    .then_some(row.missing_since),
            })
        };
        Ok(rows.into_iter().filter_map(candidate).collect())
    }

    /// Remembers that pushes were sent, with these tokens, for all mail up to these positions. A token that was replaced
    /// meanwhile is left alone: nothing was sent with the new one.
    pub async fn record_pushes(&self, sent: &[(DeviceNo, String, Position)], now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        // In one order on all nodes, so that two never wait for each other.
        let mut sent = sent.to_vec();
        sent.sort_unstable();
        for (device, token, position) in sent {
            let statement = "UPDATE push_tokens SET pushed_to = $2, pushed_at = $3 WHERE device_no = $1 AND token = $4";
            run!(&mut tx, sqlx::query(statement).bind(device).bind(position).bind(now).bind(token))?;
        }
        tx.commit().await
    }

    /// Remembers that a device was told of its few prekeys.
    pub async fn record_prekeys_push(&self, device: DeviceNo, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        let statement = "UPDATE push_tokens SET keys_pushed_at = $2 WHERE device_no = $1";
        run!(&mut tx, sqlx::query(statement).bind(device).bind(now))?;
        tx.commit().await
    }

    /// Forgets the pushes of those of these devices whose inboxes hold mail, because the session that came for it has gone without
    /// it. Answers which they are.
    pub async fn reset_pushes(&self, devices: &[DeviceNo]) -> Result<Vec<DeviceNo>> {
        let left = self.with_list(UNDELIVERED, UNDELIVERED_IN_POSTGRES);
        let left: Vec<DeviceNo> = reading!(self, |db| sqlx::query_scalar(left).bind(list(devices)).fetch_all(db))?;
        if !left.is_empty() {
            let mut tx = self.begin().await?;
            for device in &left {
                let statement = "UPDATE push_tokens SET pushed_to = 0 WHERE device_no = $1 AND pushed_to <> 0";
                run!(&mut tx, sqlx::query(statement).bind(*device))?;
            }
            tx.commit().await?;
        }
        Ok(left)
    }

    /// Walks over up to `limit` devices with a push token, from `after` on, and answers those of them that have mail from
    /// `before` or earlier for which no push was sent.
    pub async fn overdue_for_push(
        &self,
        after: DeviceNo,
        before: Timestamp,
        now: Timestamp,
        limit: u32,
    ) -> Result<OverduePage> {
        let rows: Vec<(DeviceNo, bool)> = reading!(self, |db| sqlx::query_as(OVERDUE)
            .bind(after)
            .bind(before)
            .bind(now - PUSH_VALID_FOR)
            .bind(i64::from(limit))
            .fetch_all(db))?;
        let next = rows.last().filter(|_| rows.len() >= limit as usize).map(|(device, _)| *device);
        Ok(OverduePage { devices: rows.into_iter().filter(|row| row.1).map(|row| row.0).collect(), next })
    }

    fn with_list(&self, sqlite: &'static str, postgres: &'static str) -> &'static str {
        match &self.database {
            Database::Sqlite(_) => sqlite,
            Database::Postgres(_) => postgres,
        }
    }
}

#[derive(FromRow)]
struct Row {
    device_no: DeviceNo,
    provider: i32,
    token: String,
    p256dh: Option<Vec<u8>>,
    auth: Option<Vec<u8>>,
    keys_pushed_at: Timestamp,
    missing_since: Timestamp,
    waiting_since: Option<Timestamp>,
    newest: Position,
}

/// Both databases read this text as a list.
fn list(devices: &[DeviceNo]) -> String {
    json_list(devices.iter().map(|device| device.0))
}

const PUSH_CANDIDATES: &str = "\
    SELECT t.device_no, t.provider, t.token, t.p256dh, t.auth, t.keys_pushed_at, t.missing_since, \
        (SELECT m.received_at FROM messages m WHERE m.device_no = t.device_no \
            AND m.position > (CASE WHEN t.pushed_at > $2 AND t.pushed_at < $2 + 172800000 THEN t.pushed_to ELSE 0 END) \
            ORDER BY m.position LIMIT 1) AS waiting_since, \
        COALESCE((SELECT MAX(m.position) FROM messages m WHERE m.device_no = t.device_no), 0) AS newest \
    FROM push_tokens t WHERE t.device_no IN (SELECT value FROM json_each($1))";

const PUSH_CANDIDATES_IN_POSTGRES: &str = "\
    SELECT t.device_no, t.provider, t.token, t.p256dh, t.auth, t.keys_pushed_at, t.missing_since, \
        (SELECT m.received_at FROM messages m WHERE m.device_no = t.device_no \
            AND m.position > (CASE WHEN t.pushed_at > $2 AND t.pushed_at < $2 + 172800000 THEN t.pushed_to ELSE 0 END) \
            ORDER BY m.position LIMIT 1) AS waiting_since, \
        COALESCE((SELECT MAX(m.position) FROM messages m WHERE m.device_no = t.device_no), 0) AS newest \
    FROM push_tokens t \
    WHERE t.device_no IN (SELECT value::bigint FROM json_array_elements_text($1::json))";

const UNDELIVERED: &str = "\
    SELECT t.device_no FROM push_tokens t WHERE t.device_no IN (SELECT value FROM json_each($1)) \
    AND EXISTS (SELECT 1 FROM messages m WHERE m.device_no = t.device_no) ORDER BY t.device_no";

const UNDELIVERED_IN_POSTGRES: &str = "\
    SELECT t.device_no FROM push_tokens t \
    WHERE t.device_no IN (SELECT value::bigint FROM json_array_elements_text($1::json)) \
    AND EXISTS (SELECT 1 FROM messages m WHERE m.device_no = t.device_no) ORDER BY t.device_no";

const OVERDUE: &str = "\
    SELECT t.device_no, EXISTS (SELECT 1 FROM messages m WHERE m.device_no = t.device_no \
        AND m.position > (CASE WHEN t.pushed_at > $3 AND t.pushed_at < $3 + 172800000 THEN t.pushed_to ELSE 0 END) AND m.received_at <= $2) \
    FROM (SELECT device_no, pushed_to, pushed_at FROM push_tokens WHERE device_no > $1 \
        ORDER BY device_no LIMIT $4) t ORDER BY t.device_no";
