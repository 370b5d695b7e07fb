use futures_util::FutureExt;
use sqlx::sqlite::SqliteConnectOptions;

use super::*;

const TERMS: Terms = Terms {
    max: 2,
    min: 0,
    patience: Duration::from_millis(500),
    idle_timeout: None,
    max_lifetime: None,
    outlives_its_borrower: false,
};

fn pool(terms: Terms) -> Pool<Sqlite> {
    Pool::new(SqliteConnectOptions::new().in_memory(true), (), terms, PoolName::Reader, &Metrics::unread())
}

fn idle(pool: &Pool<Sqlite>) -> usize {
    lock(&pool.inner.idle).len()
}

#[tokio::test]
async fn no_more_are_lent_than_there_may_be_and_each_comes_back() {
    let pool = pool(TERMS);
    let (mut first, mut second) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    assert!(pool.get().await.is_err());
    first.set_good(true);
    second.set_good(true);
    drop((first, second));
    assert_eq!(idle(&pool), 2);
    assert!(pool.get().await.is_ok());
    pool.close().await;
    assert!(pool.get().await.is_err());
}

#[tokio::test]
async fn one_of_which_nobody_can_tell_is_closed_and_makes_room() {
    let pool = pool(TERMS);
    drop(pool.get().await.unwrap());
    assert_eq!(idle(&pool), 0);
    for _ in 0..5 {
        drop(pool.get().await.unwrap());
    }
}

#[tokio::test]
async fn those_that_are_idle_too_long_go_but_for_the_least_number_and_old_ones_go_in_any_case() {
    let limit = Duration::from_secs(10);
    let pool = pool(Terms { min: 1, idle_timeout: Some(limit), max_lifetime: Some(2 * limit), ..TERMS });
    let mut both = [pool.get().await.unwrap(), pool.get().await.unwrap()];
    both.iter_mut().for_each(|lent| lent.set_good(true));
    drop(both);
    let age = |by: Duration| {
        for idle in lock(&pool.inner.idle).iter_mut() {
            (idle.born, idle.since) = (idle.born - by, idle.since - by);
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
    let pool = pool(Terms { min: 2, ..TERMS });
    pool.tend().await.unwrap();
    assert_eq!(idle(&pool), 2);
}

#[tokio::test]
async fn a_read_that_was_given_up_does_not_spoil_the_next_one_where_connections_outlive_it() {
    let pool = pool(Terms { max: 1, outlives_its_borrower: true, ..TERMS });
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
