//! Push tokens and who should be woken: `set_push_target`, `delete_push_target`, `delete_dead_tokens`, `mark_push_targets`, `server_key`,
//! `push_candidates`, `record_pushes`, `record_prekeys_push`, `reset_pushes`, `overdue_for_push`.

use std::time::Duration;

use obscura_server::clock::Timestamp;
use obscura_server::model::ids::{DeviceNo, Position};
use obscura_server::model::push::{PushTarget, Subscription};
use obscura_server::store::{OverduePage, PushCandidate, Store};

use super::fixture::{NOW, Person, TestStore, fcm};
use super::messages::to;
use super::support::count;

const GRACE: Duration = Duration::from_secs(10);
const FIRST: DeviceNo = DeviceNo(0);

async fn phone(store: &TestStore) -> Person {
    let person = store.account().await;
    assert!(store.set_push_target(person.no, i64::MAX, &fcm("token")).await.unwrap());
    person
}

async fn candidate(store: &Store, person: &Person, now: Timestamp) -> PushCandidate {
    let mut push_candidates = store.push_candidates(&[person.no], now).await.unwrap();
    assert_eq!(push_candidates.len(), 1);
    push_candidates.remove(0)
}

async fn overdue_for_push(store: &Store, now: Timestamp) -> Vec<DeviceNo> {
    store.overdue_for_push(FIRST, now - GRACE, now, 100).await.unwrap().devices
}

async fn pushed(store: &Store, person: &Person, now: Timestamp) {
    let PushCandidate { newest, target, .. } = candidate(store, person, now).await;
    store.record_pushes(&[(person.no, target.token().to_owned(), newest)], now).await.unwrap();
}

#[tokio::test]
async fn a_target_is_read_as_it_was_written_and_the_last_one_counts() {
    let store = TestStore::open().await;
    let person = store.account().await;
    let subscription = Subscription { endpoint: "https://push".into(), p256dh: vec![4; 65], auth: vec![1; 16] };
    for target in [PushTarget::Apns("a".into()), PushTarget::WebPush(subscription), fcm("b")] {
        store.set_push_target(person.no, i64::MAX, &target).await.unwrap();
        assert_eq!(candidate(&store, &person, NOW).await.target, target);
    }
    store.delete_push_target(person.no).await.unwrap();
    store.delete_push_target(person.no).await.unwrap();
    assert_eq!(store.push_candidates(&[person.no], NOW).await.unwrap(), []);
}

#[tokio::test]
async fn only_the_token_that_was_called_dead_is_forgotten() {
    let store = TestStore::open().await;
    let (alice, bob) = (phone(&store).await, phone(&store).await);
    store.set_push_target(bob.no, i64::MAX, &fcm("replaced")).await.unwrap();
    let dead = [(alice.no, "token".to_owned()), (bob.no, "token".to_owned())];
    assert_eq!(store.delete_dead_tokens(&dead).await.unwrap(), 1);
    assert_eq!(count(&store, "push_tokens").await, 1);
    assert_eq!(candidate(&store, &bob, NOW).await.target, fcm("replaced"));
}

#[tokio::test]
async fn the_first_key_of_a_name_stays() {
    let store = TestStore::open().await;
    assert_eq!(store.server_key("one", b"first").await.unwrap(), b"first");
    assert_eq!(store.server_key("one", b"second").await.unwrap(), b"first");
    assert_eq!(store.server_key("other", b"second").await.unwrap(), b"second");
}

#[tokio::test]
async fn mail_waits_until_it_was_pushed_for_and_later_mail_waits_anew() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, phone(&store).await);
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, None);
    store.commit_group(&[to(&alice, &bob, "one")], &[], NOW).await.unwrap();
    store.commit_group(&[to(&alice, &bob, "two")], &[], NOW + GRACE).await.unwrap();
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, Some(NOW));
    pushed(&store, &bob, NOW + GRACE).await;
    assert_eq!(candidate(&store, &bob, NOW + GRACE).await.waiting_since, None);
    store.commit_group(&[to(&alice, &bob, "three")], &[], NOW + 2 * GRACE).await.unwrap();
    assert_eq!(candidate(&store, &bob, NOW + 2 * GRACE).await.waiting_since, Some(NOW + 2 * GRACE));
}

#[tokio::test]
async fn acknowledged_mail_does_not_wait() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, phone(&store).await);
    store.commit_group(&[to(&alice, &bob, "one")], &[], NOW).await.unwrap();
    let newest = candidate(&store, &bob, NOW).await.newest;
    store.commit_group(&[], &[(bob.no, newest)], NOW).await.unwrap();
    let bob = candidate(&store, &bob, NOW).await;
    assert_eq!((bob.waiting_since, bob.newest), (None, Position(0)));
}

