//! What is still kept for devices and accounts that are gone.

use obscura_server::model::ids::UserId;
use obscura_server::store::{IdleCutoffs, Leftovers};

use super::fixture::{NOW, Person, TestStore, grant};
use super::support::{count, number};
use crate::harness::deployment;

/// Notices, by the numbers of their devices.
async fn add_notices(store: &TestStore, devices: impl IntoIterator<Item = i64>) {
    let rows: Vec<String> = devices.into_iter().map(|no| format!("({no}, 1, 1, 1, 0)")).collect();
    let insert =
        format!("INSERT INTO inbox_notices (device_no, period, since, expired, refused) VALUES {}", rows.join(","));
    store.database().await.execute(&insert).await;
}

/// So many used prekeys of an account.
async fn add_used(store: &TestStore, user: UserId, number: u32) {
    let insert = if deployment::is_distributed() {
        format!(
            "INSERT INTO spent_prekeys SELECT '{user}', substr(sha256(int8send(n)), 1, 8) FROM generate_series(1, {number}) n"
        )
    } else {
        let id: String = user.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        format!(
            "WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {number})
             INSERT INTO spent_prekeys SELECT x'{id}', randomblob(8) FROM series"
        )
    };
    store.database().await.execute(&insert).await;
}

/// Walks to the end, and returns the number of steps.
async fn walk(store: &TestStore, limit: u32) -> u32 {
    let (mut from, mut steps) = (Leftovers::START, 0);
    while let Some(next) = store.forget_leftovers(from, limit).await.unwrap() {
        (from, steps) = (next, steps + 1);
    }
    steps
}

async fn used_of(store: &TestStore, person: &Person) -> i64 {
    let of_account = format!(
        "SELECT count(*) FROM spent_prekeys JOIN devices d ON d.user_id = spent_prekeys.user_id WHERE d.no = {}",
        person.no.0
    );
    number(store, &of_account).await
}

#[tokio::test]
async fn notices_of_devices_that_are_gone_are_deleted_in_steps_and_others_stay() {
    let store = TestStore::open().await;
    let (alice, bob) = (store.account().await, store.account().await);
    add_notices(&store, (1001..=1005).chain([alice.no.0, bob.no.0])).await;
    let steps = walk(&store, 2).await;
    assert!(steps >= 4, "7 rows, 2 at once: {steps}");
    assert_eq!(count(&store, "inbox_notices").await, 2);
    assert!(store.notice(alice.no).await.unwrap().is_some() && store.notice(bob.no).await.unwrap().is_some());
}

#[tokio::test]
async fn spent_prekeys_of_accounts_that_are_gone_are_deleted_and_those_of_others_stay() {
    let store = TestStore::open().await;
    let people = [store.account().await, store.account().await, store.account().await];
    for person in &people {
        add_used(&store, person.user, 3).await;
    }
    for _ in 0..4 {
        add_used(&store, UserId::random(), 3).await;
    }
    walk(&store, 2).await;
    assert_eq!(count(&store, "spent_prekeys").await, 9);
    for person in &people {
        assert_eq!(used_of(&store, person).await, 3);
    }
}

#[tokio::test]
async fn an_account_with_very_many_spent_prekeys_goes_step_by_step() {
    let store = TestStore::open().await;
    store.service_day(1).await.unwrap();
    let (gone, stays) = (store.account().await, store.account().await);
    assert!(store.log_in(stays.user, stays.device, &grant(NOW)).await.unwrap().is_some());
    add_used(&store, gone.user, 25_000).await;
    add_used(&store, stays.user, 12_000).await;
    let disuse = IdleCutoffs { used_before: Some(1), signed_up_before: Some(2) };
    assert!(store.remove_idle_account(gone.user, disuse).await.unwrap().is_some());
    let mut left = vec![count(&store, "spent_prekeys").await];
    let mut from = Leftovers::START;
    while let Some(next) = store.forget_leftovers(from, 500).await.unwrap() {
        from = next;
        left.push(count(&store, "spent_prekeys").await);
    }
    left.dedup();
    assert_eq!(left[..2], [27_000, 17_000], "10 000 at once");
    assert_eq!(count(&store, "spent_prekeys").await, 12_000);
    assert_eq!(used_of(&store, &stays).await, 12_000);
}
