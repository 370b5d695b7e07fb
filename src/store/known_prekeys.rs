//! What an account has already of the keys of an upload, so that no one-time prekey is stored twice.
//!
//! A public key is stored once for the whole account, whatever ids it is uploaded under. If one
//! device uploads it under two ids, the newer id stays: the client certainly knows that one.

use std::collections::{HashMap, HashSet};

use sqlx::FromRow;

use crate::model::ids::{DeviceNo, UserId};
use crate::model::keys::PreKeys;
use crate::store::database::{Tx, on};
use crate::store::prekeys::{EC, OneTimeRow, PQ};
use crate::store::spent_prekeys::{self, Fingerprint, fingerprint};
use crate::store::{Result, json_list};

/// What an account has of the keys of one upload.
pub(super) struct StoredPrekeys {
    user: UserId,
    used: HashSet<Fingerprint>,
    /// The stored one-time keys that are also in the upload, by their public key.
    stored: HashMap<Vec<u8>, Vec<Stored>>,
}

#[derive(FromRow)]
struct Stored {
    no: i64,
    device_no: DeviceNo,
    key_id: i32,
    public_key: Vec<u8>,
}

/// What becomes of the one-time keys that the device of an upload has.
pub(super) enum OwnPrekeys {
    /// They stay. These are their kinds and ids.
    Kept(DeviceNo, HashSet<(i32, i32)>),
    /// They are deleted before the new ones are stored, or there are none.
    Replaced(DeviceNo),
}

/// What an upload changes of the stored one-time keys.
#[derive(Default)]
pub(super) struct PrekeyChange<'a> {
    /// To be added. A key whose id is stored already may be among them, and is not stored.
    pub(super) added: Vec<OneTimeRow<'a>>,
    /// To be deleted before that: the numbers of rows with keys that are added under another id.
    pub(super) moved: Vec<i64>,
}

impl OwnPrekeys {
    /// The one-time keys of this device stay.
    pub(super) async fn kept(tx: &mut Tx, no: DeviceNo) -> Result<Self> {
        let statement = "SELECT kind, key_id FROM one_time_prekeys WHERE device_no = $1";
        let ids: Vec<(i32, i32)> = on!(tx, |db| sqlx::query_as(statement).bind(no).fetch_all(db))?;
        Ok(Self::Kept(no, ids.into_iter().collect()))
    }
}

impl StoredPrekeys {
    /// Looks for the keys of the upload among those that the account's devices have, and those that the account has used. The
    /// account's keys are locked ([`crate::store::prekeys::lock`]).
    pub(super) async fn read(tx: &mut Tx, user: UserId, keys: &PreKeys, rows: &[OneTimeRow<'_>]) -> Result<Self> {
        let one_time = |kind| rows.iter().filter(move |row| row.kind == kind).map(|row| row.public_key);
        let ec: Vec<&[u8]> = one_time(EC).chain([&keys.signed.public_key.as_bytes()[..]]).collect();
        let last_resort = keys.pq_last_resort.iter().map(|key| &key.public_key.as_bytes()[..]);
        let pq: Vec<&[u8]> = one_time(PQ).chain(last_resort).collect();
        let fingerprints: Vec<Fingerprint> = ec.iter().chain(&pq).map(|key| fingerprint(user, key)).collect();
        let mut stored: HashMap<Vec<u8>, Vec<Stored>> = HashMap::new();
        for (kind, keys) in [(EC, ec), (PQ, pq)] {
            for found in stored_among(tx, user, kind, &keys).await? {
                stored.entry(found.public_key.clone()).or_default().push(found);
            }
        }
        // Behind the stored ones: a device that has joined a moment ago is not locked. A key of it that is handed out in
        // between is recorded then, and was stored before.
        let used = spent_prekeys::find(tx, user, &fingerprints).await?;
        Ok(Self { user, used, stored })
    }

    /// True if the account has used this key.
    pub(super) fn is_used(&self, public_key: &[u8]) -> bool {
        self.used.contains(&fingerprint(self.user, public_key))
    }

    /// True if this key is a one-time key of the account that stays.
    pub(super) fn is_one_time(&self, public_key: &[u8], own: &OwnPrekeys) -> bool {
        self.kept(public_key, own).next().is_some()
    }

    fn kept<'a>(&'a self, public_key: &[u8], own: &'a OwnPrekeys) -> impl Iterator<Item = &'a Stored> {
        let stored = self.stored.get(public_key).map_or(&[][..], Vec::as_slice);
        stored.iter().filter(move |stored| !matches!(own, OwnPrekeys::Replaced(no) if *no == stored.device_no))
    }

    /// What is to be stored of the one-time keys of the upload. Left out are keys that were used, keys that come twice, those
    /// of another device, and those among `lasting`, which are handed out all the time.
    pub(super) fn change<'a>(
        &self,
        rows: Vec<OneTimeRow<'a>>,
        lasting: &[&'a [u8]],
        own: &OwnPrekeys,
    ) -> PrekeyChange<'a> {
        let mut change = PrekeyChange::default();
        let mut seen: HashSet<&[u8]> = lasting.iter().copied().collect();
        for row in rows {
            if !self.is_used(row.public_key) && seen.insert(row.public_key) {
                self.change_one(row, own, &mut change);
            }
        }
        change
    }

