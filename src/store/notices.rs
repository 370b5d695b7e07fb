//! Notices for a device about mail that it doesn't get: how many messages expired unread, and how many were refused for lack
//! of room. A notice stays until the device has acknowledged it.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{FromRow, SqliteConnection};

use crate::clock::Timestamp;
use crate::model::ids::{DeviceNo, Position};
use crate::store::database::{PostgresTx, Tx, reading, run};
use crate::store::shares::Rows;
use crate::store::{Result, Store, json_list};

/// The time since when a notice counts is rounded down to this.
const SINCE_PRECISION: Duration = Duration::from_hours(1);

/// A period is the position of the queue at which it began, times this, plus the number of repeats that have taken refusals
/// back since.
const MAX_RETRACTIONS: i64 = 1024;

/// A notice that the device has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct Notice {
    /// Which one it is. It changes when the notice has been acknowledged, and when refusals are taken back, since then it is
    /// not known which of those that were told are left.
    pub period: i64,
    /// When the first of these happened, rounded down to the hour.
    pub since: Timestamp,
    /// Messages that expired unread.
    pub expired: i64,
    /// Messages that were not queued for lack of room. Each counts once, however often its send was repeated.
    pub refused: i64,
}

impl Store {
    /// The notice that the device has not acknowledged; `None` when there is none.
    pub async fn notice(&self, device: DeviceNo) -> Result<Option<Notice>> {
        let statement = "SELECT period, since, expired, refused FROM inbox_notices \
                         WHERE device_no = $1 AND (expired > 0 OR refused > 0)";
        reading!(self, |db| sqlx::query_as(statement).bind(device).fetch_optional(db))
    }

    /// Subtracts a notice that the device has acknowledged. What was added since stays. A notice that was acknowledged before,
    /// or of which refusals have been taken back since, changes nothing.
    pub async fn acknowledge_notice(&self, device: DeviceNo, acknowledged: Notice, now: Timestamp) -> Result<()> {
        let mut tx = self.begin_on(Rows::OfDevice(device)).await?;
        let statement = "UPDATE inbox_notices SET period = $3, since = $4, expired = expired - $5, \
                        refused = CASE WHEN refused > $6 THEN refused - $6 ELSE 0 END \
                    WHERE device_no = $1 AND period = $2";
        let (next, since) = (self.new_period(&mut tx).await?, round_down(now));
        run!(
            &mut tx,
            sqlx::query(statement)
                .bind(device)
                .bind(acknowledged.period)
                .bind(next)
                .bind(since)
                .bind(acknowledged.expired)
                .bind(acknowledged.refused)
        )?;
        let clear = "DELETE FROM inbox_notices WHERE device_no = $1 AND expired <= 0 AND refused <= 0";
        run!(&mut tx, sqlx::query(clear).bind(device))?;
        tx.commit().await
    }

    /// Adds what expired. `tx` is of the general kind.
    pub(super) async fn add_expired(&self, tx: &mut Tx, counts: &Counts, now: Timestamp) -> Result<()> {
        if counts.is_empty() {
            return Ok(());
        }
        let period = self.new_period(tx).await?;
        match tx {
            Tx::Sqlite(tx) => add_in_sqlite(tx, counts, NoticeKind::Expired, (period, now)).await,
            Tx::Postgres(tx) => add_in_postgres(tx, counts, NoticeKind::Expired, (period, now)).await,
        }
    }

    /// A period that begins after every send that has been answered, also if the process ends now.
    async fn new_period(&self, tx: &mut Tx) -> Result<i64> {
        match tx {
            Tx::Sqlite(tx) => {
                let place = self.message_sequence.reserve_positions(1);
                let keep = "UPDATE sqlite_sequence SET seq = $1 WHERE name = 'messages' AND seq < $1";
                sqlx::query(keep).bind(place).execute(&mut **tx).await?;
                Ok(period(Position(place + 1)))
            }
            Tx::Postgres(tx) => {
                let next: Vec<(Position,)> = tx.all(sqlx::query_as("SELECT nextval('message_blocks')")).await?;
                Ok(next.first().map_or(i64::MAX, |(position,)| period(*position)))
            }
        }
    }
}

/// The period that begins with the send whose messages have places from this one on.
pub(super) fn period(position: Position) -> i64 {
    position.0.saturating_mul(MAX_RETRACTIONS)
}

/// What a group or a sweep adds for devices.
pub(super) type Counts = BTreeMap<DeviceNo, i64>;
/// What a group takes back for a device: how many refusals, and the place of the first of their sends in the queue.
pub(super) type RetractedRefusals = BTreeMap<DeviceNo, (i64, Position)>;

