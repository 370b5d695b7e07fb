//! What stands between a node and its PostgreSQL, or has become of it: a pooler, another encoding, a primary that was
//! demoted.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use uuid::Uuid;

use super::bystanders::{node_options, psql};
use crate::harness::{Binary, Device, PgBouncer, Postgres, Proxy, eventually, send_request, within_time};

/// The end of a node that can't start.
async fn refusal(url: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let options = node_options(url, folder.path());
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let finished = Binary::run(&[&options[..], &["--server-port=0", "--mgmt-port=0"]].concat(), &[]).await;
    assert!(!finished.status.success(), "{}", finished.output);
    finished.output
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pgbouncer_that_pools_sessions_mail_flows_and_the_settings_hold() {
    let postgres = Postgres::start().await;
    psql(&postgres.url(), "ALTER SYSTEM SET synchronous_commit = off").await;
    psql(&postgres.url(), "SELECT pg_reload_conf()").await;
    let pooler = PgBouncer::start(&postgres, "session").await;
    let folder = tempfile::tempdir().unwrap();
    let mut options = node_options(&pooler.url("postgres"), folder.path());
    options.extend(["--db-lock-timeout-ms=700".to_owned(), "--db-statement-timeout-ms=9000".to_owned()]);
    let node = Binary::start_node(&options).await;
    let (alice, bob) = (Device::register(&node.client()).await, Device::register(&node.client()).await);
    // What holds within the transaction of a send, told by a trigger.
    psql(
        &postgres.url(),
        "CREATE TABLE held (settings text);
         CREATE FUNCTION note_what_holds() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           INSERT INTO held SELECT concat_ws(' ', current_setting('synchronous_commit'), current_setting('statement_timeout'));
           RETURN NEW; END $$;
         CREATE TRIGGER note BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION note_what_holds()",
    )
    .await;
    let mut socket = bob.connect().await;
    for text in ["one", "two", "three"] {
        alice.send_to(&bob, text).await;
        let envelope = socket.expect_message(text).await;
        socket.ack(&[envelope]).await;
    }
    socket.close().await;
    let mut again = bob.connect().await;
    again.until_pong().await;
    node.management().get("/readyz").send().await.expect(200);

    // A send was durable and bounded in time, whatever the server's own settings are.
    let options: sqlx::postgres::PgConnectOptions = postgres.url().parse().unwrap();
    let mut holder = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let held: Vec<String> = sqlx::query_scalar("SELECT settings FROM held").fetch_all(&mut holder).await.unwrap();
    assert_eq!(held, ["on 9s"; 3]);

    // The limit for locks is what was asked for: 700 ms, and not for ever.
    let hold = format!("BEGIN; SELECT 1 FROM account_locks WHERE user_id = '{}' FOR UPDATE", bob.user);
    sqlx::raw_sql(sqlx::AssertSqlSafe(hold)).execute(&mut holder).await.unwrap();
    let since = Instant::now();
    bob.request("POST", "/v1/attachments").body("x").send().await.expect(503);
    assert!(since.elapsed() < Duration::from_secs(4), "it waited for {:?}", since.elapsed());
    drop(holder);
}

#[tokio::test]
async fn a_pooler_of_transactions_or_statements_is_refused_with_a_sentence() {
    let postgres = Postgres::start().await;
    for mode in ["transaction", "statement"] {
        let pooler = PgBouncer::start(&postgres, mode).await;
        let output = refusal(&pooler.url("postgres")).await;
        assert!(output.contains("let it pool sessions (PgBouncer: pool_mode = session)"), "{mode}: {output}");
    }
}

#[tokio::test]
async fn what_a_pooler_refuses_is_said_as_it_is() {
    let postgres = Postgres::start().await;
    let pooler = PgBouncer::start(&postgres, "session").await;
    let output = refusal(&pooler.url("another")).await;
    assert!(output.contains("check the user, the password and the name in the URL"), "{output}");
    let output = refusal(&format!("{}?options=-c%20jit%3Doff", pooler.url("postgres"))).await;
    assert!(output.contains("ignore parameters that it doesn't know"), "{output}");
}

#[tokio::test]
async fn a_database_of_another_encoding_is_refused_with_a_sentence_that_says_how_to_make_one() {
    let postgres = Postgres::start().await;
    for (name, encoding) in [("western", "WIN1252"), ("bytes", "SQL_ASCII")] {
        let make = format!("CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0");
        psql(&postgres.url(), &make).await;
        let server = postgres.url();
        let output = refusal(&format!("{}/{name}", server.trim_end_matches("/postgres"))).await;
        assert!(output.contains(&format!("has the encoding {encoding}")), "{output}");
        assert!(output.contains("ENCODING 'UTF8'"), "{output}");
    }
}

/// The primary was demoted and goes on answering; its name leads to the new one.
#[tokio::test(flavor = "multi_thread")]
async fn connections_to_a_demoted_postgres_are_not_reused_and_readiness_heals_within_seconds() {
    let mut old = Postgres::start().await;
    let proxy = Proxy::start(([127, 0, 0, 1], old.port()).into()).await;
    let url = old.url().replace(&format!(":{}/", old.port()), &format!(":{}/", proxy.address().port()));
    let folder = tempfile::tempdir().unwrap();
    let node = Binary::start_node(&node_options(&url, folder.path())).await;
    let (alice, bob) = (Device::register(&node.client()).await, Device::register(&node.client()).await);
    let new = old.twin().await;
    let send = async || alice.post_messages(Uuid::new_v4(), &send_request(&[(&bob, b"x")])).await.status;
    let many = async |count: usize| join_all((0..count).map(|_| send())).await;
    eventually("the node to be back", async || send().await == 200).await;
    // As many connections as there may be.
    let looks = (0..60).map(|_| alice.request("GET", "/v1/devices").try_send());
    join_all(looks).await;

    psql(&old.url(), "ALTER SYSTEM SET default_transaction_read_only = on").await;
    psql(&old.url(), "SELECT pg_reload_conf()").await;
    eventually("the old one to take no writes", async || node.management().get("/readyz").send().await.status == 503)
        .await;
    proxy.set_target(([127, 0, 0, 1], new.port()).into());
    let since = Instant::now();
    within_time(Duration::from_secs(5), "the node to be ready", async {
        while node.management().get("/readyz").send().await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let statuses = many(48).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}, {:?} after the failover", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(8), "{:?}", since.elapsed());
}
