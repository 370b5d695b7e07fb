//! What a transfer refuses, each with one sentence, and that it has changed nothing then.

use std::path::Path;

use obscura_server::config::Config;
use obscura_server::store::{Limits, Store};
use obscura_server::telemetry::metrics::Metrics;

use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Postgres};

use crate::harness::{Binary, Database, Device, Finished, PATIENCE, eventually};
use crate::transfer::place::Place;
use crate::transfer::{files_of, stopped_server};

async fn run(arguments: &[String]) -> Finished {
    Binary::run(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[]).await
}

/// Runs a transfer of the tables, which has to be refused, and answers why.
async fn refusal(place: &Place, from: &Path) -> String {
    refusal_of(&place.transfer_arguments(from)).await
}

async fn refusal_of(arguments: &[String]) -> String {
    let finished = run(arguments).await;
    assert_eq!(finished.status.code(), Some(1), "{}", finished.output);
    let sentence = finished.output.lines().last().unwrap().to_owned();
    assert!(sentence.starts_with("obscura-server: "), "{}", finished.output);
    sentence
}

/// Makes the tables of a target, as a server that was started on it too early would.
async fn make_tables(place: &Place) {
    let url = format!("--db-url={}", place.url());
    let config = Config::parse_from(["obscura-server", &url], |_| None).unwrap().config;
    let store = Store::open(&config.database, Limits::of(&config), &Metrics::unexported()).await.unwrap();
    store.close().await;
}

/// A transfer that can't take in rows of this table for as long as the connection is held.
async fn stuck_at(place: &Place, folder: &Path, table: &str) -> (Binary, PoolConnection<Postgres>) {
    stuck_behind(place, folder, table, "EXCLUSIVE").await
}

/// A transfer that has to wait for a lock that conflicts with this one, for as long as the connection is held.
async fn stuck_behind(place: &Place, folder: &Path, table: &str, mode: &str) -> (Binary, PoolConnection<Postgres>) {
    make_tables(place).await;
    let database = place.database().await;
    let Database::Postgres(pool) = &database else { panic!("a PostgreSQL database") };
    let mut holder = pool.acquire().await.unwrap();
    let hold = format!("BEGIN; LOCK TABLE {table} IN {mode} MODE");
    sqlx::raw_sql(AssertSqlSafe(hold)).execute(&mut *holder).await.unwrap();
    let mut arguments = place.transfer_arguments(folder);
    arguments.extend(["--attachments".to_owned(), "--db-lock-timeout-ms=60000".to_owned()]);
    arguments.extend(place.storage());
    let transfer = Binary::begin(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let waits = format!("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass");
    eventually("the transfer to get there", async || database.number(&waits).await > 0).await;
    (transfer, holder)
}

async fn release(mut holder: PoolConnection<Postgres>) {
    sqlx::raw_sql("ROLLBACK").execute(&mut *holder).await.unwrap();
}

/// A transfer that was killed when it came to this table.
async fn interrupt_at(place: &Place, folder: &Path, table: &str) {
    let (mut transfer, holder) = stuck_at(place, folder, table).await;
    transfer.kill();
    release(holder).await;
}

#[tokio::test]
async fn a_source_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let _server = Binary::start_embedded(folder.path(), &[]).await;
    let sentence = refusal(&Place::new().await, folder.path()).await;
    assert!(sentence.contains("another server is already running on"), "{sentence}");
}

#[tokio::test]
async fn what_is_no_source_or_no_target_is_refused() {
    let place = Place::new().await;
    let folder = tempfile::tempdir().unwrap();
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("there is no database at"), "{sentence}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something was made there");
    std::fs::write(folder.path().join("obscura.db"), "").unwrap();
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("is not the database of an embedded server"), "{sentence}");
    let mut arguments = place.transfer_arguments(folder.path());
    arguments[2] = "--to=sqlite:a.db".to_owned();
    let sentence = refusal_of(&arguments).await;
    assert!(sentence.contains("--to or --db-url takes postgres://"), "{sentence}");
    let sentence = refusal_of(&arguments[..2]).await;
    assert!(sentence.contains("name the new database by --to or --db-url"), "{sentence}");
    arguments[2] = "--to=postgres://user:hunter2@127.0.0.1:1/db".to_owned();
    stopped_server(folder.path()).await;
    let sentence = refusal_of(&arguments).await;
    assert!(sentence.contains("no database answers at 127.0.0.1:1 (--to or --db-url)"), "{sentence}");
    assert!(!sentence.contains("hunter2"), "{sentence}");
}

