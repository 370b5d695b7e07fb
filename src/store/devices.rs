//! The devices of an account.

use std::collections::HashMap;

use sqlx::FromRow;

use crate::model::ids::{Address, DeviceId, DeviceNo, UserId};
use crate::model::keys::{PreKeys, RegistrationId};
use crate::store::database::{Database, Tx, on, reading, run};
use crate::store::shares::Rows;
use crate::store::{Result, Store, json_list, prekeys, spent_prekeys};
use crate::telemetry::metrics::Left;

/// A device that is about to be made.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// Its id.
    pub id: DeviceId,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Its installation, as it names it.
    pub registration_id: RegistrationId,
    /// Its first prekeys.
    pub prekeys: PreKeys,
}

/// A device as its owner sees it in a list.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct DeviceRow {
    /// Its id.
    pub id: DeviceId,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Whether it is the account's primary device.
    pub is_primary: bool,
}

/// What an access token is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct DeviceAuth {
    /// The device's number.
    pub no: DeviceNo,
    /// The account it belongs to.
    #[sqlx(rename = "user_id")]
    pub user: UserId,
    /// Whether it is the account's primary device.
    pub is_primary: bool,
    /// Access tokens that expire at or before this Unix second are void.
    #[sqlx(rename = "tokens_void_to")]
    pub tokens_revoked_until: i64,
}

#[derive(FromRow)]
struct DeviceAuthRow {
    id: DeviceId,
    #[sqlx(flatten)]
    device_auth: DeviceAuth,
}

/// What became of the wish to remove a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// This device is gone, with everything that was kept for it.
    Device(DeviceNo),
    /// The account has no such device.
    Unknown,
    /// The primary device can't be removed.
    Primary,
}

impl Store {
    /// Where the device stands now; `None` when there is no such device (any more).
    pub async fn device_auth(&self, device: DeviceId) -> Result<Option<DeviceAuth>> {
        self.device_auth_cache.of(device, async |devices| self.load_device_auth(devices).await).await
    }

    async fn load_device_auth(&self, devices: &[DeviceId]) -> Result<Vec<Option<DeviceAuth>>> {
        if let [device] = devices {
            let statement = "SELECT no, user_id, is_primary, tokens_void_to FROM devices WHERE id = $1";
            let device_auth = reading!(self, |db| sqlx::query_as(statement).bind(*device).fetch_optional(db))?;
            return Ok(vec![device_auth]);
        }
        let rows: Vec<DeviceAuthRow> = match &self.database {
            Database::Sqlite(sqlite) => {
                let statement = "SELECT d.id, d.no, d.user_id, d.is_primary, d.tokens_void_to \
                                 FROM json_each($1) asked CROSS JOIN devices d ON d.id = substr($2, asked.value, 16)";
                let offsets = json_list((0..devices.len()).map(|n| n * 16 + 1));
                let ids: Vec<u8> = devices.iter().flat_map(|device| *device.as_bytes()).collect();
                let find = sqlx::query_as(statement).bind(offsets).bind(ids);
                find.fetch_all(&mut *sqlite.read.get().await?).await?
            }
            Database::Postgres(postgres) => {
                let statement = "SELECT id, no, user_id, is_primary, tokens_void_to FROM devices WHERE id = ANY($1)";
                postgres.all(sqlx::query_as(statement).bind(devices)).await?
            }
        };
        let found: HashMap<DeviceId, DeviceAuth> = rows.into_iter().map(|row| (row.id, row.device_auth)).collect();
        Ok(devices.iter().map(|device| found.get(device).copied()).collect())
    }

    /// The device's `tokens_revoked_until`, which changes whenever its session is ended, and becomes zero a day
    /// behind the second that it names; `None` when the device is gone.
    pub async fn epoch(&self, no: DeviceNo) -> Result<Option<i64>> {
        let statement = "SELECT tokens_void_to FROM devices WHERE no = $1";
        reading!(self, |db| sqlx::query_scalar(statement).bind(no).fetch_optional(db))
    }

    /// Where signals for the devices of these accounts go.
    pub async fn addresses(&self, users: &[UserId]) -> Result<Vec<Address>> {
        let rows: Vec<(UserId, DeviceNo)> = match &self.database {
            Database::Sqlite(sqlite) => {
                let statement = "SELECT d.user_id, d.no FROM json_each($1) asked \
                                 CROSS JOIN devices d ON d.user_id = substr($2, asked.value, 16)";
                let offsets = json_list((0..users.len()).map(|n| n * 16 + 1));
                let ids: Vec<u8> = users.iter().flat_map(|user| *user.as_bytes()).collect();
                let find = sqlx::query_as(statement).bind(offsets).bind(ids);
                find.fetch_all(&mut *sqlite.read.get().await?).await?
            }
            Database::Postgres(postgres) => {
                let statement = "SELECT user_id, no FROM devices WHERE user_id = ANY($1)";
                postgres.all(sqlx::query_as(statement).bind(users)).await?
            }
        };
        Ok(rows.into_iter().map(|(user, device)| Address { user, device }).collect())
    }

