//! What is remembered of used prekeys, so that none is stored and handed out again.
//!
//! A one-time prekey is recorded in the transaction that hands it out, a signed one in the transaction that replaces it or
//! removes its device. Records live as long as their device. Those of a linked device that is removed go to the primary
//! device: each bundle that was fetched contains a signed prekey with the identity key's signature, so another client can
//! upload it again. For the same reason the records outlive a reset that keeps the identity key.
//!
//! A record is 8 bytes. A match by chance is as good as impossible among the keys of one account, and an account that makes a
//! match on purpose harms only itself. Hand-outs and uploads are limited for each account, and so is the growth: some 80 bytes
//! for each used key.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use crate::model::ids::{DeviceNo, UserId};
use crate::store::database::{Tx, on, run};
use crate::store::{Result, json_list};

/// The first 8 bytes of SHA-256 over the account's id and the public key with its type byte.
pub(super) type Fingerprint = [u8; 8];

/// The fingerprint of a public key of this account. [`super::prekeys`] computes the same in SQL for PostgreSQL.
pub(super) fn fingerprint(user: UserId, public_key: &[u8]) -> Fingerprint {
    let hash: [u8; 32] = Sha256::new().chain_update(user.as_bytes()).chain_update(public_key).finalize().into();
    let (first, _) = hash.split_first_chunk().expect("32 bytes begin with 8");
    *first
}

/// Remembers that these keys of these devices were used. Returns those that were not remembered before.
pub(super) async fn record(tx: &mut Tx, used: &[(DeviceNo, Fingerprint)]) -> Result<HashSet<(DeviceNo, Fingerprint)>> {
    if used.is_empty() {
        return Ok(HashSet::new());
    }
    let fingerprints: Vec<u8> = used.iter().flat_map(|(_, fingerprint)| *fingerprint).collect();
    let recorded: Vec<(DeviceNo, Vec<u8>)> = match tx {
        Tx::Sqlite(tx) => {
            let devices = json_list(used.iter().map(|(no, _)| no.0));
            let statement = "\
                INSERT INTO used_prekeys (device_no, fingerprint) \
                SELECT value, substr($2, key * 8 + 1, 8) FROM json_each($1) WHERE true ON CONFLICT DO NOTHING \
                RETURNING device_no, fingerprint";
            sqlx::query_as(statement).bind(devices).bind(fingerprints).fetch_all(&mut **tx).await?
        }
        Tx::Postgres(tx) => {
            let devices: Vec<i64> = used.iter().map(|(no, _)| no.0).collect();
            let statement = "\
                INSERT INTO used_prekeys (device_no, fingerprint) \
                SELECT no, substr($2, (place::int - 1) * 8 + 1, 8) \
                FROM unnest($1::bigint[]) WITH ORDINALITY AS used (no, place) ON CONFLICT DO NOTHING \
                RETURNING device_no, fingerprint";
            tx.all(sqlx::query_as(statement).bind(devices).bind(fingerprints)).await?
        }
    };
    Ok(recorded.into_iter().filter_map(|(no, fingerprint)| Some((no, fingerprint.try_into().ok()?))).collect())
}

/// Those of these fingerprints whose keys a device of the account has used.
pub(super) async fn among(tx: &mut Tx, user: UserId, asked: &[Fingerprint]) -> Result<HashSet<Fingerprint>> {
    let found: Vec<(Vec<u8>,)> = match tx {
        Tx::Sqlite(tx) => {
            let statement = "\
                SELECT u.fingerprint FROM json_each($1) asked CROSS JOIN devices d CROSS JOIN used_prekeys u \
                WHERE d.user_id = $3 AND u.device_no = d.no AND u.fingerprint = substr($2, asked.value, 8)";
            let offsets = json_list((0..asked.len()).map(|n| n * 8 + 1));
            let find = sqlx::query_as(statement).bind(offsets).bind(asked.concat()).bind(user);
            find.fetch_all(&mut **tx).await?
        }
        Tx::Postgres(tx) => {
            let statement = "\
                SELECT u.fingerprint FROM devices d JOIN used_prekeys u ON u.device_no = d.no \
                WHERE d.user_id = $1 AND u.fingerprint = ANY($2)";
            let asked: Vec<&[u8]> = asked.iter().map(|fingerprint| &fingerprint[..]).collect();
            tx.all(sqlx::query_as(statement).bind(user).bind(asked)).await?
        }
    };
    Ok(found.into_iter().filter_map(|(fingerprint,)| fingerprint.try_into().ok()).collect())
}

/// Lets the primary device remember the used prekeys of another device of the account, which is locked and about to be
/// removed, and its signed prekey.
pub(super) async fn leave_to_primary(tx: &mut Tx, user: UserId, no: DeviceNo) -> Result<()> {
    let statement = "\
        INSERT INTO used_prekeys (device_no, fingerprint) \
        SELECT d.no, u.fingerprint FROM used_prekeys u JOIN devices d ON d.user_id = $2 AND d.is_primary \
        WHERE u.device_no = $1 ON CONFLICT DO NOTHING";
    run!(tx, sqlx::query(statement).bind(no).bind(user))?;
    let statement = "\
        SELECT d.no, k.signed_key FROM device_keys k JOIN devices d ON d.user_id = $2 AND d.is_primary WHERE k.device_no = $1";
    let signed: Vec<(DeviceNo, Vec<u8>)> = on!(tx, |db| sqlx::query_as(statement).bind(no).bind(user).fetch_all(db))?;
    let signed: Vec<_> = signed.iter().map(|(primary, key)| (*primary, fingerprint(user, key))).collect();
    record(tx, &signed).await?;
    Ok(())
}

/// All used prekeys of an account whose devices are locked and about to be removed, and their signed prekeys.
pub(super) async fn of_account(tx: &mut Tx, user: UserId) -> Result<Vec<Fingerprint>> {
    let statement =
        "SELECT u.fingerprint FROM devices d JOIN used_prekeys u ON u.device_no = d.no WHERE d.user_id = $1";
    let used: Vec<Vec<u8>> = on!(tx, |db| sqlx::query_scalar(statement).bind(user).fetch_all(db))?;
    let statement = "SELECT k.signed_key FROM devices d JOIN device_keys k ON k.device_no = d.no WHERE d.user_id = $1";
    let signed: Vec<Vec<u8>> = on!(tx, |db| sqlx::query_scalar(statement).bind(user).fetch_all(db))?;
    let used = used.into_iter().filter_map(|fingerprint| fingerprint.try_into().ok());
    Ok(used.chain(signed.iter().map(|key| fingerprint(user, key))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_of_one_account_and_one_key() {
        let (user, other) = (UserId::random(), UserId::random());
        assert_eq!(fingerprint(user, b"key"), fingerprint(user, b"key"));
        assert_ne!(fingerprint(user, b"key"), fingerprint(other, b"key"));
        assert_ne!(fingerprint(user, b"key"), fingerprint(user, b"kez"));
    }
}
