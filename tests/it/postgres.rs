//! The PostgreSQL that fault tests use: it comes back with what it had, and is away in the ways that it says.

use std::time::Duration;

use sqlx::{Connection, PgConnection};

use crate::harness::{Postgres, within};

async fn connect(postgres: &Postgres) -> PgConnection {
    within("a connection", PgConnection::connect(&postgres.url())).await.unwrap()
}

async fn count(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    within("an answer", sqlx::query_scalar("SELECT count(*) FROM kept").fetch_one(connection)).await
}

#[tokio::test]
async fn it_keeps_what_was_committed_across_a_stop_and_a_kill_on_the_same_port() {
    let mut postgres = Postgres::start().await;
    let (url, port) = (postgres.url(), postgres.port());
    let mut connection = connect(&postgres).await;
    sqlx::raw_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)").execute(&mut connection).await.unwrap();
    postgres.stop().await;
    count(&mut connection).await.unwrap_err();
    PgConnection::connect(&url).await.unwrap_err();
    postgres.start_again().await;
    let mut connection = connect(&postgres).await;
    sqlx::raw_sql("INSERT INTO kept VALUES (2)").execute(&mut connection).await.unwrap();
    postgres.kill().await;
    count(&mut connection).await.unwrap_err();
    postgres.start_again().await;
    assert_eq!((postgres.port(), count(&mut connect(&postgres).await).await.unwrap()), (port, 2));
}

#[tokio::test]
async fn frozen_it_answers_no_client_and_thawed_it_goes_on() {
    let postgres = Postgres::start().await;
    let mut connection = connect(&postgres).await;
    sqlx::raw_sql("CREATE TABLE kept (id int)").execute(&mut connection).await.unwrap();
    postgres.freeze();
    let mut asked = tokio::spawn(async move { count(&mut connection).await });
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut asked).await.is_err(), "it answers");
    let other = PgConnection::connect(&postgres.url());
    assert!(tokio::time::timeout(Duration::from_millis(300), other).await.is_err(), "it takes a connection");
    postgres.thaw();
    assert_eq!(within("the late answer", asked).await.unwrap().unwrap(), 0);
}
