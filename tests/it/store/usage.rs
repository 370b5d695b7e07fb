//! When accounts were last used, and which of them expire.

use std::time::Duration;

use obscura_server::model::ids::UserId;
use obscura_server::store::{IdleCutoffs, Registered};

use super::fixture::{NOW, Person, TestStore, grant, new_account, ticket};

const NEVER: IdleCutoffs = IdleCutoffs { used_before: None, signed_up_before: None };

/// Those that were used before this service day, and never used ones that signed up before that one.
fn before(used: i64, signed_up: i64) -> IdleCutoffs {
    IdleCutoffs { used_before: Some(used), signed_up_before: Some(signed_up) }
}

async fn log_in(store: &TestStore, person: &Person) {
    assert!(store.log_in(person.user, person.device, &grant(NOW)).await.unwrap().is_some());
}

async fn disused(store: &TestStore, disuse: IdleCutoffs) -> Vec<UserId> {
    let mut found = store.idle_accounts(disuse, 10).await.unwrap();
    found.sort_unstable();
    found
}

fn sorted<const N: usize>(people: [&Person; N]) -> Vec<UserId> {
    let mut users: Vec<UserId> = people.iter().map(|person| person.user).collect();
    users.sort_unstable();
    users
}

#[tokio::test]
async fn days_on_which_no_server_ran_do_not_count_and_a_clock_that_goes_back_changes_nothing() {
    let store = TestStore::open().await;
    for (today, number) in [(20_000, 1), (20_000, 1), (20_001, 2), (20_041, 3), (20_002, 3), (20_042, 4)] {
        assert_eq!(store.service_day(today).await.unwrap(), number, "day {today}");
    }
    let other = store.open_again().await.unwrap();
    assert_eq!(other.service_day(20_042).await.unwrap(), 4);
    assert_eq!(other.service_day(20_043).await.unwrap(), 5);
    assert_eq!(store.service_day(20_043).await.unwrap(), 5, "one count for all nodes");
}

#[tokio::test]
async fn an_account_that_was_never_used_and_one_that_was_have_limits_of_their_own() {
    let store = TestStore::open().await;
    store.service_day(1).await.unwrap();
    let (used, unused) = (store.account().await, store.account().await);
    log_in(&store, &used).await;
    assert_eq!(disused(&store, NEVER).await, []);
    assert_eq!(disused(&store, before(1, 1)).await, []);
    assert_eq!(disused(&store, before(2, 1)).await, [used.user]);
    assert_eq!(disused(&store, before(1, 2)).await, [unused.user]);
    assert_eq!(disused(&store, before(2, 2)).await, sorted([&used, &unused]));
    assert_eq!(store.idle_accounts(before(2, 2), 1).await.unwrap().len(), 1);
}

#[tokio::test]
async fn log_ins_refreshes_resets_requests_and_open_sockets_are_uses() {
    let store = TestStore::open().await;
    store.service_day(1).await.unwrap();
    let [logs_in, refreshes, asks, listens, idle] = [
        store.account().await,
        store.account().await,
        store.account().await,
        store.account().await,
        store.account().await,
    ];
    store.service_day(2).await.unwrap();
    log_in(&store, &logs_in).await;
    let wish = obscura_server::store::Refresh {
        secret_hash: refreshes.account.session.secret_hash,
        key: None,
        next: obscura_server::store::SessionGrant { secret_hash: [9; 32], ..refreshes.account.session },
        revoked_until: 0,
    };
    store.refresh(&wish, NOW).await.unwrap();
    store.record_use(asks.user);
    store.record_device_uses(&[listens.no]).await.unwrap();
    store.flush_uses().await.unwrap();
    // Never used before, and now neither.
    assert_eq!(disused(&store, before(2, 3)).await, [idle.user]);
    assert_eq!(disused(&store, before(3, 0)).await, sorted([&logs_in, &refreshes, &asks, &listens]));
    let numbers = "SELECT count(*) FROM users WHERE used_on = 2";
    assert_eq!(store.database().await.number(numbers).await, 4);
}

/// A node of the former version writes neither column.
#[tokio::test]
async fn an_account_whose_last_use_is_unknown_counts_from_the_upgrade() {
    let store = TestStore::open().await;
    let old = store.account().await;
    let database = store.database().await;
    assert_eq!(database.number("SELECT count(*) FROM users WHERE used_on IS NULL").await, 1, "no day is known yet");
    store.service_day(100).await.unwrap();
    assert_eq!(disused(&store, before(1000, 1000)).await, []);
    assert_eq!(store.date_unknown_uses(10).await.unwrap(), 1);
    assert_eq!(store.date_unknown_uses(10).await.unwrap(), 0);
    assert_eq!(disused(&store, before(1, 1)).await, []);
    assert_eq!(disused(&store, before(2, 1)).await, [old.user]);
}

#[tokio::test]
async fn an_account_that_goes_takes_everything_of_its_own_along_and_its_name_is_free() {
    let store = TestStore::open().await;
    store.service_day(1).await.unwrap();
    let (gone, stays) = (store.account().await, store.account().await);
    log_in(&store, &stays).await;
    for person in [&gone, &stays] {
        store.open_link(person.user, &rand::random(), NOW + Duration::from_mins(10), NOW).await.unwrap();
        assert!(store.issue_ticket(ticket(person.no)).await.unwrap());
    }
    let database = store.database().await;
    let tables = ["users", "devices", "device_keys", "sessions", "link_sessions", "gateway_tickets"];
    let removed = store.remove_idle_account(gone.user, before(1, 2)).await.unwrap();
    assert_eq!(removed, Some(vec![gone.address()]));
    for table in tables {
        assert_eq!(database.number(&format!("SELECT count(*) FROM {table}")).await, 1, "{table}");
    }
    assert_eq!(store.device_auth(gone.device).await.unwrap(), None);
    assert_eq!(store.remove_idle_account(gone.user, before(1, 2)).await.unwrap(), None, "only once");
    let again = new_account(&gone.account.username);
    assert!(matches!(store.register(&again).await.unwrap(), Registered::Account(_)));
}

#[tokio::test]
async fn an_account_that_is_used_at_the_last_moment_stays() {
    let store = TestStore::open().await;
    store.service_day(1).await.unwrap();
    let (logs_in, asks) = (store.account().await, store.account().await);
    store.service_day(50).await.unwrap();
    assert_eq!(disused(&store, before(2, 2)).await, sorted([&logs_in, &asks]));
    log_in(&store, &logs_in).await;
    store.record_use(asks.user);
    for person in [&logs_in, &asks] {
        assert_eq!(store.remove_idle_account(person.user, before(2, 2)).await.unwrap(), None);
        assert!(store.device_auth(person.device).await.unwrap().is_some());
    }
}
