//! Devices in the store, and their push tokens.

use bytes::Bytes;
use obscura_server::model::ids::{Address, DeviceId, DeviceNo, IdempotencyKey, UserId};
use obscura_server::model::message::{Recipient, Sealed, SendRequest, Sender};
use obscura_server::store::{DeviceAuth, NewTicket, Refresh, Refreshed, Removed, Store};

use super::fixture::{NOW, TestStore, fcm, grant, ticket};
use super::support::{Member, NONE, account, count, linked, linked_with, new_device, number, public_key};

/// A log-out voids tokens up to here: later than any that the fixture issues.
const REVOKED_UNTIL: i64 = NOW.seconds() + 2000;

/// The tables that hold something for a device, with the column that says for which.
const TABLES_OF_A_DEVICE: [(&str, &str); 9] = [
    ("devices", "no"),
    ("device_keys", "device_no"),
    ("one_time_prekeys", "device_no"),
    ("sessions", "device_no"),
    ("refresh_uses", "device_no"),
    ("gateway_tickets", "device_no"),
    ("push_tokens", "device_no"),
    ("messages", "device_no"),
    ("sends", "sender_no"),
];

async fn send(store: &Store, from: &Member, to: &Member, others: &[&Member]) {
    send_bytes(store, from, to, others, Bytes::from_static(b"sealed")).await;
}

async fn send_bytes(store: &Store, from: &Member, to: &Member, others: &[&Member], sealed: Bytes) {
    let submissions = std::iter::once(to).chain(others.iter().copied());
    let submissions = submissions.map(|device| (device.device, Sealed(sealed.clone()))).collect();
    let mail = SendRequest {
        sender: Sender { user: from.user, device: from.device, no: from.no },
        key: IdempotencyKey::random(),
        digest: [0; 16],
        recipients: vec![Recipient { user: to.user, submissions, throttled_for: None }],
    };
    let sent = store.commit_group(&[mail], &[], NOW).await.unwrap();
    assert_eq!(sent.sent[0].as_ref().unwrap().outcome, Default::default(), "everything was queued");
}

/// Gives the device a row in every table.
async fn furnish(store: &Store, device: &Member, sender: &Member, others: &[&Member]) {
    send(store, sender, device, others).await;
    send(store, device, sender, &[]).await;
    store.refill(device.no, &device.keys(2, 1..=3)).await.unwrap();
    store.set_push_target(device.no, i64::MAX, &fcm("token")).await.unwrap();
    let session = grant(NOW);
    store.log_in(device.user, device.device, &session).await.unwrap().unwrap();
    let after = NewTicket { token_expires_at: i64::MAX, ..ticket(device.no) };
    assert!(store.issue_ticket(after).await.unwrap());
    let next = obscura_server::store::SessionGrant { family: session.family, ..grant(NOW) };
    let wish = Refresh { secret_hash: session.secret_hash, key: None, next, revoked_until: 0 };
    assert!(matches!(store.refresh(&wish, NOW).await.unwrap(), Refreshed::Rotated(_)));
}

async fn rows(store: &TestStore, no: DeviceNo) -> Vec<(&'static str, i64)> {
    let mut rows = Vec::new();
    for (table, column) in TABLES_OF_A_DEVICE {
        let count = number(store, &format!("SELECT count(*) FROM {table} WHERE {column} = {}", no.0)).await;
        rows.push((table, count));
    }
    rows
}

#[tokio::test]
async fn device_auth_is_what_a_token_is_checked_against() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked(&store, &alice).await;
    let expected = DeviceAuth { no: alice.no, user: alice.user, is_primary: true, tokens_revoked_until: 0 };
    assert_eq!(store.device_auth(alice.device).await.unwrap(), Some(expected));
    let expected = DeviceAuth { no: second.no, is_primary: false, ..expected };
    assert_eq!(store.device_auth(second.device).await.unwrap(), Some(expected));
    assert_eq!(store.device_auth(DeviceId::random()).await.unwrap(), None);

    store.log_out(second.no, REVOKED_UNTIL).await.unwrap();
    assert_eq!(
        store.device_auth(second.device).await.unwrap(),
        Some(DeviceAuth { tokens_revoked_until: REVOKED_UNTIL, ..expected })
    );
}

#[tokio::test]
async fn the_epoch_changes_when_the_session_ends_and_is_none_once_the_device_is_gone() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked(&store, &alice).await;
    assert_eq!(store.epoch(second.no).await.unwrap(), Some(0));
    store.log_out(second.no, REVOKED_UNTIL).await.unwrap();
    assert_eq!(store.epoch(second.no).await.unwrap(), Some(REVOKED_UNTIL));
    store.remove_device(alice.user, second.device).await.unwrap();
    assert_eq!(store.epoch(second.no).await.unwrap(), None);
}

#[tokio::test]
async fn devices_are_listed_oldest_first_with_their_names() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    linked(&store, &bob).await;
    let second = linked(&store, &alice).await;
    let third = linked(&store, &alice).await;
    let listed = store.devices(alice.user).await.unwrap();
    let listed: Vec<_> = listed.into_iter().map(|row| (row.id, row.name, row.is_primary)).collect();
    assert_eq!(listed, [(alice.device, None, true), (second.device, None, false), (third.device, None, false)]);
    assert_eq!(store.devices(obscura_server::model::ids::UserId::random()).await.unwrap(), []);
}

