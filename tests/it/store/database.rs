//! The database itself: `open`, `check`, `close`; and what only SQLite's file has: `reclaim`.

use std::future::poll_fn;
use std::path::Path;
use std::pin::pin;

use obscura_server::config::Config;
use obscura_server::store::{Limits, OpenError, Store};
use obscura_server::telemetry::metrics::Metrics;

use super::fixture::TestStore;
use crate::harness::Database;

/// SQLite's file in this folder, whatever this run is about.
async fn open(folder: &Path) -> Result<Store, OpenError> {
    let config = Config::embedded(folder).unwrap();
    Store::open(&config.database, Limits::of(&config), &Metrics::unexported()).await
}

#[tokio::test]
async fn an_open_store_answers_and_a_closed_one_does_not() {
    let store = TestStore::open().await;
    store.check().await.unwrap();
    store.close().await;
    assert!(store.check().await.is_err());
}

/// The proof of the password would take 820 rounds of all tasks if it were made among them.
#[tokio::test]
async fn a_connection_to_postgres_is_made_in_a_few_turns_however_busy_the_other_tasks_are() {
    let store = TestStore::open_in_postgres().await;
    let (one, mut other) = (store.check(), pin!(store.check()));
    let mut turns = 0;
    // One of the two has to connect.
    let counted = poll_fn(|cx| {
        turns += 1;
        other.as_mut().poll(cx)
    });
    let (one, other) = tokio::join!(one, counted);
    one.unwrap();
    other.unwrap();
    assert!(turns < 20, "{turns}");
}

#[tokio::test]
async fn readers_do_not_wait_for_the_writer() {
    let store = TestStore::open().await;
    let database = store.database().await;
    let held = database.hold_write().await;
    assert!(store.credentials("nobody").await.unwrap().is_none());
    held.release().await;
}

#[tokio::test]
async fn a_file_has_a_log_beside_it_and_can_shrink() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await.unwrap();
    let database = Database::of_embedded(folder.path()).await;
    assert_eq!(database.text("PRAGMA journal_mode").await, "wal");
    assert_eq!(database.number("PRAGMA auto_vacuum").await, 2, "incremental");
    store.close().await;
}

#[tokio::test]
async fn space_is_given_back_in_steps() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await.unwrap();
    let database = Database::of_embedded(folder.path()).await;
    assert!(!store.reclaim(10).await.unwrap());
    database.execute("CREATE TABLE large (x); INSERT INTO large VALUES (zeroblob(1000000)); DROP TABLE large").await;
    let free = async || database.number("PRAGMA freelist_count").await;
    let before = free().await;
    assert!(before > 200);
    assert!(store.reclaim(10).await.unwrap(), "there is more");
    assert_eq!(free().await, before - 10);
    assert!(!store.reclaim(10_000).await.unwrap());
    assert_eq!(free().await, 0);
}

#[tokio::test]
async fn the_size_of_a_database_grows_with_what_is_in_it() {
    let store = TestStore::open().await;
    let database = store.database().await;
    let before = store.size().await.unwrap();
    assert!((10_000..100_000_000).contains(&before), "{before}");
    database.execute("CREATE TABLE large (x text)").await;
    let kib = "abcdefgh".repeat(128);
    for _ in 0..200 {
        database.execute(&format!("INSERT INTO large VALUES ('{kib}')")).await;
    }
    let after = store.size().await.unwrap();
    assert!(after >= before + 200 * 1024, "{before}, then {after}");
    database.execute("DROP TABLE large").await;
    assert!(store.size().await.unwrap() < after, "what is free doesn't count");
}

#[tokio::test]
async fn a_database_of_a_newer_server_is_left_alone() {
    let store = TestStore::open().await;
    let database = store.database().await;
    database
        .execute(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             SELECT 9999, 'future', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .await;
    let before = database.everything().await;
    let Err(error) = store.open_again().await else { panic!("opened a database of the future") };
    assert!(matches!(error, OpenError::Newer { found: 9999, .. }), "{error}");
    assert!(error.to_string().contains("newer version"), "{error}");
    assert!(database.everything().await == before, "something was changed");
}

#[tokio::test]
async fn what_is_no_database_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("obscura.db");
    let text = "this is a letter and no database, ".repeat(300);
    std::fs::write(&file, &text).unwrap();
    let Err(error) = open(folder.path()).await else { panic!("opened a letter") };
    assert!(error.to_string().contains("obscura.db"), "{error}");
    assert!(std::fs::read_to_string(&file).unwrap() == text, "something was changed");
}
