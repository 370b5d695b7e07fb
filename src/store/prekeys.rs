//! Prekeys: uploaded by their device, handed to clients that want to write to it, the one-time ones at most once.
//!
//! A one-time prekey is deleted in the transaction that reads it, and that transaction is on disk before a client sees
//! the key. So no crash and no race gives one key to two askers. The same transaction records that the key was used, so that
//! an upload can't bring it back. A key that was recorded before is not handed out: a database may hold one twice that an
//! earlier version stored under two ids or on two devices.
//!
//! Locks on PostgreSQL: an upload, a new device and a reset lock the rows of `device_keys` of all devices of the account, so
//! that they wait for each other and for hand-outs, which hold a weaker lock of these rows. Rows are locked in this order:
//! `account_locks`, `devices`, `device_keys`, and the latter two by device number.

mod rows;

use sqlx::FromRow;

use crate::model::ids::{Address, DeviceId, DeviceNo, UserId};
use crate::model::keys::{
    KemPublicKey, KeyError, KeyId, OneTimePreKey, PqKeyId, PqPreKey, PreKeys, PublicKey, RegistrationId, Signature,
    SignedPreKey,
};
use crate::store::database::{Tx, on, reading, run};
use crate::store::known_prekeys::{OwnPrekeys, StoredPrekeys};
use crate::store::shares::Rows;
use crate::store::spent_prekeys::{self, fingerprint};
use crate::store::{Result, Store, StoreError};

pub(super) use rows::{OneTimeRow, add_one_time, lasting_keys, one_time_rows, prune};

/// What it takes to start a session with a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The device.
    pub device: DeviceId,
    /// Its installation, as it named it.
    pub registration_id: RegistrationId,
    /// The account's identity key.
    pub identity: PublicKey,
    /// The device's newest signed prekey.
    pub signed: SignedPreKey,
    /// One that no other client gets; `None` when there are none left.
    pub one_time: Option<OneTimePreKey>,
    /// One that no other client gets, or the last-resort key when there are none left; `None` when the device has no such
    /// keys at all.
    pub pq: Option<PqPreKey>,
}

/// Bundles for a client that asked, and the devices to notify of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandedOut {
    /// One for each device asked for, oldest device first.
    pub bundles: Vec<Bundle>,
    /// Those of the devices that have few one-time prekeys left.
    pub low: Vec<Address>,
}

/// How many one-time prekeys a device has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct PrekeyCounts {
    /// Elliptic-curve keys.
    #[sqlx(try_from = "i64")]
    pub ec: u32,
    /// Post-quantum keys. The last-resort key does not count.
    #[sqlx(try_from = "i64")]
    pub pq: u32,
    /// True when the device has a last-resort post-quantum key, and so is expected to keep one-time ones in stock.
    pub uses_pq: bool,
}

impl PrekeyCounts {
    /// True when the device should upload more.
    pub fn is_below(&self, threshold: u32) -> bool {
        self.ec < threshold || (self.uses_pq && self.pq < threshold)
    }
}

impl Store {
    /// A bundle for each device of the account, or for the one device that is named. `None` when there is no such
    /// device.
    ///
    /// A device left with fewer than `threshold` one-time prekeys counts as low.
    pub async fn bundles(&self, user: UserId, device: Option<DeviceId>, threshold: u32) -> Result<Option<HandedOut>> {
        let mut tx = self.begin_on(Rows::OfAccount(user)).await?;
        let read = tx.sql(READ_DEVICES, READ_DEVICES_IN_POSTGRES);
        let rows: Vec<DeviceRow> = on!(&mut tx, |db| sqlx::query_as(read).bind(user).bind(device).fetch_all(db))?;
        let take = tx.sql(TAKE_KEYS, TAKE_KEYS_IN_POSTGRES);
        let mut taken: Vec<TakenRow> = match rows.len() {
            0 => Vec::new(),
            _ => on!(&mut tx, |db| sqlx::query_as(take).bind(user).bind(device).fetch_all(db))?,
        };
        if matches!(tx, Tx::Sqlite(_)) {
            let used: Vec<_> = taken.iter().map(|key| (user, fingerprint(user, &key.public_key))).collect();
            let mut recorded = spent_prekeys::record(&mut tx, &used).await?;
            for (key, used) in taken.iter_mut().zip(&used) {
                // Of two devices with the same key the first one spends it.
                key.is_new = recorded.remove(used);
            }
        }
        tx.commit().await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let mut handed_out = HandedOut { bundles: Vec::with_capacity(rows.len()), low: Vec::new() };
        for row in rows {
            let mut take = |kind| {
                let at = taken.iter().position(|key| key.device_no == row.no && key.kind == kind)?;
                Some(taken.swap_remove(at))
            };
            let (ec, pq) = (take(EC), take(PQ));
            if row.left(ec.is_some(), pq.is_some()).is_below(threshold) {
                handed_out.low.push(Address { user, device: row.no });
            }
            let [ec, pq] = [ec, pq].map(|key| key.filter(|key| key.is_new));
            handed_out.bundles.push(row.bundle(ec, pq)?);
        }
        Ok(Some(handed_out))
    }