    fn change_one<'a>(&self, row: OneTimeRow<'a>, own: &OwnPrekeys, change: &mut PrekeyChange<'a>) {
        let copies: Vec<&Stored> = self.kept(row.public_key, own).collect();
        if let OwnPrekeys::Kept(no, ids) = own {
            if copies.iter().any(|copy| copy.device_no != *no) {
                return;
            }
            // An id that is stored keeps its key, so a key that is stored under another one keeps that.
            let keeps_another = ids.contains(&(row.kind, row.id)) && copies.iter().all(|copy| copy.key_id != row.id);
            if keeps_another && !copies.is_empty() {
                return;
            }
            change.moved.extend(copies.iter().filter(|copy| copy.key_id != row.id).map(|copy| copy.no));
        } else if !copies.is_empty() {
            return;
        }
        change.added.push(row);
    }
}

/// The one-time keys of this kind, of all devices of the account, that are among `keys`. These have one length.
async fn stored_among(tx: &mut Tx, user: UserId, kind: i32, keys: &[&[u8]]) -> Result<Vec<Stored>> {
    let Some(length) = keys.first().map(|key| key.len()) else { return Ok(Vec::new()) };
    match tx {
        Tx::Sqlite(tx) => {
            let statement = "\
                SELECT o.no, o.device_no, o.key_id, o.public_key FROM devices d CROSS JOIN one_time_prekeys o \
                WHERE d.user_id = $1 AND o.device_no = d.no AND o.kind = $2 \
                AND o.public_key IN (SELECT substr($4, value, $5) FROM json_each($3))";
            let offsets = json_list((0..keys.len()).map(|n| n * length + 1));
            let length = i64::try_from(length).unwrap_or(i64::MAX);
            let find = sqlx::query_as(statement).bind(user).bind(kind).bind(offsets).bind(keys.concat()).bind(length);
            Ok(find.fetch_all(&mut **tx).await?)
        }
        Tx::Postgres(tx) => {
            let statement = "\
                SELECT o.no, o.device_no, o.key_id, o.public_key FROM devices d JOIN one_time_prekeys o ON o.device_no = d.no \
                WHERE d.user_id = $1 AND o.kind = $2 AND o.public_key = ANY($3)";
            tx.all(sqlx::query_as(statement).bind(user).bind(kind).bind(keys)).await
        }
    }
}

/// Deletes these one-time keys, by the numbers of their rows.
pub(super) async fn delete(tx: &mut Tx, nos: &[i64]) -> Result<()> {
    if nos.is_empty() {
        return Ok(());
    }
    match tx {
        Tx::Sqlite(tx) => {
            let statement = "DELETE FROM one_time_prekeys WHERE no IN (SELECT value FROM json_each($1))";
            sqlx::query(statement).bind(json_list(nos.iter())).execute(&mut **tx).await?;
        }
        Tx::Postgres(tx) => {
            tx.run(sqlx::query("DELETE FROM one_time_prekeys WHERE no = ANY($1)").bind(nos)).await?;
        }
    }
    Ok(())
}