fn round_down(now: Timestamp) -> Timestamp {
    let step = i64::try_from(SINCE_PRECISION.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_millis(now.millis().div_euclid(step) * step)
}

/// A row whose counts are zero begins anew.
macro_rules! add {
    ($counts:literal) => {
        concat!(
            "INSERT INTO inbox_notices (device_no, period, since, expired, refused) ",
            $counts,
            " ON CONFLICT (device_no) DO UPDATE SET
                  since = CASE WHEN inbox_notices.expired <= 0 AND inbox_notices.refused <= 0
                          THEN excluded.since ELSE inbox_notices.since END,
                  expired = inbox_notices.expired + excluded.expired, refused = inbox_notices.refused + excluded.refused"
        )
    };
}

/// Devices that are gone get no row. $1 is a list of device numbers with counts.
const ADD: &str = add!(
    "SELECT d.no, $2, $3, CASE WHEN $4 THEN row.value ->> 1 ELSE 0 END, CASE WHEN $4 THEN 0 ELSE row.value ->> 1 END
     FROM json_each($1) row CROSS JOIN devices d ON d.no = row.value ->> 0 WHERE true"
);

/// In the order of the devices, so that no two transactions wait for each other in a circle.
const ADD_IN_POSTGRES: &str = add!(
    "SELECT d.no, $3, $4, CASE WHEN $5 THEN row.count ELSE 0 END, CASE WHEN $5 THEN 0 ELSE row.count END
     FROM unnest($1, $2) AS row (no, count) JOIN devices d ON d.no = row.no ORDER BY d.no"
);

/// A refusal of a former period was acknowledged already.
const RETRACT: &str = "
    UPDATE inbox_notices SET refused = MAX(refused - (row.value ->> 1), 0), period = period + 1 FROM json_each($1) row
    WHERE device_no = row.value ->> 0 AND period < row.value ->> 2";

const RETRACT_IN_POSTGRES: &str = "
    UPDATE inbox_notices n SET refused = GREATEST(n.refused - taken.count, 0), period = n.period + 1
    FROM unnest($1, $2, $3) AS taken (no, count, next) WHERE n.device_no = taken.no AND n.period < taken.next";

/// The first period that begins after a send with this place.
fn next(position: Position) -> i64 {
    period(Position(position.0.saturating_add(1)))
}

fn retracted(counts: &RetractedRefusals) -> String {
    json_list(counts.iter().map(|(device, (count, first))| format!("[{},{count},{}]", device.0, next(*first))))
}

/// Which of the two counts is added to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NoticeKind {
    Expired,
    Refused,
}

/// A device without a row gets one whose period is this one. So does [`add_in_postgres`].
pub(super) async fn add_in_sqlite(
    tx: &mut SqliteConnection,
    counts: &Counts,
    kind: NoticeKind,
    (period, now): (i64, Timestamp),
) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let list = json_list(counts.iter().map(|(device, count)| format!("[{},{count}]", device.0)));
    let add = sqlx::query(ADD).bind(list).bind(period).bind(round_down(now));
    add.bind(kind == NoticeKind::Expired).execute(&mut *tx).await?;
    Ok(())
}

pub(super) async fn retract_in_sqlite(tx: &mut SqliteConnection, counts: &RetractedRefusals) -> Result<()> {
    if !counts.is_empty() {
        sqlx::query(RETRACT).bind(retracted(counts)).execute(&mut *tx).await?;
    }
    Ok(())
}

pub(super) async fn add_in_postgres(
    tx: &mut PostgresTx,
    counts: &Counts,
    kind: NoticeKind,
    (period, now): (i64, Timestamp),
) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let (devices, counts): (Vec<DeviceNo>, Vec<i64>) = counts.iter().unzip();
    let add = sqlx::query(ADD_IN_POSTGRES).bind(devices).bind(counts).bind(period).bind(round_down(now));
    tx.run(add.bind(kind == NoticeKind::Expired)).await?;
    Ok(())
}

pub(super) async fn retract_in_postgres(tx: &mut PostgresTx, counts: &RetractedRefusals) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let devices: Vec<DeviceNo> = counts.keys().copied().collect();
    let numbers: Vec<i64> = counts.values().map(|(count, _)| *count).collect();
    let next: Vec<i64> = counts.values().map(|(_, first)| next(*first)).collect();
    tx.run(sqlx::query(RETRACT_IN_POSTGRES).bind(devices).bind(numbers).bind(next)).await?;
    Ok(())
}
