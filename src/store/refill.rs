//! Uploads of prekeys by their device: what is added, what is replaced, and what is refused.
//!
//! An access token alone must not be enough to spoil a device's keys, so every upload that changes something needs a
//! signed prekey that the account has never had: only the holder of the identity key can make one. A signed prekey that can
//! be taken from a bundle is refused: the device's own under another id, and that of another device.

use std::collections::HashMap;

use sqlx::FromRow;

use crate::model::ids::{DeviceNo, UserId};
use crate::model::keys::PreKeys;
use crate::store::database::{Tx, on, run};
use crate::store::known_prekeys::{self, OwnPrekeys, StoredPrekeys};
use crate::store::prekeys::{self, OneTimeRow};
use crate::store::shares::Rows;
use crate::store::spent_prekeys::{self, fingerprint};
use crate::store::{Result, Store, devices};

/// The result of an upload. Unless it says `Stored`, nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refilled {
    /// All of it is stored, except one-time prekeys that were handed out before, come twice, or are those of another device.
    /// Also the answer to a repeated upload.
    Stored,
    /// The id of the signed prekey is not above that of the stored one.
    SignedIdNotRising,
    /// The signed prekey is not new: the account has had it, on this device under another id, on another one, or as a
    /// one-time key.
    SignedKeyKnown,
    /// The last-resort key is not new: it is stored under another id, or is or was a one-time key.
    LastResortKnown,
    /// There is no last-resort key in the upload, and one is needed: for one-time post-quantum keys when none is stored, or
    /// in place of the stored one when all keys are replaced.
    LastResortMissing,
    /// The device has been removed.
    DeviceGone,
}

/// What happens to the keys that are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// One-time keys stay, the oldest make room.
    Adding,
    /// All of them go, and the id of the signed prekey need not rise.
    Replacing,
}

#[derive(FromRow)]
struct Stored {
    signed_id: i32,
    signed_key: Vec<u8>,
    pq_last_resort_id: Option<i32>,
    pq_last_resort_key: Option<Vec<u8>>,
}

impl Store {
    /// Stores new keys of a device: the signed prekey and the last-resort key replace the stored ones, one-time keys are
    /// added. Of these the oldest make room when there are more than a device may have.
    ///
    /// A one-time key whose id is stored already changes nothing. One that was handed out before is left out. One that is
    /// stored under another id gets the new id.
    pub async fn refill(&self, no: DeviceNo, keys: &PreKeys) -> Result<Refilled> {
        self.upload(no, keys, Mode::Adding).await
    }

    /// Stores these keys in place of all that the device has.
    pub async fn replace_keys(&self, no: DeviceNo, keys: &PreKeys) -> Result<Refilled> {
        self.upload(no, keys, Mode::Replacing).await
    }

    async fn upload(&self, no: DeviceNo, keys: &PreKeys, mode: Mode) -> Result<Refilled> {
        let mut tx = self.begin_on(Rows::OfDevice(no)).await?;
        let refilled = match devices::lock_and_find_owner(&mut tx, no).await? {
            None => Refilled::DeviceGone,
            Some(user) => self.store_new(&mut tx, (user, no), keys, mode).await?,
        };
        tx.commit().await?;
        Ok(refilled)
    }

    async fn store_new(
        &self,
        tx: &mut Tx,
        (user, no): (UserId, DeviceNo),
        keys: &PreKeys,
        mode: Mode,
    ) -> Result<Refilled> {
        prekeys::lock(tx, user).await?;
        let stored: Option<Stored> = on!(tx, |db| sqlx::query_as(READ_STORED).bind(no).fetch_optional(db))?;
        let Some(stored) = stored else { return Ok(Refilled::DeviceGone) };
        let rows = prekeys::one_time_rows(keys);
        let known = StoredPrekeys::read(tx, user, keys, &rows).await?;
        let own = match mode {
            Mode::Adding => OwnPrekeys::kept(tx, no).await?,
            Mode::Replacing => OwnPrekeys::Replaced(no),
        };
        let mut lasting = prekeys::lasting_keys(keys);
        lasting.extend(stored.lasting_keys());
        let change = known.change(rows, &lasting, &own);
        if stored.has_signed(keys) {
            if stored.signed_id != keys.signed.id.0 {
                return Ok(Refilled::SignedKeyKnown);
            }
            let is_repeated = stored.has_last_resort(keys) && is_stored(tx, no, &change.added, mode).await?;
            return Ok(if is_repeated { Refilled::Stored } else { Refilled::SignedIdNotRising });
        }
        if let Some(refused) = stored.refusal(keys, mode, &known, &own) {
            return Ok(refused);
        }
        if is_signed_key_of_another(tx, user, no, keys).await? {
            return Ok(Refilled::SignedKeyKnown);
        }
        spent_prekeys::record(tx, &[(user, fingerprint(user, &stored.signed_key))]).await?;
        match mode {
            Mode::Adding => known_prekeys::delete(tx, &change.moved).await?,
            Mode::Replacing => {
                run!(tx, sqlx::query("DELETE FROM one_time_prekeys WHERE device_no = $1").bind(no))?;
            }
        }
        prekeys::replace(tx, no, keys).await?;
        prekeys::add_one_time(tx, no, &change.added).await?;
        prekeys::prune(tx, no, self.limits.max_prekeys).await?;
        Ok(Refilled::Stored)
    }
}