    /// The same bundles without one-time prekeys, of which none is spent.
    pub async fn lasting_bundles(
        &self,
        user: UserId,
        device: Option<DeviceId>,
        threshold: u32,
    ) -> Result<Option<HandedOut>> {
        let rows: Vec<DeviceRow> =
            reading!(self, |db| sqlx::query_as(READ_DEVICES).bind(user).bind(device).fetch_all(db))?;
        if rows.is_empty() {
            return Ok(None);
        }
        let low = rows.iter().filter(|row| row.left(false, false).is_below(threshold));
        let low = low.map(|row| Address { user, device: row.no }).collect();
        let bundles = rows.into_iter().map(|row| row.bundle(None, None)).collect::<Result<_>>()?;
        Ok(Some(HandedOut { bundles, low }))
    }

    /// How many one-time prekeys the device has left; `None` when the device is gone.
    pub async fn prekey_counts(&self, no: DeviceNo) -> Result<Option<PrekeyCounts>> {
        reading!(self, |db| sqlx::query_as(COUNT_KEYS).bind(no).fetch_optional(db))
    }

    /// The identity key of the account that the device belongs to; `None` when the device is gone.
    pub async fn identity(&self, no: DeviceNo) -> Result<Option<PublicKey>> {
        let statement = "SELECT identity_key FROM users WHERE id = (SELECT user_id FROM devices WHERE no = $1)";
        let key: Option<Vec<u8>> = reading!(self, |db| sqlx::query_scalar(statement).bind(no).fetch_optional(db))?;
        key.map(|key| intact(PublicKey::from_bytes(&key))).transpose()
    }
}

/// `one_time_prekeys.kind` of elliptic-curve keys.
pub(super) const EC: i32 = 0;
/// `one_time_prekeys.kind` of post-quantum keys.
pub(super) const PQ: i32 = 1;
/// The devices that are asked for, with the keys that stay and the number of those that go.
macro_rules! read_devices {
    ($lock:literal) => {
        concat!(
            "SELECT d.no, d.id, d.registration_id, u.identity_key, k.signed_id, k.signed_key, k.signed_signature, \
             k.pq_last_resort_id, k.pq_last_resort_key, k.pq_last_resort_signature, \
             (SELECT count(*) FROM one_time_prekeys o WHERE o.device_no = d.no AND o.kind = 0) AS ec_stored, \
             (SELECT count(*) FROM one_time_prekeys o WHERE o.device_no = d.no AND o.kind = 1) AS pq_stored \
             FROM devices d JOIN users u ON u.id = d.user_id JOIN device_keys k ON k.device_no = d.no \
             WHERE d.user_id = $1 AND ($2 IS NULL OR d.id = $2) ORDER BY d.no",
            $lock
        )
    };
}

const READ_DEVICES: &str = read_devices!("");

/// The same. An upload, which looks for used keys, waits for the end of this transaction.
const READ_DEVICES_IN_POSTGRES: &str = read_devices!(" FOR KEY SHARE OF k");

/// Takes the oldest one-time prekey of each kind from each of the devices.
const TAKE_KEYS: &str = "\
    DELETE FROM one_time_prekeys WHERE no IN ( \
        SELECT min(o.no) FROM devices d JOIN one_time_prekeys o ON o.device_no = d.no \
        WHERE d.user_id = $1 AND ($2 IS NULL OR d.id = $2) GROUP BY o.device_no, o.kind) \
    RETURNING device_no, kind, key_id, public_key, signature";