#[tokio::test]
async fn a_source_of_another_version_is_refused() {
    let place = Place::new().await;
    let folder = tempfile::tempdir().unwrap();
    stopped_server(folder.path()).await;
    let database = Database::of_embedded(folder.path()).await;
    database.execute("INSERT INTO _sqlx_migrations SELECT 99, '', '', 1, x'', 0").await;
    database.close().await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("written by a newer version"), "{sentence}");
    let database = Database::of_embedded(folder.path()).await;
    database.execute("DELETE FROM _sqlx_migrations").await;
    database.close().await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("written by an older version") && sentence.contains("start this version"), "{sentence}");
}

#[tokio::test]
async fn a_log_without_its_index_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    Device::register(&server.client()).await;
    server.kill();
    std::fs::remove_file(folder.path().join("obscura.db-shm")).unwrap();
    let before = files_of(folder.path());
    let sentence = refusal(&Place::new().await, folder.path()).await;
    assert!(sentence.contains("start the embedded server on it once"), "{sentence}");
    assert_eq!(files_of(folder.path()), before);
}

#[tokio::test]
async fn a_target_with_data_is_refused_and_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    stopped_server(folder.path()).await;
    let place = Place::new().await;
    make_tables(&place).await;
    let database = place.database().await;
    database.execute("INSERT INTO users VALUES (gen_random_uuid(), 'somebody', 'x', 'x')").await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("is not empty (there are rows in users)"), "{sentence}");
    assert_eq!(database.text("SELECT username FROM users").await, "somebody");
}

#[tokio::test]
async fn a_target_that_a_server_uses_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let old = stopped_server(folder.path()).await;
    let place = Place::new().await;
    let _server = place.start_server(&old, "a secret that is long enough").await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("a server runs on the database at"), "{sentence}");
}

#[tokio::test]
async fn a_second_transfer_at_the_same_time_is_refused() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for folder in &folders {
        stopped_server(folder.path()).await;
    }
    let place = Place::new().await;
    let (_first, holder) = stuck_at(&place, folders[0].path(), "sends").await;
    let sentence = refusal(&place, folders[1].path()).await;
    assert!(sentence.contains("another transfer into the database"), "{sentence}");
    release(holder).await;
}

#[tokio::test]
async fn an_unfinished_target_takes_no_server_and_no_other_source_and_shows_what_was_changed() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_server(folder.path()).await;
    let place = Place::new().await;
    interrupt_at(&place, folder.path(), "attachments").await;

    let options = [format!("--db-url={}", place.url()), "--jwt-secret=a secret that is long enough".to_owned()];
    let [url, secret] = &options;
    let storage = place.storage().remove(0);
    let refused =
        Binary::run(&[url, secret, &storage, "--server-port=0", "--mgmt-port=0", "--pubsub-url=local:"], &[]).await;
    assert!(!refused.status.success() && refused.output.contains("has not finished"), "{}", refused.output);

    let other = tempfile::tempdir().unwrap();
    stopped_server(other.path()).await;
    let sentence = refusal(&place, other.path()).await;
    assert!(sentence.contains("from another database"), "{sentence}");

    let database = place.database().await;
    database.execute("UPDATE devices SET name = 'somebody else' WHERE no = 1").await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("the table devices differs in its content"), "{sentence}");
    database.execute("UPDATE devices SET name = NULL WHERE no = 1; DELETE FROM one_time_prekeys WHERE no = 3").await;
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("the table one_time_prekeys differs: 59 rows have arrived where 60"), "{sentence}");
    drop(server);
}

