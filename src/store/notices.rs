//! Notices for a device about mail that it doesn't get: how many messages expired unread, and how many were refused for lack
//! of room. A notice stays until the device has acknowledged it.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{FromRow, SqliteConnection};

use crate::clock::Timestamp;
use crate::model::ids::DeviceNo;
use crate::store::database::{PostgresTx, Tx, reading, run};
use crate::store::{Result, Store, json_list};

/// The time since when a notice counts is rounded down to this.
const COARSE: Duration = Duration::from_hours(1);

/// A notice that the device has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct Notice {
    /// Which one it is. Another one follows when this has been acknowledged.
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

    /// Subtracts a notice that the device has acknowledged. What was added since stays. A notice that was acknowledged before
    /// changes nothing.
    pub async fn notice_told(&self, device: DeviceNo, told: Notice, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        let statement = "UPDATE inbox_notices SET period = $3, since = $4, expired = expired - $5, \
                        refused = CASE WHEN refused > $6 THEN refused - $6 ELSE 0 END \
                    WHERE device_no = $1 AND period = $2";
        let (next, since) = (rand::random::<i64>(), coarse(now));
        run!(
            &mut tx,
            sqlx::query(statement)
                .bind(device)
                .bind(told.period)
                .bind(next)
                .bind(since)
                .bind(told.expired)
                .bind(told.refused)
        )?;
        let clear = "DELETE FROM inbox_notices WHERE device_no = $1 AND expired <= 0 AND refused <= 0";
        run!(&mut tx, sqlx::query(clear).bind(device))?;
        tx.commit().await
    }
}

/// What a group or a sweep adds for devices.
pub(super) type Counts = BTreeMap<DeviceNo, i64>;
/// What a group takes back: how many refusals, and when the last of them was.
pub(super) type TakenBack = BTreeMap<DeviceNo, (i64, Timestamp)>;

fn coarse(now: Timestamp) -> Timestamp {
    let step = i64::try_from(COARSE.as_millis()).unwrap_or(i64::MAX);
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

/// A refusal from before the row's beginning was acknowledged already.
const TAKE_BACK: &str = "
    UPDATE inbox_notices SET refused = MAX(refused - (row.value ->> 1), 0) FROM json_each($1) row
    WHERE device_no = row.value ->> 0 AND since <= row.value ->> 2";

const TAKE_BACK_IN_POSTGRES: &str = "
    UPDATE inbox_notices n SET refused = GREATEST(n.refused - taken.count, 0)
    FROM unnest($1, $2, $3) AS taken (no, count, refused_at) WHERE n.device_no = taken.no AND n.since <= taken.refused_at";

fn taken_back(counts: &TakenBack) -> String {
    json_list(counts.iter().map(|(device, (count, at))| format!("[{},{count},{}]", device.0, at.millis())))
}

/// Which of the two counts is added to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    Expired,
    Refused,
}

/// Adds what a transaction of the general kind counts.
pub(super) async fn add(tx: &mut Tx, counts: &Counts, unread: Unread, now: Timestamp) -> Result<()> {
    match tx {
        Tx::Sqlite(tx) => add_in_sqlite(tx, counts, unread, now).await,
        Tx::Postgres(tx) => add_in_postgres(tx, counts, unread, now).await,
    }
}

pub(super) async fn add_in_sqlite(
    tx: &mut SqliteConnection,
    counts: &Counts,
    unread: Unread,
    now: Timestamp,
) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let list = json_list(counts.iter().map(|(device, count)| format!("[{},{count}]", device.0)));
    let add = sqlx::query(ADD).bind(list).bind(rand::random::<i64>()).bind(coarse(now));
    add.bind(unread == Unread::Expired).execute(&mut *tx).await?;
    Ok(())
}

pub(super) async fn take_back_in_sqlite(tx: &mut SqliteConnection, counts: &TakenBack) -> Result<()> {
    if !counts.is_empty() {
        sqlx::query(TAKE_BACK).bind(taken_back(counts)).execute(&mut *tx).await?;
    }
    Ok(())
}

pub(super) async fn add_in_postgres(
    tx: &mut PostgresTx,
    counts: &Counts,
    unread: Unread,
    now: Timestamp,
) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let (devices, counts): (Vec<DeviceNo>, Vec<i64>) = counts.iter().unzip();
    let add = sqlx::query(ADD_IN_POSTGRES).bind(devices).bind(counts).bind(rand::random::<i64>()).bind(coarse(now));
    tx.run(add.bind(unread == Unread::Expired)).await?;
    Ok(())
}

pub(super) async fn take_back_in_postgres(tx: &mut PostgresTx, counts: &TakenBack) -> Result<()> {
    if counts.is_empty() {
        return Ok(());
    }
    let devices: Vec<DeviceNo> = counts.keys().copied().collect();
    let numbers: Vec<i64> = counts.values().map(|(count, _)| *count).collect();
    let times: Vec<Timestamp> = counts.values().map(|(_, at)| *at).collect();
    tx.run(sqlx::query(TAKE_BACK_IN_POSTGRES).bind(devices).bind(numbers).bind(times)).await?;
    Ok(())
}
