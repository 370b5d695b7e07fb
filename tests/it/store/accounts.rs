//! Accounts in the store: `credentials`, `register`, `reset`.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::model::ids::UserId;
use obscura_server::store::{LinkBody, Refresh, Refreshed, Registered};

use super::fixture::{NOW, TestStore, fcm, grant, new_account, new_device, public_key, ticket};

#[tokio::test]
async fn registering_makes_an_account_with_a_primary_device_that_is_logged_in() {
    let store = TestStore::open().await;
    let account = new_account("alice");
    let Registered::Account(no) = store.register(&account).await.unwrap() else { panic!("the name is free") };

    let credentials = store.credentials("alice").await.unwrap().unwrap();
    assert_eq!((credentials.user, credentials.password_hash), (account.user, account.password_hash.clone()));
    let device_auth = store.device_auth(account.device.id).await.unwrap().unwrap();
    assert_eq!((device_auth.no, device_auth.user, device_auth.tokens_revoked_until), (no, account.user, 0));
    assert!(device_auth.is_primary);
    assert_eq!(store.devices(account.user).await.unwrap().len(), 1);
    let bundles = store.bundles(account.user, None, 0).await.unwrap().unwrap().bundles;
    assert_eq!(bundles[0].identity, account.identity);

    let wish = Refresh { secret_hash: account.session.secret_hash, key: None, next: account.session, revoked_until: 0 };
    assert!(matches!(store.refresh(&wish, NOW).await.unwrap(), Refreshed::Rotated(holder) if holder.no == no));
}

#[tokio::test]
async fn a_name_is_found_only_as_it_is_stored() {
    let store = TestStore::open().await;
    store.register(&new_account("alice")).await.unwrap();
    for other in ["Alice", "alic", "alice ", "", "a%", "' OR ''='"] {
        assert!(store.credentials(other).await.unwrap().is_none(), "{other:?}");
    }
}

#[tokio::test]
async fn a_registration_under_a_taken_name_leaves_nothing_behind() {
    let store = TestStore::open().await;
    let (first, second) = (new_account("alice"), new_account("alice"));
    store.register(&first).await.unwrap();
    assert_eq!(store.register(&second).await.unwrap(), Registered::UsernameTaken);

    assert_eq!(store.credentials("alice").await.unwrap().unwrap().user, first.user);
    assert_eq!(store.device_auth(second.device.id).await.unwrap(), None);
    let database = store.database().await;
    for table in ["users", "devices", "device_keys", "sessions"] {
        assert_eq!(database.number(&format!("SELECT count(*) FROM {table}")).await, 1, "{table}");
    }
}

#[tokio::test]
async fn of_many_registrations_of_one_name_one_succeeds() {
    let store = TestStore::open().await;
    let accounts: Vec<_> = (0..8).map(|_| new_account("alice")).collect();
    let answers = join_all(accounts.iter().map(|account| store.register(account))).await;
    let made = answers.into_iter().filter(|answer| matches!(answer, Ok(Registered::Account(_))));
    assert_eq!(made.count(), 1);
}

#[tokio::test]
async fn a_reset_forgets_all_devices_and_link_sessions_and_makes_a_new_primary_device() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    let mut tickets = Vec::new();
    for person in [&alice, &bob] {
        store.open_link(person.user, &link_hash(person.user), NOW + DAY, NOW).await.unwrap();
        assert!(store.set_push_target(person.no, i64::MAX, &fcm("token")).await.unwrap());
        let ticket = ticket(person.no);
        assert!(store.issue_ticket(ticket).await.unwrap());
        tickets.push(ticket.hash);
    }

    let (identity, device, session) = (public_key(99), new_device(), grant(NOW));
    let reset = store.reset(alice.user, &identity, &device, &session).await.unwrap();
    assert_eq!(reset.removed, [alice.address()]);
    assert!(reset.no > bob.no, "numbers are never used again");

    assert_eq!(store.device_auth(alice.device).await.unwrap(), None);
    assert_eq!(store.epoch(alice.no).await.unwrap(), None);
    let device_auth = store.device_auth(device.id).await.unwrap().unwrap();
    assert!(device_auth.is_primary);
    assert_eq!((device_auth.no, device_auth.user), (reset.no, alice.user));
    let old = Refresh {
        secret_hash: alice.account.session.secret_hash,
        key: None,
        next: alice.account.session,
        revoked_until: 0,
    };
    assert_eq!(store.refresh(&old, NOW).await.unwrap(), Refreshed::Refused);
    let new = Refresh { secret_hash: session.secret_hash, key: None, next: session, revoked_until: 0 };
    assert!(matches!(store.refresh(&new, NOW).await.unwrap(), Refreshed::Rotated(holder) if holder.no == reset.no));
    let bundles = store.bundles(alice.user, None, 0).await.unwrap().unwrap().bundles;
    assert_eq!(bundles.iter().map(|bundle| bundle.identity).collect::<Vec<_>>(), [identity]);
    assert_eq!(store.credentials(&alice.account.username).await.unwrap().unwrap().user, alice.user);

    assert_eq!(store.link_body(&link_hash(alice.user), NOW).await.unwrap(), LinkBody::Unknown);
    assert_eq!(store.link_body(&link_hash(bob.user), NOW).await.unwrap(), LinkBody::Waiting);
    assert_eq!(store.redeem_ticket(&tickets[0], NOW).await.unwrap(), None);
    assert!(store.redeem_ticket(&tickets[1], NOW).await.unwrap().is_some());
    let database = store.database().await;
    assert_eq!(database.number("SELECT count(*) FROM push_tokens").await, 1);
    assert_eq!(database.number("SELECT count(*) FROM devices").await, 2);
    assert_eq!(database.number("SELECT count(*) FROM device_keys").await, 2);
}

#[tokio::test]
async fn resets_at_once_leave_one_device() {
    let store = TestStore::open().await;
    let alice = store.account().await;
    let devices: Vec<_> = (0..4).map(|_| (new_device(), grant(NOW))).collect();
    let identity = public_key(99);
    let resets = join_all(devices.iter().map(|(device, session)| store.reset(alice.user, &identity, device, session)));
    let removed: usize = resets.await.into_iter().map(|reset| reset.unwrap().removed.len()).sum();
    assert_eq!(removed, 4, "each forgot the one before");
    assert_eq!(store.devices(alice.user).await.unwrap().len(), 1);
}

const DAY: Duration = Duration::from_hours(24);

fn link_hash(user: UserId) -> [u8; 32] {
    user.as_bytes().repeat(2).try_into().expect("twice 16 bytes")
}