/// The same; a key that another transaction is taking at this moment is left to that one. What is taken is recorded in the
/// same statement, by the fingerprint of [`spent_prekeys`]. Where two devices have the same key, only one hand-out inserts its
/// record, and in that one only the first copy counts.
const TAKE_KEYS_IN_POSTGRES: &str = "\
    WITH oldest AS MATERIALIZED ( \
        SELECT o.no FROM devices d CROSS JOIN (VALUES (0), (1)) AS kinds (kind) CROSS JOIN LATERAL ( \
            SELECT o.no FROM one_time_prekeys o WHERE o.device_no = d.no AND o.kind = kinds.kind \
            ORDER BY o.no LIMIT 1 FOR UPDATE SKIP LOCKED) o \
        WHERE d.user_id = $1 AND ($2 IS NULL OR d.id = $2)), \
    taken AS ( \
        DELETE FROM one_time_prekeys WHERE no IN (SELECT no FROM oldest) \
        RETURNING device_no, kind, key_id, public_key, signature), \
    hashed AS ( \
        SELECT *, substr(sha256(uuid_send($1) || public_key), 1, 8) AS fingerprint, \
               row_number() OVER (PARTITION BY public_key ORDER BY device_no) AS copy FROM taken), \
    recorded AS ( \
        INSERT INTO spent_prekeys (user_id, fingerprint) \
        SELECT $1, fingerprint FROM hashed ORDER BY fingerprint ON CONFLICT DO NOTHING RETURNING fingerprint) \
    SELECT device_no, kind, key_id, public_key, signature, \
           copy = 1 AND fingerprint IN (SELECT fingerprint FROM recorded) AS is_new FROM hashed";

const COUNT_KEYS: &str = "\
    SELECT (SELECT count(*) FROM one_time_prekeys o WHERE o.device_no = k.device_no AND o.kind = 0) AS ec, \
           (SELECT count(*) FROM one_time_prekeys o WHERE o.device_no = k.device_no AND o.kind = 1) AS pq, \
           k.pq_last_resort_id IS NOT NULL AS uses_pq \
    FROM device_keys k WHERE k.device_no = $1";

#[derive(FromRow)]
struct DeviceRow {
    no: DeviceNo,
    id: DeviceId,
    registration_id: i32,
    identity_key: Vec<u8>,
    signed_id: i32,
    signed_key: Vec<u8>,
    signed_signature: Vec<u8>,
    pq_last_resort_id: Option<i32>,
    pq_last_resort_key: Option<Vec<u8>>,
    pq_last_resort_signature: Option<Vec<u8>>,
    #[sqlx(try_from = "i64")]
    ec_stored: u32,
    #[sqlx(try_from = "i64")]
    pq_stored: u32,
}

#[derive(FromRow)]
struct TakenRow {
    device_no: DeviceNo,
    kind: i32,
    key_id: i32,
    public_key: Vec<u8>,
    signature: Option<Vec<u8>>,
    /// False for a key that had been used before.
    #[sqlx(default)]
    is_new: bool,
}

impl DeviceRow {
    /// The stock without what was just taken.
    fn left(&self, ec_taken: bool, pq_taken: bool) -> PrekeyCounts {
        PrekeyCounts {
            ec: self.ec_stored.saturating_sub(ec_taken.into()),
            pq: self.pq_stored.saturating_sub(pq_taken.into()),
            uses_pq: self.pq_last_resort_id.is_some(),
        }
    }

