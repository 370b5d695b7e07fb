//! What is remembered of used prekeys, so that none is stored and handed out again.
//!
//! A one-time prekey is recorded in the transaction that hands it out, a signed one in the transaction that replaces it or
//! removes its device: each bundle that was fetched contains a signed prekey with the identity key's signature, so another
//! client can upload it again. Records belong to the account and live as long as it does, whatever happens to its devices. So
//! no removal or reset has to move them, and of two hand-outs of one key at once only one can insert its record.
//!
//! A record is 8 bytes. A match by chance is as good as impossible among the keys of one account, and an account that makes a
//! match on purpose harms only itself. Hand-outs and uploads are limited for each account, and so is the growth: some 125
//! bytes of PostgreSQL or 35 of SQLite for each used key.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use crate::model::ids::{DeviceNo, UserId};
use crate::store::database::{Tx, on, run};
use crate::store::{Result, json_list};

/// Records that one transaction forgets. An account that was used for years has some million.
pub(super) const FORGOTTEN_AT_ONCE: u32 = 10_000;

/// The first 8 bytes of SHA-256 over the account's id and the public key with its type byte.
pub(super) type Fingerprint = [u8; 8];

/// The fingerprint of a public key of this account. [`super::prekeys`] computes the same in SQL for PostgreSQL.
pub(super) fn fingerprint(user: UserId, public_key: &[u8]) -> Fingerprint {
    let hash: [u8; 32] = Sha256::new().chain_update(user.as_bytes()).chain_update(public_key).finalize().into();
    let (first, _) = hash.split_first_chunk().expect("32 bytes begin with 8");
    *first
}

/// Remembers that these keys of these accounts were used. Returns those that were not remembered before.
pub(super) async fn record(tx: &mut Tx, used: &[(UserId, Fingerprint)]) -> Result<HashSet<(UserId, Fingerprint)>> {
    if used.is_empty() {
        return Ok(HashSet::new());
    }
    let recorded: Vec<(UserId, Vec<u8>)> = match tx {
        Tx::Sqlite(tx) => {
            let offsets = json_list((0..used.len()).map(|n| n * 24 + 1));
            let mut rows = Vec::with_capacity(used.len() * 24);
            for (user, fingerprint) in used {
                rows.extend_from_slice(user.as_bytes());
                rows.extend_from_slice(fingerprint);
            }
            let statement = "\
                INSERT INTO spent_prekeys (user_id, fingerprint) \
                SELECT substr($2, value, 16), substr($2, value + 16, 8) FROM json_each($1) WHERE true \
                ON CONFLICT DO NOTHING RETURNING user_id, fingerprint";
            sqlx::query_as(statement).bind(offsets).bind(rows).fetch_all(&mut **tx).await?
        }
        Tx::Postgres(tx) => {
            let users: Vec<UserId> = used.iter().map(|(user, _)| *user).collect();
            let fingerprints: Vec<&[u8]> = used.iter().map(|(_, fingerprint)| &fingerprint[..]).collect();
            // In one order everywhere, since an insert waits for another one of the same record.
            let statement = "\
                INSERT INTO spent_prekeys (user_id, fingerprint) \
                SELECT user_id, fingerprint FROM unnest($1::uuid[], $2::bytea[]) AS used (user_id, fingerprint) \
                ORDER BY user_id, fingerprint ON CONFLICT DO NOTHING RETURNING user_id, fingerprint";
            tx.all(sqlx::query_as(statement).bind(users).bind(fingerprints)).await?
        }
    };
    Ok(recorded.into_iter().filter_map(|(user, fingerprint)| Some((user, fingerprint.try_into().ok()?))).collect())
}

/// Those of these fingerprints whose keys the account has used.
pub(super) async fn find(tx: &mut Tx, user: UserId, asked: &[Fingerprint]) -> Result<HashSet<Fingerprint>> {
    let found: Vec<(Vec<u8>,)> = match tx {
        Tx::Sqlite(tx) => {
            let statement = "\
                SELECT u.fingerprint FROM json_each($1) asked CROSS JOIN spent_prekeys u \
                WHERE u.user_id = $3 AND u.fingerprint = substr($2, asked.value, 8)";
            let offsets = json_list((0..asked.len()).map(|n| n * 8 + 1));
            let find = sqlx::query_as(statement).bind(offsets).bind(asked.concat()).bind(user);
            find.fetch_all(&mut **tx).await?
        }
        Tx::Postgres(tx) => {
            let statement = "SELECT fingerprint FROM spent_prekeys WHERE user_id = $1 AND fingerprint = ANY($2)";
            let asked: Vec<&[u8]> = asked.iter().map(|fingerprint| &fingerprint[..]).collect();
            tx.all(sqlx::query_as(statement).bind(user).bind(asked)).await?
        }
    };
    Ok(found.into_iter().filter_map(|(fingerprint,)| fingerprint.try_into().ok()).collect())
}

/// Remembers the signed prekeys of devices of the account that are locked and about to be removed: of this one, or of all.
pub(super) async fn record_signed(tx: &mut Tx, user: UserId, device: Option<DeviceNo>) -> Result<()> {
    let statement = "\
        SELECT k.signed_key FROM devices d JOIN device_keys k ON k.device_no = d.no \
        WHERE d.user_id = $1 AND ($2 IS NULL OR d.no = $2)";
    let signed: Vec<Vec<u8>> = on!(tx, |db| sqlx::query_scalar(statement).bind(user).bind(device).fetch_all(db))?;
    let signed: Vec<_> = signed.iter().map(|key| (user, fingerprint(user, key))).collect();
    record(tx, &signed).await?;
    Ok(())
}

/// Forgets records of an account that is gone, at most [`FORGOTTEN_AT_ONCE`]. Returns how many.
pub(super) async fn forget(tx: &mut Tx, user: UserId) -> Result<u64> {
    let statement = "\
        DELETE FROM spent_prekeys WHERE user_id = $1 \
        AND fingerprint IN (SELECT fingerprint FROM spent_prekeys WHERE user_id = $1 LIMIT $2)";
    run!(tx, sqlx::query(statement).bind(user).bind(i64::from(FORGOTTEN_AT_ONCE)))
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
