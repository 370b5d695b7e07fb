//! The options of the pool, as PostgreSQL sees them.

use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::config::Database as Settings;
use obscura_server::model::ids::DeviceId;
use obscura_server::store::{Limits, Store};
use obscura_server::telemetry::metrics::Metrics;
use tempfile::TempDir;

use crate::harness::{Database, deployment, eventually};

/// A store on a database of its own, and a look at it from outside.
struct Pooled {
    store: Store,
    database: Database,
    folder: TempDir,
}

impl Pooled {
    async fn open(change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = deployment::config_of(&deployment::distributed_options(folder.path()).await);
        change(&mut config.database);
        let store = Store::open(&config.database, Limits::of(&config), &Metrics::unexported()).await.unwrap();
        let database = Database::open(&config.database).await;
        Self { store, database, folder }
    }

    /// How many connections the store has.
    async fn connections(&self) -> i64 {
        let query = "SELECT count(*) FROM pg_stat_activity \
                     WHERE datname = current_database() AND application_name = 'obscura-server'";
        self.database.number(query).await
    }

    /// Has many want a connection at once, and answers how many got their answer.
    async fn crowd(&self, count: usize) -> usize {
        let asking = (0..count).map(|n| async move {
            // Different questions, which are not gathered.
            self.store.credentials(&format!("nobody{n}")).await.is_ok()
        });
        join_all(asking).await.into_iter().filter(|answered| *answered).count()
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        deployment::drop_state(self.folder.path());
    }
}

#[tokio::test]
async fn there_are_never_more_connections_than_the_maximum() {
    let pooled = Pooled::open(|config| (config.max_connections, config.min_connections) = (3, 0)).await;
    assert_eq!(pooled.crowd(100).await, 100);
    assert!((1..=3).contains(&pooled.connections().await));
}

#[tokio::test]
async fn idle_connections_go_down_to_the_minimum_and_old_ones_are_replaced() {
    let pooled = Pooled::open(|config| {
        (config.max_connections, config.min_connections) = (8, 2);
        config.idle_timeout = Duration::from_millis(50);
        config.max_lifetime = Duration::from_secs(1);
    })
    .await;
    pooled.crowd(50).await;
    let two_are_left = async || {
        pooled.store.maintain_connections().await.unwrap();
        pooled.connections().await == 2
    };
    eventually("two to be left", two_are_left).await;
    let pids = "SELECT coalesce(max(pid), 0) FROM pg_stat_activity \
                WHERE datname = current_database() AND application_name = 'obscura-server'";
    let before = pooled.database.number(pids).await;
    let replaced = async || {
        pooled.store.maintain_connections().await.unwrap();
        pooled.database.number(pids).await != before
    };
    eventually("the old ones to be replaced", replaced).await;
}

#[tokio::test]
async fn who_gets_no_connection_in_time_is_told_and_a_statement_or_lock_that_takes_too_long_is_given_up() {
    let pooled = Pooled::open(|config| {
        (config.max_connections, config.min_connections) = (1, 0);
        config.acquire_timeout = Duration::from_secs(1);
        config.lock_timeout = Duration::from_secs(3);
    })
    .await;
    let held = pooled.database.hold_write().await;
    // This one holds the only connection while it waits for the lock.
    let waiting = pooled.store.log_out(obscura_server::model::ids::DeviceNo(1), 0);
    let late = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        pooled.store.device_auth(DeviceId::random()).await
    };
    let (waited, late) = tokio::join!(waiting, late);
    assert!(late.unwrap_err().to_string().contains("pool timed out"));
    assert!(waited.unwrap_err().to_string().contains("lock timeout"));
    held.release().await;
    pooled.store.check().await.unwrap();
}