    fn bundle(self, ec: Option<TakenRow>, pq: Option<TakenRow>) -> Result<Bundle> {
        let signed = SignedPreKey {
            id: KeyId(self.signed_id),
            public_key: intact(PublicKey::from_bytes(&self.signed_key))?,
            signature: intact(Signature::from_bytes(&self.signed_signature))?,
        };
        let pq = match pq {
            Some(key) => Some((key.key_id, key.public_key, key.signature.unwrap_or_default())),
            None => match (self.pq_last_resort_id, self.pq_last_resort_key, self.pq_last_resort_signature) {
                (Some(id), Some(key), Some(signature)) => Some((id, key, signature)),
                _ => None,
            },
        };
        Ok(Bundle {
            device: self.id,
            registration_id: RegistrationId(self.registration_id),
            identity: intact(PublicKey::from_bytes(&self.identity_key))?,
            signed,
            one_time: ec.map(one_time_prekey).transpose()?,
            pq: pq.map(|(id, key, signature)| pq_prekey(id, &key, &signature)).transpose()?,
        })
    }
}

fn one_time_prekey(row: TakenRow) -> Result<OneTimePreKey> {
    Ok(OneTimePreKey { id: KeyId(row.key_id), public_key: intact(PublicKey::from_bytes(&row.public_key))? })
}

fn pq_prekey(id: i32, key: &[u8], signature: &[u8]) -> Result<PqPreKey> {
    Ok(PqPreKey {
        id: intact(PqKeyId::new(id))?,
        public_key: intact(KemPublicKey::from_bytes(key))?,
        signature: intact(Signature::from_bytes(signature))?,
    })
}

/// What was checked before it was stored can only be wrong when the database is damaged.
pub(super) fn intact<T>(value: std::result::Result<T, KeyError>) -> Result<T> {
    value.map_err(|error| StoreError(sqlx::Error::Decode(error.into())))
}

/// Keeps uploads and hand-outs of all devices of the account waiting until the commit. What is being handed out is recorded
/// before this returns.
pub(super) async fn lock(tx: &mut Tx, user: UserId) -> Result<()> {
    if matches!(tx, Tx::Postgres(_)) {
        let statement = "\
            SELECT k.device_no FROM devices d JOIN device_keys k ON k.device_no = d.no WHERE d.user_id = $1 \
            ORDER BY k.device_no FOR UPDATE OF k";
        let _: Vec<DeviceNo> = on!(tx, |db| sqlx::query_scalar(statement).bind(user).fetch_all(db))?;
    }
    Ok(())
}

/// Stores the first keys of a device, without one-time keys that the account has or has used. The caller holds [`lock`], unless
/// the account is new.
pub(super) async fn insert(tx: &mut Tx, user: UserId, no: DeviceNo, keys: &PreKeys) -> Result<()> {
    let statement = "\
        INSERT INTO device_keys (device_no, signed_id, signed_key, signed_signature, \
                                 pq_last_resort_id, pq_last_resort_key, pq_last_resort_signature) \
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    store_signed(tx, statement, no, keys).await?;
    let rows = one_time_rows(keys);
    let known = StoredPrekeys::read(tx, user, keys, &rows).await?;
    let change = known.change(rows, &lasting_keys(keys), &OwnPrekeys::Replaced(no));
    add_one_time(tx, no, &change.added).await
}

/// Puts the signed keys of an upload in place of the stored ones. A last-resort key that is not in it stays.
pub(super) async fn replace(tx: &mut Tx, no: DeviceNo, keys: &PreKeys) -> Result<()> {
    let statement = "\
        UPDATE device_keys SET signed_id = $2, signed_key = $3, signed_signature = $4, \
               pq_last_resort_id = COALESCE($5, pq_last_resort_id), \
               pq_last_resort_key = COALESCE($6, pq_last_resort_key), \
               pq_last_resort_signature = COALESCE($7, pq_last_resort_signature) \
        WHERE device_no = $1";
    store_signed(tx, statement, no, keys).await
}

async fn store_signed(tx: &mut Tx, statement: &'static str, no: DeviceNo, keys: &PreKeys) -> Result<()> {
    let last_resort = keys.pq_last_resort.as_ref();
    run!(
        tx,
        sqlx::query(statement)
            .bind(no)
            .bind(keys.signed.id.0)
            .bind(&keys.signed.public_key.as_bytes()[..])
            .bind(&keys.signed.signature.as_bytes()[..])
            .bind(last_resort.map(|key| key.id.get()))
            .bind(last_resort.map(|key| &key.public_key.as_bytes()[..]))
            .bind(last_resort.map(|key| &key.signature.as_bytes()[..]))
    )?;
    Ok(())
}

#[cfg(test)]
mod tests;
