//! Prekeys in the store.

use std::collections::HashSet;

use obscura_server::model::ids::{Address, DeviceId, DeviceNo, UserId};
use obscura_server::model::keys::{KeyId, PreKeys};
use obscura_server::store::{Bundle, HandedOut, PrekeyCounts, Refilled, Store};
use tokio::task::JoinSet;

use super::fixture::{NOW, TestStore, grant};
use super::support::{
    Member, NONE, account, account_with, count, linked, linked_with, new_device, one_time_key, pq_key, prekeys,
    public_key,
};
use crate::harness::signer::Identity;

/// Nobody is low.
const NEVER: u32 = 0;

async fn hand_out(store: &Store, user: UserId) -> HandedOut {
    store.bundles(user, None, NEVER).await.unwrap().unwrap()
}

/// The stock of a device that is there.
async fn counts(store: &Store, device: &Member) -> PrekeyCounts {
    store.prekey_counts(device.no).await.unwrap().unwrap()
}

/// The only bundle of an account with one device.
async fn only_bundle(store: &Store, user: UserId) -> Bundle {
    let mut handed_out = hand_out(store, user).await;
    assert_eq!(handed_out.bundles.len(), 1);
    handed_out.bundles.remove(0)
}

fn one_time_ids(handed_out: &HandedOut) -> Vec<Option<i32>> {
    handed_out.bundles.iter().map(|bundle| bundle.one_time.as_ref().map(|key| key.id.0)).collect()
}

fn pq_ids(handed_out: &HandedOut) -> Vec<Option<i32>> {
    handed_out.bundles.iter().map(|bundle| bundle.pq.as_ref().map(|key| key.id.get())).collect()
}

/// The ids of the elliptic-curve one-time prekeys that are stored, oldest first. Hands them all out.
async fn drain(store: &Store, user: UserId) -> Vec<i32> {
    let mut ids = Vec::new();
    while let Some(key) = only_bundle(store, user).await.one_time {
        ids.push(key.id.0);
    }
    ids
}

/// Keys with Kyber keys among them: the last-resort key 1000 and one-time keys with the other ids.
fn with_pq(seed: u64, mut keys: PreKeys, ids: impl IntoIterator<Item = i32>) -> PreKeys {
    let identity = Identity::from_seed(seed);
    keys.pq_last_resort = Some(pq_key(&identity, 1000));
    keys.pq_one_time = ids.into_iter().map(|id| pq_key(&identity, id)).collect();
    keys
}

async fn pq_account(store: &Store, one_time: std::ops::RangeInclusive<i32>, pq: &[i32]) -> (Member, PreKeys) {
    let seed = rand::random();
    let keys = with_pq(seed, prekeys(&Identity::from_seed(seed), 1, one_time), pq.iter().copied());
    (account_with(store, seed, keys.clone()).await, keys)
}

#[tokio::test]
async fn a_bundle_holds_what_was_uploaded() {
    let store = TestStore::open().await;
    let (alice, keys) = pq_account(&store, 7..=7, &[8]).await;
    let bundle = only_bundle(&store, alice.user).await;
    assert_eq!((bundle.device, bundle.registration_id.0), (alice.device, 4711));
    assert_eq!(bundle.identity, public_key(&alice.identity()));
    assert_eq!(bundle.signed, keys.signed);
    assert_eq!(bundle.one_time.as_ref(), keys.one_time.first());
    assert_eq!(bundle.pq.as_ref(), keys.pq_one_time.first());
}

#[tokio::test]
async fn one_time_prekeys_go_oldest_first_and_then_there_are_none() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let mut keys = alice.keys(2, NONE);
    keys.one_time = [30, -5, 12].map(one_time_key).into();
    assert_eq!(store.refill(alice.no, &keys).await.unwrap(), Refilled::Stored);
    assert_eq!(drain(&store, alice.user).await, [30, -5, 12]);
    assert_eq!(one_time_ids(&hand_out(&store, alice.user).await), [None]);
}

#[tokio::test]
async fn the_last_resort_key_is_given_again_and_again_once_the_others_are_gone() {
    let store = TestStore::open().await;
    let (alice, keys) = pq_account(&store, NONE, &[3, 4]).await;
    for expected in [3, 4, 1000, 1000, 1000] {
        assert_eq!(pq_ids(&hand_out(&store, alice.user).await), [Some(expected)]);
    }
    assert_eq!(only_bundle(&store, alice.user).await.pq, keys.pq_last_resort);
}

#[tokio::test]
async fn a_device_without_kyber_keys_has_none_in_its_bundle() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    assert_eq!(pq_ids(&hand_out(&store, alice.user).await), [None]);
}