    /// The account's devices, oldest first.
    pub async fn devices(&self, user: UserId) -> Result<Vec<DeviceRow>> {
        let statement = "SELECT id, name, is_primary FROM devices WHERE user_id = $1 ORDER BY no";
        reading!(self, |db| sqlx::query_as(statement).bind(user).fetch_all(db))
    }

    /// Removes a linked device of the account, with everything that was kept for it, except the rest of a very large
    /// inbox: see [`Store::clear_inboxes`]. What it sent to others stays.
    pub async fn remove_device(&self, user: UserId, device: DeviceId) -> Result<Removed> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        lock_account(&mut tx, user).await?;
        let statement = "SELECT no, is_primary FROM devices WHERE id = $1 AND user_id = $2";
        let found = on!(&mut tx, |db| sqlx::query_as(statement).bind(device).bind(user).fetch_optional(db))?;
        let mut mail = 0;
        let removed = match found {
            None => Removed::Unknown,
            Some((_, true)) => Removed::Primary,
            Some((no, false)) => {
                lock(&mut tx, no).await?;
                spent_prekeys::record_signed(&mut tx, user, Some(no)).await?;
                mail = delete_devices(&mut tx, &[no]).await?;
                Removed::Device(no)
            }
        };
        tx.commit().await?;
        self.metrics.left.add(Left::Removed, mail);
        Ok(removed)
    }

    /// Deletes a part of the messages that wait for devices which are gone. Answers whether there may be more. Until then
    /// no device can read them.
    pub async fn clear_inboxes(&self, gone: &[DeviceNo]) -> Result<bool> {
        let mut tx = self.begin().await?;
        let deleted = delete_messages(&mut tx, gone).await?;
        tx.commit().await?;
        self.metrics.left.add(Left::Removed, deleted);
        Ok(deleted > 0)
    }
}

/// Makes the row by which an account is locked. SQLite needs none: it has one writer.
pub(super) async fn make_lock(tx: &mut Tx, user: UserId) -> Result<()> {
    if matches!(tx, Tx::Postgres(_)) {
        run!(tx, sqlx::query("INSERT INTO account_locks (user_id) VALUES ($1)").bind(user))?;
    }
    Ok(())
}

/// Keeps other transactions from queueing for the account and from changing its devices, until the commit. What is read
/// afterwards is how it stays until then.
pub(super) async fn lock_account(tx: &mut Tx, user: UserId) -> Result<()> {
    if matches!(tx, Tx::Postgres(_)) {
        let statement = "SELECT user_id FROM account_locks WHERE user_id = $1 FOR NO KEY UPDATE";
        let _: Option<UserId> = on!(tx, |db| sqlx::query_scalar(statement).bind(user).fetch_optional(db))?;
    }
    Ok(())
}

/// Keeps other transactions from changing the device and its session, until the commit.
pub(super) async fn lock(tx: &mut Tx, no: DeviceNo) -> Result<()> {
    if matches!(tx, Tx::Postgres(_)) {
        let statement = "SELECT no FROM devices WHERE no = $1 FOR NO KEY UPDATE";
        let _: Option<DeviceNo> = on!(tx, |db| sqlx::query_scalar(statement).bind(no).fetch_optional(db))?;
    }
    Ok(())
}

/// Locks the device as [`lock`] does, and returns the account that it belongs to; `None` when it is gone.
pub(super) async fn lock_and_find_owner(tx: &mut Tx, no: DeviceNo) -> Result<Option<UserId>> {
    let statement = tx.sql(
        "SELECT user_id FROM devices WHERE no = $1",
        "SELECT user_id FROM devices WHERE no = $1 FOR NO KEY UPDATE",
    );
    on!(tx, |db| sqlx::query_scalar(statement).bind(no).fetch_optional(db))
}