#[tokio::test]
async fn a_removed_device_leaves_nothing_behind_but_what_it_sent() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let second = linked(&store, &alice).await;
    furnish(&store, &second, &bob, &[&alice]).await;
    furnish(&store, &alice, &bob, &[&second]).await;
    assert!(rows(&store, second.no).await.iter().all(|(_, count)| *count > 0), "{:?}", rows(&store, second.no).await);
    let (of_alice, of_bob) = (rows(&store, alice.no).await, rows(&store, bob.no).await);
    assert_eq!(count(&store, "spent_prekeys").await, 2, "the former signed prekeys of both");

    assert_eq!(store.remove_device(alice.user, second.device).await.unwrap(), Removed::Device(second.no));
    assert_eq!(rows(&store, second.no).await, TABLES_OF_A_DEVICE.map(|(table, _)| (table, 0)));
    assert_eq!(rows(&store, alice.no).await, of_alice);
    assert_eq!(rows(&store, bob.no).await, of_bob, "what the device sent to others stays queued");
    assert_eq!(count(&store, "spent_prekeys").await, 3, "its signed prekey is remembered for the account");
    assert_eq!(store.device_auth(second.device).await.unwrap(), None);
}

#[tokio::test]
async fn a_reset_leaves_nothing_of_the_old_devices() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let second = linked(&store, &alice).await;
    furnish(&store, &second, &bob, &[&alice]).await;
    furnish(&store, &alice, &bob, &[&second]).await;
    let of_bob = rows(&store, bob.no).await;
    let device = new_device(alice.keys(1, NONE));
    store.reset(alice.user, &public_key(&alice.identity()), &device, &grant(NOW)).await.unwrap();
    for gone in [alice, second] {
        assert_eq!(rows(&store, gone.no).await, TABLES_OF_A_DEVICE.map(|(table, _)| (table, 0)));
    }
    assert_eq!(rows(&store, bob.no).await, of_bob);
}

#[tokio::test]
async fn a_full_inbox_goes_with_its_device() {
    let store = TestStore::open_with(|limits| (limits.max_inbox_size, limits.sender_share_percent) = (50, 100)).await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let second = linked(&store, &alice).await;
    for _ in 0..50 {
        send(&store, &bob, &second, &[&alice]).await;
    }
    store.remove_device(alice.user, second.device).await.unwrap();
    assert_eq!(count(&store, "messages").await, 50, "those of the other device");
}

#[tokio::test]
async fn a_very_large_inbox_goes_step_by_step() {
    let store = TestStore::open_with(|limits| (limits.inbox_max_bytes, limits.sender_share_percent) = (0, 100)).await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let second = linked(&store, &alice).await;
    let large = Bytes::from(vec![1; 1 << 20]);
    for _ in 0..40 {
        send_bytes(&store, &bob, &second, &[&alice], large.clone()).await;
    }
    store.remove_device(alice.user, second.device).await.unwrap();
    let mut left = vec![count(&store, "messages").await];
    while store.clear_inboxes(&[second.no]).await.unwrap() {
        left.push(count(&store, "messages").await);
    }
    assert_eq!(left, [64, 48, 40], "16 MiB at once, down to the mail of the other device");
}

#[tokio::test]
async fn the_inboxes_of_living_devices_are_not_cleared() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    send(&store, &bob, &alice, &[]).await;
    assert!(!store.clear_inboxes(&[alice.no]).await.unwrap());
    assert_eq!(count(&store, "messages").await, 1);
}

#[tokio::test]
async fn the_primary_device_and_those_of_others_are_not_removed() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let of_bob = linked(&store, &bob).await;
    for (device, expected) in [
        (alice.device, Removed::Primary),
        (bob.device, Removed::Unknown),
        (of_bob.device, Removed::Unknown),
        (DeviceId::random(), Removed::Unknown),
    ] {
        assert_eq!(store.remove_device(alice.user, device).await.unwrap(), expected);
    }
    assert_eq!(count(&store, "devices").await, 3);
}

#[tokio::test]
async fn the_number_of_a_removed_device_is_not_used_again() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked(&store, &alice).await;
    store.remove_device(alice.user, second.device).await.unwrap();
    let third = linked_with(&store, &alice, alice.keys(1, NONE)).await;
    assert!(third.no > second.no);
}

#[tokio::test]
async fn the_last_push_token_wins() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    for token in ["first", "last"] {
        assert!(store.set_push_target(alice.no, 1000, &fcm(token)).await.unwrap());
    }
    assert_eq!(count(&store, "push_tokens WHERE token = 'last'").await, 1);
    assert_eq!(count(&store, "push_tokens").await, 1);
}

#[tokio::test]
async fn a_device_that_is_gone_or_logged_out_gets_no_push_token() {
    let store = TestStore::open().await;
    let alice = account(&store).await;
    let second = linked(&store, &alice).await;
    store.log_out(alice.no, REVOKED_UNTIL).await.unwrap();
    assert!(
        !store.set_push_target(alice.no, REVOKED_UNTIL, &fcm("with a token from before the log-out")).await.unwrap()
    );
    store.remove_device(alice.user, second.device).await.unwrap();
    assert!(!store.set_push_target(second.no, i64::MAX, &fcm("late")).await.unwrap());
    assert_eq!(count(&store, "push_tokens").await, 0);
    assert!(store.set_push_target(alice.no, REVOKED_UNTIL + 1, &fcm("logged in again")).await.unwrap());
}

#[tokio::test]
async fn signals_go_to_every_device_of_the_accounts_that_are_named() {
    let store = TestStore::open().await;
    let (alice, bob) = (account(&store).await, account(&store).await);
    let tablet = linked(&store, &alice).await;
    let mut found = store.addresses(&[alice.user]).await.unwrap();
    found.sort_by_key(|address| address.device);
    let expected: Vec<_> =
        [alice, tablet].iter().map(|member| Address { user: alice.user, device: member.no }).collect();
    assert_eq!(found, expected);
    assert_eq!(store.addresses(&[alice.user, bob.user, UserId::random()]).await.unwrap().len(), 3);
    assert!(store.addresses(&[]).await.unwrap().is_empty());
}
