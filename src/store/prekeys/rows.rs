//! One-time prekeys as rows: those of an upload, and how they are added and pruned.

use sqlx::{QueryBuilder, Sqlite};

use crate::model::ids::DeviceNo;
use crate::model::keys::PreKeys;
use crate::store::Result;
use crate::store::database::{Tx, run};
use crate::store::prekeys::{EC, PQ};

/// One-time prekeys stored by one statement: five parameters each, of the 32766 that SQLite takes.
const ROWS_PER_STATEMENT: usize = 1000;

/// Keeps the newest $3 of a kind.
const PRUNE: &str = "\
    DELETE FROM one_time_prekeys WHERE device_no = $1 AND kind = $2 AND no <= ( \
        SELECT no FROM one_time_prekeys WHERE device_no = $1 AND kind = $2 ORDER BY no DESC LIMIT 1 OFFSET $3)";

/// A one-time key as a row.
#[derive(Clone, Copy)]
pub(in crate::store) struct OneTimeRow<'a> {
    /// [`EC`] or [`PQ`].
    pub(in crate::store) kind: i32,
    pub(in crate::store) id: i32,
    /// With its type byte.
    pub(in crate::store) public_key: &'a [u8],
    /// Of post-quantum keys only.
    pub(in crate::store) signature: Option<&'a [u8]>,
}

/// The one-time keys of an upload, in their order.
pub(in crate::store) fn one_time_rows(keys: &PreKeys) -> Vec<OneTimeRow<'_>> {
    let ec = keys.one_time.iter().map(|key| OneTimeRow {
        kind: EC,
        id: key.id.0,
        public_key: key.public_key.as_bytes(),
        signature: None,
    });
    let pq = keys.pq_one_time.iter().map(|key| OneTimeRow {
        kind: PQ,
        id: key.id.get(),
        public_key: key.public_key.as_bytes(),
        signature: Some(key.signature.as_bytes()),
    });
    ec.chain(pq).collect()
}

/// The keys of an upload that every bundle may carry.
pub(in crate::store) fn lasting_keys(keys: &PreKeys) -> Vec<&[u8]> {
    let last_resort = keys.pq_last_resort.iter().map(|key| &key.public_key.as_bytes()[..]);
    last_resort.chain([&keys.signed.public_key.as_bytes()[..]]).collect()
}

/// Adds one-time keys in their order, without those whose ids are stored already.
pub(in crate::store) async fn add_one_time(tx: &mut Tx, no: DeviceNo, rows: &[OneTimeRow<'_>]) -> Result<()> {
    for rows in rows.chunks(ROWS_PER_STATEMENT) {
        match tx {
            Tx::Sqlite(tx) => {
                let mut statement = QueryBuilder::<Sqlite>::new(
                    "INSERT INTO one_time_prekeys (device_no, kind, key_id, public_key, signature) ",
                );
                statement.push_values(rows, |mut row, key| {
                    row.push_bind(no).push_bind(key.kind).push_bind(key.id);
                    row.push_bind(key.public_key).push_bind(key.signature);
                });
                statement.push(" ON CONFLICT (device_no, kind, key_id) DO NOTHING");
                // Hardly two uploads have the same number of keys, so these would fill the cache of statements.
                statement.build().persistent(false).execute(&mut **tx).await?;
            }
            Tx::Postgres(tx) => {
                let column = |of: fn(&OneTimeRow<'_>) -> i32| rows.iter().map(of).collect::<Vec<i32>>();
                let public_keys: Vec<&[u8]> = rows.iter().map(|row| row.public_key).collect();
                let signatures: Vec<Option<&[u8]>> = rows.iter().map(|row| row.signature).collect();
                let insert = sqlx::query(ADD_KEYS_IN_POSTGRES)
                    .bind(no)
                    .bind(column(|row| row.kind))
                    .bind(column(|row| row.id))
                    .bind(public_keys)
                    .bind(signatures);
                tx.run(insert).await?;
            }
        }
    }
    Ok(())
}

/// The numbers are given in the order of the arrays.
const ADD_KEYS_IN_POSTGRES: &str = "\
    INSERT INTO one_time_prekeys (device_no, kind, key_id, public_key, signature) \
    SELECT $1, kind, key_id, public_key, signature \
    FROM unnest($2::int[], $3::int[], $4::bytea[], $5::bytea[]) \
         WITH ORDINALITY AS keys (kind, key_id, public_key, signature, place) \
    ORDER BY place ON CONFLICT (device_no, kind, key_id) DO NOTHING";

/// Drops the oldest one-time keys of each kind beyond `max`.
pub(in crate::store) async fn prune(tx: &mut Tx, no: DeviceNo, max: u32) -> Result<()> {
    for kind in [EC, PQ] {
        run!(tx, sqlx::query(PRUNE).bind(no).bind(kind).bind(i64::from(max)))?;
    }
    Ok(())
}
