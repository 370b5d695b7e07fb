//! The remembered time, `stored_time`, `server_time`, `store_time` and `set_time`; the mark of SQLite's file, `mark` and `set_file_generation`.

use std::time::Duration;

use super::fixture::{NOW, TestStore};

const MINUTE: Duration = Duration::from_mins(1);

#[tokio::test]
async fn the_newest_time_is_remembered_in_whole_minutes_and_goes_back_only_when_it_is_set() {
    let store = TestStore::open().await;
    assert_eq!(store.stored_time().await.unwrap(), None);
    store.store_time(NOW + MINUTE / 2).await.unwrap();
    let first = store.stored_time().await.unwrap().unwrap();
    assert_eq!((first.at, first.confirmations), (NOW, 0));
    assert_eq!(first.server.is_some(), !store.is_exclusive());
    assert_eq!(store.server_time().await.unwrap().is_some(), !store.is_exclusive());
    store.store_time(NOW - MINUTE).await.unwrap();
    assert_eq!(store.stored_time().await.unwrap().unwrap().at, NOW);
    store.store_time(NOW + MINUTE).await.unwrap();
    store.set_time(NOW - 5 * MINUTE).await.unwrap();
    let store = store.reopened().await;
    let last = store.stored_time().await.unwrap().unwrap();
    assert_eq!((last.at, last.confirmations), (NOW - 5 * MINUTE, 1));
    assert_eq!(last.database_id, first.database_id);
}

#[tokio::test]
async fn a_file_keeps_its_mark_and_a_store_that_was_given_up_writes_nothing() {
    let store = TestStore::open().await;
    store.set_file_generation(-7).await.unwrap();
    assert_eq!(store.file_generation().await.unwrap(), store.is_exclusive().then_some(-7));
    store.stop_writes();
    store.store_time(NOW).await.unwrap_err();
    store.check().await.unwrap_err();
    assert_eq!(store.stored_time().await.unwrap(), None);
}
