//! Repeated jobs: `claim_job`, and the care for connections, `maintain_connections`.

use std::time::Duration;

use futures_util::future::join_all;

use super::fixture::{NOW, TestStore};

const PERIOD: Duration = Duration::from_mins(5);

#[tokio::test]
async fn a_job_is_done_by_one_node_in_a_period_and_on_one_machine_always() {
    let store = TestStore::open().await;
    let claims = join_all((0..8).map(|_| store.claim_job("sweep", PERIOD, NOW))).await;
    let claimed = claims.into_iter().filter(|claim| *claim.as_ref().unwrap()).count();
    if store.is_exclusive() {
        assert_eq!(claimed, 8);
        return;
    }
    assert_eq!(claimed, 1);
    assert!(store.claim_job("another", PERIOD, NOW).await.unwrap());
    assert!(!store.claim_job("sweep", PERIOD, NOW + PERIOD / 2).await.unwrap());
    assert!(store.claim_job("sweep", PERIOD, NOW + PERIOD).await.unwrap());
    store.release_job("sweep", NOW + PERIOD).await.unwrap();
    assert!(store.claim_job("sweep", PERIOD, NOW + PERIOD).await.unwrap(), "one that was given back is anybody's");
}

#[tokio::test]
async fn a_job_that_was_claimed_by_a_clock_far_ahead_is_not_lost() {
    let store = TestStore::open().await;
    assert!(store.claim_job("sweep", PERIOD, NOW + Duration::from_hours(24 * 365)).await.unwrap());
    assert!(store.claim_job("sweep", PERIOD, NOW).await.unwrap());
}

/// `tests/it/cluster/connections.rs` shows what it does to the connections themselves.
#[tokio::test]
async fn maintaining_connections_takes_none_from_the_requests_that_use_them() {
    let store = TestStore::open().await;
    // Different questions, which are not gathered.
    let names: Vec<String> = (0..50).map(|number| format!("nobody{number}")).collect();
    let asking = join_all(names.iter().map(|name| store.credentials(name)));
    let tending = join_all((0..10).map(|_| store.maintain_connections()));
    let (answers, tended) = tokio::join!(asking, tending);
    assert!(tended.iter().all(Result::is_ok));
    assert!(answers.into_iter().all(|answer| answer.unwrap().is_none()));
}