#[tokio::test]
async fn all_devices_come_oldest_first_and_each_spends_a_key_of_its_own() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=2)).await.unwrap();
    let second = linked_with(&store, &alice, alice.keys(1, 11..=11)).await;
    let third = linked(&store, &alice).await;
    let devices =
        |handed_out: &HandedOut| -> Vec<DeviceId> { handed_out.bundles.iter().map(|bundle| bundle.device).collect() };

    let first_time = hand_out(&store, alice.user).await;
    assert_eq!(devices(&first_time), [alice.device, second.device, third.device]);
    assert_eq!(one_time_ids(&first_time), [Some(1), Some(11), None]);
    assert_eq!(one_time_ids(&hand_out(&store, alice.user).await), [Some(2), None, None]);
}

#[tokio::test]
async fn one_device_can_be_asked_for_and_only_its_key_is_spent() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=2)).await.unwrap();
    let second = linked_with(&store, &alice, alice.keys(1, 11..=12)).await;
    let handed_out = store.bundles(alice.user, Some(second.device), NEVER).await.unwrap().unwrap();
    assert_eq!(handed_out.bundles.len(), 1);
    assert_eq!(handed_out.bundles[0].device, second.device);
    assert_eq!(one_time_ids(&handed_out), [Some(11)]);
    assert_eq!(counts(&store, &alice).await.ec, 2);
    assert_eq!(counts(&store, &second).await.ec, 1);
}

#[tokio::test]
async fn lasting_bundles_spend_nothing_and_tell_which_devices_are_low() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=2)).await.unwrap();
    let lasting = store.lasting_bundles(alice.user, None, NEVER).await.unwrap().unwrap();
    assert_eq!((one_time_ids(&lasting), lasting.low.len()), (vec![None], 0));
    assert_eq!(counts(&store, &alice).await.ec, 2);
    let spent = hand_out(&store, alice.user).await;
    assert_eq!(one_time_ids(&spent), [Some(1)]);
    assert_eq!(lasting.bundles[0].signed, spent.bundles[0].signed);
    let low = store.lasting_bundles(alice.user, Some(alice.device), 2).await.unwrap().unwrap().low;
    assert_eq!(low, [Address { user: alice.user, device: alice.no }]);
    assert_eq!(store.lasting_bundles(UserId::random(), None, NEVER).await.unwrap(), None);
}

#[tokio::test]
async fn unknown_users_and_devices_and_those_of_others_have_no_bundles() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    for (user, device) in [
        (UserId::random(), None),
        (UserId::random(), Some(alice.device)),
        (alice.user, Some(DeviceId::random())),
        (alice.user, Some(bob.device)),
    ] {
        assert_eq!(store.bundles(user, device, NEVER).await.unwrap(), None);
    }
}

#[tokio::test]
async fn no_one_time_prekey_is_handed_out_twice_however_many_ask_at_once() {
    let store = TestStore::open().await;
    let pq: Vec<i32> = (1..=40).collect();
    let (alice, _) = pq_account(&store, 1..=40, &pq).await;
    let mut askers = JoinSet::new();
    for _ in 0..50 {
        let (store, user) = (Store::clone(&store), alice.user);
        askers.spawn(async move { only_bundle(&store, user).await });
    }
    let bundles = askers.join_all().await;
    let ec: Vec<i32> = bundles.iter().filter_map(|bundle| Some(bundle.one_time.as_ref()?.id.0)).collect();
    let pq: Vec<i32> = bundles.iter().filter_map(|bundle| Some(bundle.pq.as_ref()?.id.get())).collect();
    assert_eq!((ec.len(), ec.iter().collect::<HashSet<_>>().len()), (40, 40));
    assert_eq!(pq.iter().filter(|id| **id == 1000).count(), 10);
    assert_eq!(pq.iter().collect::<HashSet<_>>().len(), 41);
}

#[tokio::test]
async fn what_was_handed_out_is_gone_after_a_restart() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=3)).await.unwrap();
    assert_eq!(one_time_ids(&hand_out(&store, alice.user).await), [Some(1)]);
    let store = store.reopened().await;
    assert_eq!(drain(&store, alice.user).await, [2, 3]);
}

#[tokio::test]
async fn devices_below_the_threshold_are_named_each_time() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let rich = linked_with(&store, &alice, alice.keys(1, 1..=10)).await;
    let rich = Address { user: alice.user, device: rich.no };
    let poor = Address { user: alice.user, device: alice.no };
    let low = async |threshold| store.bundles(alice.user, None, threshold).await.unwrap().unwrap().low;

    assert_eq!(low(9).await, [poor], "9 are left, which is not fewer than 9");
    assert_eq!(low(9).await, [poor, rich], "8 are left");
    assert_eq!(low(0).await, [], "nobody has fewer than none");
}