#[tokio::test]
async fn a_push_is_forgotten_after_a_day_and_with_another_token() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, phone(&store).await);
    store.commit_group(&[to(&alice, &bob, "one")], &[], NOW).await.unwrap();
    pushed(&store, &bob, NOW).await;
    store.set_push_target(bob.no, i64::MAX, &fcm("token")).await.unwrap();
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, None, "the same token again");
    let tomorrow = NOW + Duration::from_hours(25);
    assert_eq!(candidate(&store, &bob, tomorrow).await.waiting_since, Some(NOW));
    store.set_push_target(bob.no, i64::MAX, &fcm("another")).await.unwrap();
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, Some(NOW));
}

#[tokio::test]
async fn a_push_with_the_old_token_does_not_count_for_the_new_one() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, phone(&store).await);
    store.commit_group(&[to(&alice, &bob, "one")], &[], NOW).await.unwrap();
    let newest = candidate(&store, &bob, NOW).await.newest;
    // The push is under way when the token is replaced.
    store.set_push_target(bob.no, i64::MAX, &fcm("another")).await.unwrap();
    store.record_pushes(&[(bob.no, "token".into(), newest)], NOW).await.unwrap();
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, Some(NOW));
}

#[tokio::test]
async fn a_push_is_reset_when_a_client_came_and_left_messages_behind() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, phone(&store).await, phone(&store).await);
    store.commit_group(&[to(&alice, &bob, "one")], &[], NOW).await.unwrap();
    pushed(&store, &bob, NOW).await;
    assert_eq!(store.reset_pushes(&[alice.no, bob.no, carol.no]).await.unwrap(), [bob.no]);
    assert_eq!(candidate(&store, &bob, NOW).await.waiting_since, Some(NOW));
}

#[tokio::test]
async fn a_device_hears_of_its_keys_again_after_a_while() {
    let store = TestStore::open().await;
    let bob = phone(&store).await;
    assert!(candidate(&store, &bob, NOW).await.may_push_prekeys_low);
    store.record_prekeys_push(bob.no, NOW).await.unwrap();
    assert!(!candidate(&store, &bob, NOW).await.may_push_prekeys_low);
    assert!(candidate(&store, &bob, NOW + Duration::from_mins(15)).await.may_push_prekeys_low);
}

#[tokio::test]
async fn the_scan_finds_devices_with_old_messages_and_no_push() {
    let store = TestStore::open().await;
    let (alice, bob, carol) = (store.account().await, phone(&store).await, phone(&store).await);
    let (dave, erin) = (store.account().await, phone(&store).await);
    let sends = [to(&alice, &bob, "x"), to(&alice, &carol, "x"), to(&alice, &dave, "no token")];
    store.commit_group(&sends, &[], NOW).await.unwrap();
    let later = NOW + GRACE;
    store.commit_group(&[to(&alice, &erin, "young")], &[], later).await.unwrap();
    pushed(&store, &carol, later).await;
    assert_eq!(overdue_for_push(&store, later).await, [bob.no]);
    assert_eq!(overdue_for_push(&store, later + GRACE).await, [bob.no, erin.no]);
    assert_eq!(overdue_for_push(&store, later + Duration::from_hours(24)).await, [bob.no, carol.no, erin.no]);
}

#[tokio::test]
async fn the_walk_goes_in_steps() {
    let store = TestStore::open().await;
    let mut phones = Vec::new();
    for _ in 0..5 {
        phones.push(phone(&store).await.no);
    }
    let mut steps = Vec::new();
    let mut from = Some(FIRST);
    while let Some(after) = from {
        let OverduePage { devices, next } = store.overdue_for_push(after, NOW, NOW, 2).await.unwrap();
        assert_eq!(devices, []);
        steps.push(next);
        from = next;
    }
    assert_eq!(steps, [Some(phones[1]), Some(phones[3]), None]);
}

#[tokio::test]
async fn how_long_a_target_has_been_unknown_is_kept_to_the_hour_and_ends_with_the_target() {
    let store = TestStore::open().await;
    let bob = phone(&store).await;
    let since = async || candidate(&store, &bob, NOW).await.missing_since;
    assert_eq!(since().await, None);
    let hour = Timestamp::from_seconds(NOW.seconds() / 3600 * 3600);
    let mark = async |token: &str, at| store.mark_push_targets(&[(bob.no, token.to_owned())], at).await.unwrap();
    mark("another", Some(NOW)).await;
    assert_eq!(since().await, None);
    mark("token", Some(NOW)).await;
    assert_eq!(since().await, Some(hour));
    mark("token", None).await;
    assert_eq!(since().await, None);
    mark("token", Some(NOW)).await;
    for (hours, expected) in [(39, Some(hour)), (41, None)] {
        let later = candidate(&store, &bob, NOW + Duration::from_hours(hours)).await;
        assert_eq!(later.missing_since, expected, "after {hours} hours");
    }
    assert!(store.set_push_target(bob.no, i64::MAX, &fcm("token")).await.unwrap());
    assert_eq!(since().await, None, "the client has registered it anew");
}
