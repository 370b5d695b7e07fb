//! One-time prekeys while two transactions work on one account in PostgreSQL: whatever their order, a key is handed out at
//! most once. SQLite has one writer.

use futures_util::future::join;
use obscura_server::model::keys::{OneTimePreKey, PreKeys};
use obscura_server::store::{Bundle, Linked, Refilled, Removed, Store};

use super::fixture::{NOW, TestStore, grant};
use super::support::{
    Member, NONE, account, account_with, approved_link, count, linked, linked_with, new_device, new_link, one_time_key,
    prekeys, public_key,
};
use crate::harness::signer::Identity;
use crate::harness::{Database, HeldWrite, eventually};

/// From now on every transaction stops where it is about to insert a row into this table, until it is released.
async fn stop_before_insert(database: &Database, table: &str) -> HeldWrite {
    let gate = format!(
        "CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$;
         CREATE TRIGGER gate BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION gate()"
    );
    database.execute(&gate).await;
    database.hold("SELECT pg_advisory_xact_lock(1)").await
}

/// Waits until this number of transactions wait for a lock.
async fn until_waiting(database: &Database, number: i64) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("transactions to wait", async || database.number(waiting).await == number).await;
}

/// Begins the first, stops it before it inserts into `table`, begins the second, and lets both go on once that waits too.
async fn beside<A, B>(
    store: &TestStore,
    table: &str,
    first: impl Future<Output = A>,
    second: impl Future<Output = B>,
) -> (A, B) {
    let database = store.database().await;
    let held = stop_before_insert(&database, table).await;
    let second = async {
        until_waiting(&database, 1).await;
        let release = async {
            until_waiting(&database, 2).await;
            held.release().await;
        };
        join(second, release).await.0
    };
    let answers = join(first, second).await;
    database.execute(&format!("DROP TRIGGER gate ON {table}; DROP FUNCTION gate")).await;
    answers
}

/// The bundles of all devices of the account.
async fn bundles(store: &Store, of: &Member) -> Vec<Bundle> {
    store.bundles(of.user, None, 0).await.unwrap().unwrap().bundles
}

/// The one-time prekeys that were handed out, in bundles and whatever is left.
async fn handed_out(store: &Store, of: &Member, bundles: impl IntoIterator<Item = Bundle>) -> Vec<OneTimePreKey> {
    let mut keys: Vec<_> = bundles.into_iter().filter_map(|bundle| bundle.one_time).collect();
    for _ in 0..3 {
        keys.extend(self::bundles(store, of).await.into_iter().filter_map(|bundle| bundle.one_time));
    }
    keys
}

/// New keys with this one-time key among them.
fn with_key(member: &Member, signed: i32, key: &OneTimePreKey) -> PreKeys {
    PreKeys { one_time: vec![key.clone()], ..member.keys(signed, NONE) }
}

/// An account whose device has this one-time key.
async fn account_with_key(store: &Store, key: &OneTimePreKey) -> (Member, PreKeys) {
    let seed = rand::random();
    let keys = PreKeys { one_time: vec![key.clone()], ..prekeys(&Identity::from_seed(seed), 1, NONE) };
    (account_with(store, seed, keys.clone()).await, keys)
}

#[tokio::test]
async fn a_reset_with_the_same_keys_stores_none_that_is_being_handed_out() {
    let store = TestStore::open_in_postgres().await;
    let key = one_time_key(1);
    let (alice, keys) = account_with_key(&store, &key).await;
    let (identity, device, session) = (public_key(&alice.identity()), new_device(keys), grant(NOW));
    let reset = store.reset(alice.user, &identity, &device, &session);
    let (given, reset) = beside(&store, "spent_prekeys", bundles(&store, &alice), reset).await;
    reset.unwrap();
    assert_eq!(handed_out(&store, &alice, given).await, [key]);
}

#[tokio::test]
async fn a_key_that_is_handed_out_beside_the_removal_of_its_device_is_not_stored_again() {
    let store = TestStore::open_in_postgres().await;
    let (alice, key) = (account(&store).await, one_time_key(1));
    let second = linked_with(&store, &alice, with_key(&alice, 1, &key)).await;
    let removal = store.remove_device(alice.user, second.device);
    let (given, removed) = beside(&store, "spent_prekeys", bundles(&store, &alice), removal).await;
    assert_eq!(removed.unwrap(), Removed::Device(second.no));
    assert_eq!(store.refill(alice.no, &with_key(&alice, 2, &key)).await.unwrap(), Refilled::Stored);
    assert_eq!(handed_out(&store, &alice, given).await, [key]);
}

#[tokio::test]
async fn of_uploads_of_one_key_by_two_devices_at_once_one_is_stored() {
    let store = TestStore::open_in_postgres().await;
    let (alice, key) = (account(&store).await, one_time_key(1));
    let second = linked(&store, &alice).await;
    let (of_first, of_second) = (with_key(&alice, 2, &key), with_key(&alice, 2, &key));
    let uploads = (store.refill(alice.no, &of_first), store.replace_keys(second.no, &of_second));
    let (one, other) = beside(&store, "one_time_prekeys", uploads.0, uploads.1).await;
    assert_eq!((one.unwrap(), other.unwrap()), (Refilled::Stored, Refilled::Stored));
    assert_eq!(count(&store, "one_time_prekeys").await, 1);
    assert_eq!(handed_out(&store, &alice, []).await, [key]);
}

#[tokio::test]
async fn a_new_device_and_an_upload_at_once_store_one_key_once() {
    for joins_first in [true, false] {
        let store = TestStore::open_in_postgres().await;
        let (alice, key) = (account(&store).await, one_time_key(1));
        let hash = approved_link(&store, &alice).await;
        let (link, keys) = (new_link(hash, &alice.identity(), with_key(&alice, 1, &key)), with_key(&alice, 2, &key));
        let (join, upload) = (store.link_device(&link, NOW), store.refill(alice.no, &keys));
        let (joined, stored) = if joins_first {
            beside(&store, "one_time_prekeys", join, upload).await
        } else {
            let (stored, joined) = beside(&store, "one_time_prekeys", upload, join).await;
            (joined, stored)
        };
        assert!(matches!(joined.unwrap(), Linked::Device { .. }));
        assert_eq!(stored.unwrap(), Refilled::Stored);
        assert_eq!(count(&store, "one_time_prekeys").await, 1);
        assert_eq!(handed_out(&store, &alice, []).await, [key]);
    }
}

/// A node of the former version has stored the key on both.
#[tokio::test]
async fn of_hand_outs_of_one_key_from_two_devices_at_once_one_succeeds() {
    let store = TestStore::open_in_postgres().await;
    let key = one_time_key(1);
    let (alice, _) = account_with_key(&store, &key).await;
    let second = linked(&store, &alice).await;
    let copy = format!(
        "INSERT INTO one_time_prekeys (device_no, kind, key_id, public_key)
         SELECT {}, kind, key_id, public_key FROM one_time_prekeys",
        second.no.0
    );
    store.database().await.execute(&copy).await;
    let of_first = store.bundles(alice.user, Some(alice.device), 0);
    let of_second = store.bundles(alice.user, Some(second.device), 0);
    let (one, other) = beside(&store, "spent_prekeys", of_first, of_second).await;
    let given = [one, other].into_iter().flat_map(|answer| answer.unwrap().unwrap().bundles);
    assert_eq!(handed_out(&store, &alice, given).await, [key]);
}