#[tokio::test]
async fn kyber_keys_count_for_the_threshold_only_on_devices_that_use_them() {
    let store = TestStore::open().await;
    let (modern, _) = pq_account(&store, 1..=10, &[1, 2]).await;
    let old = account(&store).await;
    store.refill(old.no, &old.keys(2, 1..=10)).await.unwrap();
    let low = async |user| store.bundles(user, None, 2).await.unwrap().unwrap().low;
    assert_eq!(low(modern.user).await, [Address { user: modern.user, device: modern.no }]);
    assert_eq!(low(old.user).await, []);
}

#[tokio::test]
async fn counts_leave_out_the_last_resort_key() {
    let store = TestStore::open().await;
    let (alice, _) = pq_account(&store, 1..=5, &[1, 2, 3]).await;
    let stock = counts(&store, &alice).await;
    assert_eq!(stock, PrekeyCounts { ec: 5, pq: 3, uses_pq: true });
    assert!(!stock.is_below(3) && stock.is_below(4));
    hand_out(&store, alice.user).await;
    assert_eq!(counts(&store, &alice).await, PrekeyCounts { ec: 4, pq: 2, uses_pq: true });

    let unknown_device = DeviceNo(i64::MAX);
    assert_eq!(store.prekey_counts(unknown_device).await.unwrap(), None);
}

#[tokio::test]
async fn a_refill_replaces_the_signed_prekey_and_adds_the_others() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=2)).await.unwrap();
    let keys = alice.keys(3, 3..=4);
    assert_eq!(store.refill(alice.no, &keys).await.unwrap(), Refilled::Stored);
    assert_eq!(only_bundle(&store, alice.user).await.signed, keys.signed);
    assert_eq!(drain(&store, alice.user).await, [2, 3, 4]);
    assert_eq!(count(&store, "device_keys").await, 1, "the older signed prekey is gone");
}

#[tokio::test]
async fn the_id_of_the_signed_prekey_has_to_rise() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(7, NONE)).await.unwrap();
    for id in [7, 6, 0, i32::MIN] {
        let refused = store.refill(alice.no, &alice.keys(id, 1..=1)).await.unwrap();
        assert_eq!(refused, Refilled::SignedIdNotRising, "{id}");
    }
    assert_eq!(only_bundle(&store, alice.user).await.signed.id, KeyId(7));
    assert_eq!(count(&store, "one_time_prekeys").await, 0, "nothing of a refused upload is stored");
    assert_eq!(store.refill(alice.no, &alice.keys(i32::MAX, NONE)).await.unwrap(), Refilled::Stored);
}

