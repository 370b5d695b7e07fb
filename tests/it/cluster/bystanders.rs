//! One thing is stuck, held, lost or full, and everybody else goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use obscura_server::model::ids::{DeviceId, DeviceNo, IdempotencyKey, UserId};
use obscura_server::model::message::{Recipient, Sealed, SendRequest, Sender};
use sqlx::{ConnectOptions as _, Connection};
use uuid::Uuid;

use crate::harness::{Binary, Device, Event, Keys, Postgres, TestServer, eventually, send_request, within};

pub fn node_options(url: &str, folder: &std::path::Path) -> Vec<String> {
    vec![
        format!("--db-url={url}"),
        "--pubsub-url=local:".to_owned(),
        format!("--storage-endpoint=file:{}", folder.display()),
        "--jwt-secret=the secret of a server under test".to_owned(),
        "--ws-look-interval-secs=86400".to_owned(),
    ]
}

pub async fn psql(url: &str, statement: &str) {
    let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
    // Statements of tests have ids in them, those of servers never.
    let mut connection = options.disable_statement_logging().connect().await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.unwrap();
}

/// One account is locked by somebody who hangs (another node that is frozen in its group, up to 30 s). People who have
/// nothing to do with it must go on.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_another_transaction_holds_stops_no_other_account() {
    let a = TestServer::start_node_with(|config| {
        config.database.lock_timeout = Duration::from_secs(5);
        config.database.statement_timeout = Duration::from_secs(10);
        config.database.acquire_timeout = Duration::from_secs(3);
    })
    .await;
    let (alice, bob, carol, dave) = (a.account().await, a.account().await, a.account().await, a.account().await);
    let database = a.database().await;
    let held = database.hold_account(bob.user).await;
    let stop = Arc::new(AtomicBool::new(false));
    let to_the_locked = {
        let stop = stop.clone();
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                alice.post_messages(Uuid::new_v4(), &send_request(&[(&bob, b"x")])).await;
            }
        })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (mut statuses, mut longest) = (BTreeMap::<u16, u32>::new(), Duration::ZERO);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(8) {
        let since = Instant::now();
        let answer = carol.post_messages(Uuid::new_v4(), &send_request(&[(&dave, b"y")])).await;
        longest = longest.max(since.elapsed());
        *statuses.entry(answer.status).or_default() += 1;
    }
    stop.store(true, Ordering::Relaxed);
    held.release().await;
    to_the_locked.await.unwrap();
    assert!(!statuses.contains_key(&503) && longest < Duration::from_secs(1), "{statuses:?} {longest:?}");
}

/// Two clients hang up: the group of the first one waits for a lock, the other one for that group, and the server stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_waits_for_an_account_when_the_server_stops_is_stored() {
    let node = TestServer::start_node_with(|_| {}).await;
    let _other = node.start_beside().await; // keeps the database
    let (alice, bob) = (node.account().await, node.account().await);
    let database = node.database().await;
    let no = database.number(&format!("SELECT no FROM devices WHERE id = '{}'", alice.id)).await;
    let message_writer = node.server().app().message_writer.clone();
    let held = database.hold_account(bob.user).await;
    let send_and_hang_up = || {
        let user = |id: Uuid| UserId::from_bytes(id.as_bytes()).unwrap();
        let device = |id: Uuid| DeviceId::from_bytes(id.as_bytes()).unwrap();
        let sealed = Sealed(Bytes::from_static(b"x"));
        let sender = Sender { user: user(alice.user), device: device(alice.id), no: DeviceNo(no) };
        let recipients =
            vec![Recipient { user: user(bob.user), submissions: vec![(device(bob.id), sealed)], throttled_for: None }];
        let mail = SendRequest { sender, key: IdempotencyKey::random(), digest: [0; 16], recipients };
        assert!(message_writer.send(mail).now_or_never().is_none(), "it can't be stored yet");
    };
    send_and_hang_up();
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually("the first group to wait", async || database.number(waits).await == 1).await;
    send_and_hang_up();
    tokio::join!(node.stop(), held.release());
    assert_eq!(database.number("SELECT count(*) FROM messages").await, 2);
}