impl Stored {
    fn has_signed(&self, keys: &PreKeys) -> bool {
        self.signed_key == keys.signed.public_key.as_bytes()
    }

    /// True if the upload leaves the last-resort key as it is.
    fn has_last_resort(&self, keys: &PreKeys) -> bool {
        keys.pq_last_resort.as_ref().is_none_or(|key| {
            self.pq_last_resort_id == Some(key.id.get()) && self.is_last_resort(key.public_key.as_bytes())
        })
    }

    fn is_last_resort(&self, public_key: &[u8]) -> bool {
        self.pq_last_resort_key.as_deref() == Some(public_key)
    }

    /// The keys that every bundle may have carried.
    fn lasting_keys(&self) -> impl Iterator<Item = &[u8]> {
        self.pq_last_resort_key.as_deref().into_iter().chain([&self.signed_key[..]])
    }

    /// Why an upload with another signed prekey than the stored one is refused.
    fn refusal(&self, keys: &PreKeys, mode: Mode, known: &StoredPrekeys, own: &OwnPrekeys) -> Option<Refilled> {
        let is_one_time = |public_key: &[u8]| known.is_used(public_key) || known.is_one_time(public_key, own);
        if is_one_time(keys.signed.public_key.as_bytes()) {
            return Some(Refilled::SignedKeyKnown);
        }
        if mode == Mode::Adding && keys.signed.id.0 <= self.signed_id {
            return Some(Refilled::SignedIdNotRising);
        }
        let Some(last_resort) = &keys.pq_last_resort else {
            let has_pq = match mode {
                Mode::Adding => self.pq_last_resort_key.is_none() && !keys.pq_one_time.is_empty(),
                Mode::Replacing => self.pq_last_resort_key.is_some() || !keys.pq_one_time.is_empty(),
            };
            return has_pq.then_some(Refilled::LastResortMissing);
        };
        let public_key = last_resort.public_key.as_bytes();
        let is_renamed = self.is_last_resort(public_key) && self.pq_last_resort_id != Some(last_resort.id.get());
        (is_renamed || is_one_time(public_key)).then_some(Refilled::LastResortKnown)
    }
}

/// True if the stored one-time keys would stay as they are.
async fn is_stored(tx: &mut Tx, no: DeviceNo, rows: &[OneTimeRow<'_>], mode: Mode) -> Result<bool> {
    let statement = "SELECT kind, key_id, public_key FROM one_time_prekeys WHERE device_no = $1";
    let stored: Vec<(i32, i32, Vec<u8>)> = on!(tx, |db| sqlx::query_as(statement).bind(no).fetch_all(db))?;
    let stored: HashMap<(i32, i32), Vec<u8>> =
        stored.into_iter().map(|(kind, id, public_key)| ((kind, id), public_key)).collect();
    Ok(match mode {
        // An id that is stored keeps its key.
        Mode::Adding => rows.iter().all(|row| stored.contains_key(&(row.kind, row.id))),
        Mode::Replacing => {
            rows.len() == stored.len()
                && rows.iter().all(|row| stored.get(&(row.kind, row.id)).is_some_and(|key| key == row.public_key))
        }
    })
}

/// True if another device of the account has this signed prekey.
async fn is_signed_key_of_another(tx: &mut Tx, user: UserId, no: DeviceNo, keys: &PreKeys) -> Result<bool> {
    let statement = "SELECT count(*) FROM devices d JOIN device_keys k ON k.device_no = d.no \
                     WHERE d.user_id = $1 AND d.no <> $2 AND k.signed_key = $3";
    let key = &keys.signed.public_key.as_bytes()[..];
    let count: i64 = on!(tx, |db| sqlx::query_scalar(statement).bind(user).bind(no).bind(key).fetch_one(db))?;
    Ok(count > 0)
}

const READ_STORED: &str = "\
    SELECT signed_id, signed_key, pq_last_resort_id, pq_last_resort_key FROM device_keys WHERE device_no = $1";