/// Makes a device with its keys.
pub(super) async fn insert(tx: &mut Tx, user: UserId, device: &NewDevice, is_primary: bool) -> Result<DeviceNo> {
    let statement = "INSERT INTO devices (id, user_id, name, registration_id, is_primary) VALUES ($1, $2, $3, $4, $5) \
                     RETURNING no";
    let no = on!(tx, |db| sqlx::query_scalar(statement)
        .bind(device.id)
        .bind(user)
        .bind(device.name.as_deref())
        .bind(device.registration_id.0)
        .bind(is_primary)
        .fetch_one(db))?;
    prekeys::insert(tx, user, no, &device.prekeys).await?;
    Ok(no)
}

/// Forgets devices and everything that was kept for them, except the rest of very large inboxes. Messages that they
/// sent stay. The account is locked. Answers how many messages were deleted.
pub(super) async fn delete_devices(tx: &mut Tx, nos: &[DeviceNo]) -> Result<u64> {
    tx.register_auth_change(nos);
    match tx {
        Tx::Sqlite(tx) => {
            for statement in DELETE {
                sqlx::query(statement).bind(json_list(nos.iter().map(|no| no.0))).execute(&mut **tx).await?;
            }
        }
        Tx::Postgres(tx) => {
            // The devices go first: a transaction that is about to keep something for one of them holds its row, and finds it gone
            // afterwards.
            for statement in DELETE_IN_POSTGRES {
                tx.run(sqlx::query(statement).bind(nos)).await?;
            }
        }
    }
    delete_messages(tx, nos).await
}

/// Deletes the oldest messages of devices that are gone, as many as one transaction should. Answers how many.
async fn delete_messages(tx: &mut Tx, gone: &[DeviceNo]) -> Result<u64> {
    match tx {
        Tx::Sqlite(tx) => {
            let list = json_list(gone.iter().map(|no| no.0));
            let done = sqlx::query(DELETE_MESSAGES).bind(list).bind(MESSAGES_AT_ONCE).execute(&mut **tx).await?;
            Ok(done.rows_affected())
        }
        Tx::Postgres(tx) => tx.run(sqlx::query(DELETE_MESSAGES_IN_POSTGRES).bind(gone).bind(MESSAGES_AT_ONCE)).await,
    }
}

/// Bytes of messages that are deleted at once. A full inbox of the largest messages has 2 GB; deleting it takes many
/// seconds, during which no other transaction could write.
const MESSAGES_AT_ONCE: i64 = 16 << 20;

/// $1 is a JSON array of device numbers.
const DELETE: [&str; 9] = [
    "DELETE FROM sends WHERE sender_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM inbox_notices WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM push_tokens WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM gateway_tickets WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM refresh_uses WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM sessions WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM one_time_prekeys WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM device_keys WHERE device_no IN (SELECT value FROM json_each($1))",
    "DELETE FROM devices WHERE no IN (SELECT value FROM json_each($1))",
];

/// Messages are counted until $2 bytes lie before them, so there is at least one. The length of a body is read without
/// the body.
const DELETE_MESSAGES: &str = "\
    DELETE FROM messages WHERE position IN ( \
        SELECT position FROM ( \
            SELECT position, sum(size) OVER (ORDER BY position) - size AS size_before FROM ( \
                SELECT position, length(body) AS size FROM messages \
                WHERE device_no IN (SELECT value FROM json_each($1)) AND device_no NOT IN (SELECT no FROM devices))) \
        WHERE size_before < $2)";

/// $1 is an array of device numbers.
const DELETE_IN_POSTGRES: [&str; 9] = [
    "DELETE FROM devices WHERE no = ANY($1)",
    "DELETE FROM sends WHERE sender_no = ANY($1)",
    "DELETE FROM inbox_notices WHERE device_no = ANY($1)",
    "DELETE FROM push_tokens WHERE device_no = ANY($1)",
    "DELETE FROM gateway_tickets WHERE device_no = ANY($1)",
    "DELETE FROM refresh_uses WHERE device_no = ANY($1)",
    "DELETE FROM sessions WHERE device_no = ANY($1)",
    "DELETE FROM one_time_prekeys WHERE device_no = ANY($1)",
    "DELETE FROM device_keys WHERE device_no = ANY($1)",
];

/// See [`DELETE_MESSAGES`].
const DELETE_MESSAGES_IN_POSTGRES: &str = "\
    DELETE FROM messages m USING ( \
        SELECT device_no, position, sum(size) OVER (ORDER BY device_no, position) - size AS size_before FROM ( \
            SELECT device_no, position, octet_length(body) AS size FROM messages \
            WHERE device_no = ANY($1) AND NOT EXISTS (SELECT 1 FROM devices WHERE no = device_no)) mail) gone \
    WHERE m.device_no = gone.device_no AND m.position = gone.position AND gone.size_before < $2";