#[tokio::test]
async fn the_oldest_keys_make_room_for_new_ones() {
    let store = TestStore::open_with(|limits| limits.max_prekeys = 5).await;
    let alice = account(&store).await;
    for (signed, ids) in [(2, 1..=4), (3, 5..=7), (4, 8..=9)] {
        store.refill(alice.no, &alice.keys(signed, ids)).await.unwrap();
    }
    assert_eq!(drain(&store, alice.user).await, [5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn the_maximum_holds_for_each_kind_by_itself_and_for_no_other_device() {
    let store = TestStore::open_with(|limits| limits.max_prekeys = 3).await;
    let (alice, _) = pq_account(&store, 1..=3, &[1, 2]).await;
    let second = linked_with(&store, &alice, alice.keys(1, 1..=3)).await;
    let mut keys = alice.keys(2, 4..=4);
    keys.pq_one_time = [11, 12].map(|id| pq_key(&alice.identity(), id)).into();
    store.refill(alice.no, &keys).await.unwrap();

    let first = hand_out(&store, alice.user).await;
    assert_eq!(one_time_ids(&first), [Some(2), Some(1)]);
    assert_eq!(pq_ids(&first), [Some(2), None]);
    assert_eq!(counts(&store, &alice).await, PrekeyCounts { ec: 2, pq: 2, uses_pq: true });
    assert_eq!(counts(&store, &second).await.ec, 2);
}

#[tokio::test]
async fn an_id_that_is_stored_keeps_its_key() {
    let store = TestStore::open_with(|limits| limits.max_prekeys = 3).await;
    let alice = account(&store).await;
    let first = alice.keys(2, 1..=3);
    store.refill(alice.no, &first).await.unwrap();
    store.refill(alice.no, &alice.keys(3, 2..=3)).await.unwrap();
    let mut left = Vec::new();
    while let Some(key) = only_bundle(&store, alice.user).await.one_time {
        left.push(key);
    }
    assert_eq!(left, first.one_time, "and nothing was pruned for keys that were not added");
}

#[tokio::test]
async fn the_same_id_may_name_keys_of_both_kinds_and_of_other_devices() {
    let store = TestStore::open().await;
    let (alice, _) = pq_account(&store, 1..=1, &[1]).await;
    linked_with(&store, &alice, alice.keys(1, 1..=1)).await;
    let handed_out = hand_out(&store, alice.user).await;
    assert_eq!(one_time_ids(&handed_out), [Some(1), Some(1)]);
    assert_eq!(pq_ids(&handed_out), [Some(1), None]);
}

#[tokio::test]
async fn keys_can_be_replaced_all_at_once_whatever_ids_are_stored() {
    let store = TestStore::open().await;
    let (alice, _) = pq_account(&store, 1..=3, &[1, 2]).await;
    store.refill(alice.no, &alice.keys(i32::MAX, NONE)).await.unwrap();
    assert_eq!(store.refill(alice.no, &alice.keys(5, NONE)).await.unwrap(), Refilled::SignedIdNotRising);
    let keys = alice.keys(5, 3..=4);
    assert_eq!(store.replace_keys(alice.no, &keys).await.unwrap(), Refilled::LastResortMissing);
    assert_eq!(counts(&store, &alice).await, PrekeyCounts { ec: 3, pq: 2, uses_pq: true }, "nothing has changed");
    let keys = PreKeys { pq_last_resort: Some(pq_key(&alice.identity(), 9)), ..keys };
    for _ in 0..2 {
        assert_eq!(store.replace_keys(alice.no, &keys).await.unwrap(), Refilled::Stored);
        assert_eq!(counts(&store, &alice).await, PrekeyCounts { ec: 2, pq: 0, uses_pq: true });
    }
    let bundle = only_bundle(&store, alice.user).await;
    assert_eq!((bundle.signed, bundle.one_time.as_ref()), (keys.signed.clone(), keys.one_time.first()));
    assert_eq!(store.replace_keys(alice.no, &keys).await.unwrap(), Refilled::Stored, "the used one is left out");
    assert_eq!(drain(&store, alice.user).await, [4]);
}

#[tokio::test]
async fn a_last_resort_key_stays_until_another_is_uploaded() {
    let store = TestStore::open().await;
    let (alice, first) = pq_account(&store, NONE, &[]).await;
    store.refill(alice.no, &alice.keys(2, NONE)).await.unwrap();
    assert_eq!(only_bundle(&store, alice.user).await.pq, first.pq_last_resort);

    let mut keys = alice.keys(3, NONE);
    keys.pq_last_resort = Some(pq_key(&alice.identity(), 2000));
    store.refill(alice.no, &keys).await.unwrap();
    assert_eq!(only_bundle(&store, alice.user).await.pq, keys.pq_last_resort);
}

#[tokio::test]
async fn one_time_kyber_keys_need_a_last_resort_key() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let mut keys = alice.keys(2, 1..=1);
    keys.pq_one_time = vec![pq_key(&alice.identity(), 1)];
    assert_eq!(store.refill(alice.no, &keys).await.unwrap(), Refilled::LastResortMissing);
    assert_eq!(count(&store, "one_time_prekeys").await, 0, "nothing of a refused upload is stored");

    keys.pq_last_resort = Some(pq_key(&alice.identity(), 1000));
    assert_eq!(store.refill(alice.no, &keys).await.unwrap(), Refilled::Stored);
    let mut more = alice.keys(3, NONE);
    more.pq_one_time = vec![pq_key(&alice.identity(), 2)];
    assert_eq!(store.refill(alice.no, &more).await.unwrap(), Refilled::Stored, "there is one stored now");
}

#[tokio::test]
async fn an_upload_may_hold_thousands_of_keys() {
    let store = TestStore::open_with(|limits| limits.max_prekeys = 2500).await;
    let alice = account(&store).await;
    store.refill(alice.no, &alice.keys(2, 1..=2500)).await.unwrap();
    assert_eq!(counts(&store, &alice).await.ec, 2500);
}

#[tokio::test]
async fn a_removed_device_can_store_nothing_and_has_no_identity() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked(&store, &alice).await;
    assert_eq!(store.identity(second.no).await.unwrap(), Some(public_key(&alice.identity())));
    store.remove_device(alice.user, second.device).await.unwrap();
    assert_eq!(store.identity(second.no).await.unwrap(), None);
    assert_eq!(store.refill(second.no, &alice.keys(2, 1..=1)).await.unwrap(), Refilled::DeviceGone);
    assert_eq!(count(&store, "one_time_prekeys").await, 0);
}

#[tokio::test]
async fn after_a_restore_all_one_time_prekeys_can_be_dropped_and_the_others_stay() {
    let store = TestStore::open().await;
    let (alice, keys) = pq_account(&store, 1..=4, &[1, 2]).await;
    let bob = account(&store).await;
    store.refill(bob.no, &bob.keys(2, 1..=3)).await.unwrap();

    assert_eq!(store.delete_one_time_prekeys().await.unwrap(), 9);
    let bundle = only_bundle(&store, alice.user).await;
    assert_eq!((bundle.signed, bundle.one_time, bundle.pq), (keys.signed, None, keys.pq_last_resort));
    assert_eq!(one_time_ids(&hand_out(&store, bob.user).await), [None]);
    assert_eq!(store.delete_one_time_prekeys().await.unwrap(), 0);
}

/// The backup doesn't know what was handed out after it was made.
#[tokio::test]
async fn a_key_that_was_dropped_after_a_restore_is_not_stored_again() {
    let store = TestStore::open_with(|limits| limits.max_prekeys = 3000).await;
    let (alice, keys) = pq_account(&store, 1..=2600, &[1, 2]).await;
    assert_eq!(store.delete_one_time_prekeys().await.unwrap(), 2602);
    let again = PreKeys { one_time: keys.one_time, pq_one_time: keys.pq_one_time, ..alice.keys(2, NONE) };
    assert_eq!(store.refill(alice.no, &again).await.unwrap(), Refilled::Stored);
    assert_eq!(counts(&store, &alice).await, PrekeyCounts { ec: 0, pq: 0, uses_pq: true });
    assert_eq!(store.refill(alice.no, &alice.keys(3, 1..=3)).await.unwrap(), Refilled::Stored);
    assert_eq!(drain(&store, alice.user).await, [1, 2, 3]);
}

/// A node of the former version stores a key on each device that uploads it.
#[tokio::test]
async fn a_key_that_two_devices_have_goes_out_once() {
    for at_once in [true, false] {
        let store = TestStore::open().await;
        let (alice, _) = pq_account(&store, 1..=1, &[1]).await;
        let second = linked(&store, &alice).await;
        let copy = format!(
            "INSERT INTO one_time_prekeys (device_no, kind, key_id, public_key, signature) \
             SELECT {}, kind, key_id, public_key, signature FROM one_time_prekeys",
            second.no.0
        );
        store.database().await.execute(&copy).await;
        assert_eq!(count(&store, "one_time_prekeys").await, 4);
        if at_once {
            let both = hand_out(&store, alice.user).await;
            assert_eq!((one_time_ids(&both), pq_ids(&both)), (vec![Some(1), None], vec![Some(1), None]));
        } else {
            let of_second = store.bundles(alice.user, Some(second.device), NEVER).await.unwrap().unwrap();
            assert_eq!((one_time_ids(&of_second), pq_ids(&of_second)), (vec![Some(1)], vec![Some(1)]));
            let both = hand_out(&store, alice.user).await;
            assert_eq!((one_time_ids(&both), pq_ids(&both)), (vec![None, None], vec![Some(1000), None]));
        }
        assert_eq!(count(&store, "one_time_prekeys").await, 0);
    }
}

#[tokio::test]
async fn what_was_used_stays_as_it_is_through_resets_and_removals() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked_with(&store, &alice, alice.keys(1, 1..=3)).await;
    let used = store.bundles(alice.user, Some(second.device), NEVER).await.unwrap().unwrap().bundles.remove(0).one_time;
    let mut keys = alice.keys(1, NONE);
    keys.one_time.extend(used);
    store.remove_device(alice.user, second.device).await.unwrap();
    assert_eq!(count(&store, "spent_prekeys").await, 2, "the signed prekey of the second device too");
    let same = public_key(&alice.identity());
    let other = public_key(&Identity::from_seed(rand::random()));
    for (identity, expected) in [(same, 3), (other, 3), (same, 3)] {
        let device = new_device(keys.clone());
        let reset = store.reset(alice.user, &identity, &device, &grant(NOW)).await.unwrap();
        assert_eq!(store.prekey_counts(reset.no).await.unwrap().unwrap().ec, 0, "the used key is not stored again");
        assert_eq!(count(&store, "spent_prekeys").await, expected, "signed prekeys of the same identity are added");
    }
}
