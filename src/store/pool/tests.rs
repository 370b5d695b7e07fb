use futures_util::FutureExt;
use sqlx::sqlite::SqliteConnectOptions;

use super::*;

const LIMITS: PoolLimits = PoolLimits {
    max: 2,
    min: 0,
    acquire_timeout: Duration::from_millis(500),
    idle_timeout: None,
    max_lifetime: None,
    reusable_after_cancel: false,
};

fn pool(limits: PoolLimits) -> Pool<Sqlite> {
    Pool::new(SqliteConnectOptions::new().in_memory(true), (), limits, PoolName::Reader, &Metrics::unexported())
}

fn idle(pool: &Pool<Sqlite>) -> usize {
    lock(&pool.inner.idle).len()
}

#[tokio::test]
async fn the_pool_never_exceeds_its_maximum_and_gets_each_connection_back() {
    let pool = pool(LIMITS);
    let (mut first, mut second) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    assert!(pool.get().await.is_err());
    first.set_reusable(true);
    second.set_reusable(true);
    drop((first, second));
    assert_eq!(idle(&pool), 2);
    assert!(pool.get().await.is_ok());
    pool.close().await;
    assert!(pool.get().await.is_err());
}

#[tokio::test]
async fn a_connection_in_an_unknown_state_is_closed_and_makes_room() {
    let pool = pool(LIMITS);
    drop(pool.get().await.unwrap());
    assert_eq!(idle(&pool), 0);
    for _ in 0..5 {
        drop(pool.get().await.unwrap());
    }
}

#[tokio::test]
async fn idle_connections_above_the_minimum_are_closed_and_old_ones_in_any_case() {
    let limit = Duration::from_secs(10);
    let pool = pool(PoolLimits { min: 1, idle_timeout: Some(limit), max_lifetime: Some(2 * limit), ..LIMITS });
    let mut both = [pool.get().await.unwrap(), pool.get().await.unwrap()];
    both.iter_mut().for_each(|acquired| acquired.set_reusable(true));
    drop(both);
    let age = |by: Duration| {
        for idle in lock(&pool.inner.idle).iter_mut() {
            (idle.created_at, idle.idle_since) = (idle.created_at - by, idle.idle_since - by);
        }
    };
    drop(pool.inner.take_outdated());
    assert_eq!(idle(&pool), 2);
    age(limit);
    drop(pool.inner.take_outdated());
    assert_eq!(idle(&pool), 1);
    age(limit);
    drop(pool.inner.take_outdated());
    assert_eq!(idle(&pool), 0);
}

#[tokio::test]
async fn the_least_number_is_made_ahead_of_need() {
    let pool = pool(PoolLimits { min: 2, ..LIMITS });
    pool.maintain().await.unwrap();
    assert_eq!(idle(&pool), 2);
}

#[tokio::test]
async fn a_read_that_was_given_up_does_not_spoil_the_next_one_where_connections_outlive_it() {
    let pool = pool(PoolLimits { max: 1, reusable_after_cancel: true, ..LIMITS });
    for _ in 0..100 {
        let mut reader = pool.get().await.unwrap();
        let long = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 5000) SELECT x FROM n";
        assert!(sqlx::query(long).fetch_all(&mut *reader).now_or_never().is_none(), "it takes longer than that");
        drop(reader);
        let mut reader = pool.get().await.unwrap();
        let one: i64 = sqlx::query_scalar("SELECT 1").fetch_one(&mut *reader).await.unwrap();
        assert_eq!(one, 1);
    }
}