/// A crowd asks while PostgreSQL is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_is_told_of_an_outage_in_time() {
    let mut postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let node = Binary::start_node(&node_options(&postgres.url(), folder.path())).await;
    let alice = Device::register(&node.client()).await;
    postgres.stop().await;
    let asking = (0..3000).map(|_| {
        let alice = alice.clone();
        tokio::spawn(async move {
            let since = Instant::now();
            let answer = alice.request("GET", "/v1/devices").try_send().await;
            (answer.map_or(0, |answer| answer.status), since.elapsed())
        })
    });
    let answers: Vec<(u16, Duration)> = join_all(asking).await.into_iter().map(Result::unwrap).collect();
    let mut statuses = BTreeMap::<u16, u32>::new();
    answers.iter().for_each(|(status, _)| *statuses.entry(*status).or_default() += 1);
    let mut times: Vec<Duration> = answers.iter().map(|(_, time)| *time).collect();
    times.sort();
    assert!(statuses.keys().all(|status| *status == 503), "{statuses:?}");
    assert!(times[times.len() - 1] < Duration::from_secs(15));
}

/// Somebody has accounts whose inboxes are all full, and writes to all of them at once. Cutting them takes time, in which
/// others are answered.
#[tokio::test(flavor = "multi_thread")]
async fn mail_to_many_full_inboxes_lets_others_pass() {
    let postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let options = node_options(&postgres.url(), folder.path());
    let node = Binary::start_node(&options).await;
    let (alice, carol, dave) = (
        Device::register(&node.client()).await,
        Device::register(&node.client()).await,
        Device::register(&node.client()).await,
    );
    let few = Keys { one_time: 0, pq_one_time: None };
    let mut full = Vec::new();
    for _ in 0..30 {
        let first = Device::register_with(&node.client(), few).await;
        for _ in 0..9 {
            full.push(Device { id: Uuid::new_v4(), ..first.clone() });
        }
        full.push(first);
    }
    let rows: Vec<String> =
        full.iter().map(|device| format!("('{}', '{}', 1, false)", device.id, device.user)).collect();
    psql(&postgres.url(), &format!(
        "INSERT INTO devices (id, user_id, registration_id, is_primary) VALUES {} ON CONFLICT (id) DO NOTHING;
         INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
             SELECT n, d.no, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
                    (extract(epoch FROM now()) * 1000)::bigint, '\\x00'
             FROM generate_series(1, 1000) n, devices d WHERE NOT EXISTS (SELECT 1 FROM one_time_prekeys o WHERE o.device_no = d.no);
         UPDATE account_locks SET at_most = 1000 WHERE user_id IN (SELECT user_id FROM devices GROUP BY user_id HAVING count(*) > 1);
         SELECT nextval('message_blocks');
         ANALYZE", rows.join(", "))).await;
    let requests: Vec<_> = full
        .chunks(100)
        .map(|devices| send_request(&devices.iter().map(|device| (device, &b"x"[..])).collect::<Vec<_>>()))
        .collect();
    let flood = async {
        let answers = join_all(requests.iter().map(|request| alice.post_messages(Uuid::new_v4(), request))).await;
        answers.into_iter().for_each(|answer| assert_eq!(answer.status, 429, "all of them are full"));
        Instant::now()
    };
    let bystander = async {
        carol.send_to(&dave, "y").await;
        Instant::now()
    };
    let (flooded, passed) = tokio::join!(flood, bystander);
    assert!(passed < flooded, "whoever has nothing to do with it waited for all of it");
    let most = "SELECT max(waiting) FROM (SELECT count(*) AS waiting FROM messages GROUP BY device_no) inboxes";
    let mut look = sqlx::PgConnection::connect(&postgres.url()).await.unwrap();
    let most: i64 = sqlx::query_scalar(most).fetch_one(&mut look).await.unwrap();
    assert_eq!(most, 1000, "the limit holds");
}

/// The answer to a commit is lost. The message is there; its receiver is connected.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_without_an_answer_is_told_to_open_sockets() {
    let postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let node = Binary::start_node(&node_options(&postgres.url(), folder.path())).await;
    let (alice, bob) = (Device::register(&node.client()).await, Device::register(&node.client()).await);
    let tablet = bob.link().await;
    let (mut socket, mut tablets) = (bob.connect().await, tablet.connect().await);
    socket.until_pong().await;
    tablets.until_pong().await;
    let url = postgres.url();
    // The commit is on disk here and waits for a standby that isn't there; then its connection dies.
    let lose_commit = async || {
        for _ in 0..200 {
            psql(&url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    psql(&url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await;
    psql(&url, "SELECT pg_reload_conf()").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let request = send_request(&[(&bob, b"durable"), (&tablet, b"durable")]);
    let (answer, ()) = tokio::join!(alice.post_messages(Uuid::new_v4(), &request), lose_commit());
    answer.expect(503);
    let removing = bob.request("DELETE", &format!("/v1/devices/{}", tablet.id)).send();
    let (answer, ()) = tokio::join!(removing, lose_commit());
    answer.expect(503);
    psql(&url, "ALTER SYSTEM RESET synchronous_standby_names").await;
    psql(&url, "SELECT pg_reload_conf()").await;
    socket.expect_message("durable").await;
    let end = within("the socket of the removed device to be closed", tablets.until_end()).await;
    assert!(matches!(end.last(), Some(Event::End | Event::Broken(_))), "{end:?}");
}

/// The database or its role has another default isolation.
#[tokio::test(flavor = "multi_thread")]
async fn the_default_isolation_of_the_database_does_not_matter() {
    let a = TestServer::start_node_with(|_| {}).await;
    let database = a.database().await;
    database.execute("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = %L', current_database(), 'repeatable read'); END $$").await;
    let b = a.start_beside().await;
    let (alice, bob) = (b.account().await, b.account().await);
    let tablet = bob.link().await;
    // What `remove_device` does at another node, held open before its commit.
    let held = database.hold_account(bob.user).await;
    let sending = tokio::spawn({
        let (alice, request) = (alice.clone(), send_request(&[(&bob, b"both"), (&tablet, b"both")]));
        async move { alice.post_messages(Uuid::new_v4(), &request).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A second connection stands for the statements of the same transaction.
    database.execute(&format!("DELETE FROM device_keys; DELETE FROM one_time_prekeys; DELETE FROM sessions WHERE device_no = (SELECT no FROM devices WHERE id = '{0}'); DELETE FROM devices WHERE id = '{0}'", tablet.id)).await;
    held.release().await;
    sending.await.unwrap().expect(200);
    let orphans =
        database.number("SELECT count(*) FROM messages WHERE device_no NOT IN (SELECT no FROM devices)").await;
    assert_eq!(orphans, 0);
}

/// PostgreSQL takes no writes at the moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_takes_no_writes_is_not_ready_and_is_waited_for() {
    let postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let options = node_options(&postgres.url(), folder.path());
    let node = Binary::start_node(&options).await;
    let alice = Device::register(&node.client()).await;
    psql(&postgres.url(), "ALTER SYSTEM SET default_transaction_read_only = on").await;
    psql(&postgres.url(), "SELECT pg_reload_conf()").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    alice.post_messages(Uuid::new_v4(), &send_request(&[])).await.expect(503);
    node.management().get("/readyz").send().await.expect(503);
    let starting = tokio::spawn(async move { Binary::start_node(&options).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!starting.is_finished(), "it gave up, or it started on a database that takes no writes");
    psql(&postgres.url(), "ALTER SYSTEM RESET default_transaction_read_only").await;
    psql(&postgres.url(), "SELECT pg_reload_conf()").await;
    let second = within("the second node to start", starting).await.unwrap();
    Device::register(&second.client()).await;
}