#[tokio::test]
async fn a_lost_connection_is_told_of_and_the_next_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    stopped_server(folder.path()).await;
    let place = Place::new().await;
    let (mut transfer, holder) = stuck_at(&place, folder.path(), "one_time_prekeys").await;
    let database = place.database().await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'obscura-server transfer'";
    assert_eq!(database.number(end).await, 1);
    assert_eq!(transfer.exit(PATIENCE).await.code(), Some(1));
    let said = transfer.output();
    assert!(
        said.contains("the connection to the target was lost") && said.contains("run the same command again"),
        "{said}"
    );
    release(holder).await;
    let finished = run(&place.transfer_arguments(folder.path())).await;
    assert!(finished.status.success() && finished.output.contains("Going on where"), "{}", finished.output);
    assert!(!finished.output.contains("users: 2 of 2 copied"), "what has arrived is not copied again");
}

#[tokio::test]
async fn bytes_that_have_gone_meanwhile_are_told_of_and_copied_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await;
    let answer = alice.request("POST", "/v1/attachments").body(vec![7; 1000]).send().await.expect(201).json();
    alice.request("POST", "/v1/attachments").body(vec![8; 1000]).send().await.expect(201);
    server.kill();
    let place = Place::new().await;
    // What stands in the way of the statistics lets rows and bytes pass.
    let (mut transfer, holder) = stuck_behind(&place, folder.path(), "users", "SHARE UPDATE EXCLUSIVE").await;
    transfer.kill();
    release(holder).await;
    let stored = place.attachment(answer["id"].as_str().unwrap());
    assert_eq!(std::fs::read(&stored).unwrap(), [7; 1000]);
    std::fs::write(&stored, [0; 1000]).unwrap();
    let mut again = place.begin_transfer(folder.path());
    assert_eq!(again.exit(PATIENCE).await.code(), Some(1));
    assert!(
        again.output().contains("differ: 1 of 2 are missing from the new storage or differ there"),
        "{}",
        again.output()
    );
    place.transfer(folder.path(), PATIENCE).await;
    assert_eq!(std::fs::read(&stored).unwrap(), [7; 1000]);
}

#[tokio::test]
async fn a_source_on_which_a_server_has_run_since_is_another_one() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_server(folder.path()).await;
    let place = Place::new().await;
    interrupt_at(&place, folder.path(), "sends").await;
    let again = server.start_again(&[]).await;
    Device::register(&again.client()).await;
    drop(again);
    let sentence = refusal(&place, folder.path()).await;
    assert!(sentence.contains("or a server has run on this one since"), "{sentence}");
}

#[tokio::test]
async fn attachments_are_not_copied_onto_themselves_nor_from_a_wrong_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await;
    alice.request("POST", "/v1/attachments").body(vec![7; 1000]).send().await.expect(201);
    server.kill();
    let before = files_of(folder.path());
    let place = Place::new().await;
    let arguments =
        |more: &[String]| [&place.transfer_arguments(folder.path()), &["--attachments".to_owned()][..], more].concat();
    let onto_itself = format!("--storage-endpoint=file:{}/attachments", folder.path().display());
    let sentence = refusal_of(&arguments(&[onto_itself])).await;
    assert!(sentence.contains("are where the target would have them"), "{sentence}");
    let missing = arguments(&[&place.storage()[..], &["--attachments-from=/nowhere".to_owned()]].concat());
    let sentence = refusal_of(&missing).await;
    assert!(sentence.contains("--attachments-from"), "{sentence}");
    let empty = tempfile::tempdir().unwrap();
    let wrong =
        arguments(&[&place.storage()[..], &[format!("--attachments-from={}", empty.path().display())]].concat());
    let sentence = refusal_of(&wrong).await;
    assert!(sentence.contains("none of the 1 attachments is in"), "{sentence}");
    assert_eq!(files_of(folder.path()), before);
}
