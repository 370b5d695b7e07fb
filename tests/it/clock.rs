//! The clock of the machine is wrong for a while, at the start or in the middle: nothing is deleted or hidden, and when it is
//! right again, nothing that was stored meanwhile is in anybody's way.

use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use crate::harness::{Binary, Database, Device, Keys, PASSWORD, TestServer, deployment, eventually, send_request};

const DAY: Duration = Duration::from_hours(24);
const FORTY_DAYS_MILLIS: i64 = 40 * 24 * 60 * 60 * 1000;

/// How often the sweeps over messages and attachments have ended well.
async fn sweeps(server: &TestServer) -> [u64; 2] {
    let page = server.management().get("/metrics").send().await.expect(200);
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    ["expired messages", "expired attachments"].map(|job| {
        let of_job = |line: &&str| {
            line.starts_with("obscura_job_runs_total")
                && line.contains(&format!("\"{job}\""))
                && line.contains("\"done\"")
        };
        let line = page.lines().find(of_job);
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map_or(0, |runs| runs as u64)
    })
}

/// Waits until both sweeps have begun and ended once more.
async fn swept(server: &TestServer) {
    let before = sweeps(server).await;
    eventually("the sweeps to come by", async || {
        let now = sweeps(server).await;
        now.iter().zip(before).all(|(now, before)| *now >= before + 2)
    })
    .await;
}

async fn upload(device: &Device) -> String {
    let answer = device.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201).json();
    answer["id"].as_str().unwrap().to_owned()
}

async fn download(device: &Device, id: &str) -> u16 {
    device.request("GET", &format!("/v1/attachments/{id}")).send().await.status
}

async fn refreshed(device: &Device) -> Device {
    let body = json!({"refreshToken": device.refresh_token});
    let answer = device.client.post("/v1/session/refresh").json(&body).send().await.expect(200).json();
    Device::from_answer(&device.client, device.identity.clone(), device.username.clone(), &answer)
}

/// Rows with a time that lies more than two days ahead of what it may be, in milliseconds.
async fn rows_of_the_future(server: &TestServer) -> i64 {
    let now = server.clock.wall().millis() + 2 * DAY.as_millis() as i64;
    let session = now + server.config().auth.refresh_token_lifetime.as_millis() as i64;
    let database = server.database().await;
    let query = format!(
        "SELECT (SELECT count(*) FROM messages WHERE received_at > {now}) \
              + (SELECT count(*) FROM attachments WHERE created_at > {now}) \
              + (SELECT count(*) FROM upload_debts WHERE paid_at > {now}) \
              + (SELECT count(*) FROM sends WHERE sent_at > {now} OR review_at > {now}) \
              + (SELECT count(*) FROM send_debts WHERE paid_at > {now}) \
              + (SELECT count(*) FROM gateway_tickets WHERE expires_at > {now}) \
              + (SELECT count(*) FROM sessions WHERE expires_at > {session})"
    );
    database.number(&query).await
}

async fn sweeping_server() -> TestServer {
    TestServer::start_with(|config| {
        config.messaging.cleanup_interval = Duration::from_millis(100);
        config.attachments.cleanup_interval = Duration::from_millis(100);
        config.auth.refresh_token_cleanup_interval = Duration::from_millis(100);
        // Nothing may be left of the day but for what a wrong clock has taken.
        config.attachments.bytes_per_day = 10 * 4096;
    })
    .await
}

#[tokio::test]
async fn a_clock_that_is_forty_days_wrong_for_a_while_deletes_hides_and_blocks_nothing() {
    for wrong in [FORTY_DAYS_MILLIS, -FORTY_DAYS_MILLIS] {
        let server = sweeping_server().await;
        let (alice, bob) = (server.account().await, server.account().await);
        alice.send_to(&bob, "before").await;
        let before = upload(&alice).await;
        let (key, request) = (Uuid::new_v4(), send_request(&[(&bob, b"acknowledged")]));
        alice.post_messages(key, &request).await.expect(200);
        let mut socket = bob.connect().await;
        let mail = socket.messages(2).await;
        socket.ack(&mail[1..]).await;
        let database = server.database().await;
        eventually("the ack to be written", async || database.queued(&bob).await == 1).await;
        drop(socket);

        server.clock.set_wrong(wrong);
        swept(&server).await;
        assert_eq!(download(&bob, &before).await, 200);
        bob.connect().await.expect_message("before").await;
        alice.post_messages(key, &request).await.expect(200);
        assert_eq!(database.queued(&bob).await, 1, "a repeated key acts twice");
        // Tokens of before are good, and those of now too.
        alice.request("GET", "/v1/devices").send().await.expect(200);
        let alice = refreshed(&alice).await;
        let carol = server.account().await;
        alice.send_to(&bob, "meanwhile").await;
        carol.request("GET", "/v1/devices").send().await.expect(200);
        let meanwhile = upload(&carol).await;
        assert_eq!(download(&bob, &meanwhile).await, 200);
        let tablet = carol.link().await;
        swept(&server).await;

        server.clock.set_wrong(0);
        swept(&server).await;
        for id in [&before, &meanwhile] {
            assert_eq!(download(&bob, id).await, 200);
        }
        let mut socket = bob.connect().await;
        let texts: Vec<_> = socket.messages(2).await.into_iter().map(|envelope| envelope.message).collect();
        assert_eq!(texts, ["before", "meanwhile"]);
        for device in [&alice, &carol, &tablet] {
            let device = refreshed(device).await;
            device.request("GET", "/v1/devices").send().await.expect(200);
            device.log_in().await.connect().await.until_pong().await;
        }
        upload(&carol.log_in().await).await;
        eventually("times of the wrong clock to be corrected", async || rows_of_the_future(&server).await == 0).await;
        assert!(server.management().get("/readyz").send().await.status == 200);
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_at_the_start_deletes_nothing_until_it_is_confirmed() {
    let mut server = sweeping_server().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "before").await;
    let before = upload(&alice).await;
    server.clock.set_wrong(FORTY_DAYS_MILLIS);
    server.restart().await;
    swept(&server).await;
    bob.connect().await.expect_message("before").await;
    assert_eq!(download(&bob, &before).await, 200);
    let bob = refreshed(&bob).await;
    alice.send_to(&bob, "meanwhile").await;

    // As `confirm-clock` does it.
    server.server().app().store.set_time(server.clock.wall()).await.unwrap();
    let database = server.database().await;
    eventually("what is forty days old to go", async || database.queued(&bob).await == 1).await;
    bob.connect().await.expect_message("meanwhile").await;
    assert_eq!(download(&bob.log_in().await, &before).await, 404);
}

/// Nothing is remembered before the first start of a version that remembers the time. The database server has a clock.
#[tokio::test]
async fn a_clock_that_is_wrong_at_the_first_start_of_all_is_compared_with_the_one_of_postgresql() {
    let mut server = TestServer::start_node_with(|config| {
        config.messaging.cleanup_interval = Duration::from_millis(100);
        config.attachments.cleanup_interval = Duration::from_millis(100);
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "before").await;
    let database = Database::open(&server.config().database).await;
    server.clock.set_wrong(FORTY_DAYS_MILLIS);
    server.restart_after(database.execute("DELETE FROM server_time")).await;
    swept(&server).await;
    bob.connect().await.expect_message("before").await;
    let ahead = server.clock.wall().millis() - database.number("SELECT seen_at FROM server_time").await;
    assert!(ahead > FORTY_DAYS_MILLIS / 2, "the wrong time is remembered");
}

/// The clock was wrong for longer than a doubt lasts, or before the server knew of doubts.
#[tokio::test]
async fn times_that_a_wrong_clock_has_left_are_corrected_and_block_nothing() {
    let server = sweeping_server().await;
    let (alice, bob) = (server.account().await, server.account().await);
    upload(&alice).await;
    let first = upload(&bob).await;
    alice.send_to(&bob, "kept").await;
    let database = server.database().await;
    let ahead = server.clock.wall().millis() + FORTY_DAYS_MILLIS;
    for change in [
        "upload_debts SET paid_at",
        "sessions SET expires_at",
        "attachments SET created_at",
        "messages SET received_at",
    ] {
        database.execute(&format!("UPDATE {change} = {ahead}")).await;
    }
    for column in ["tokens_void_to", "tokens_issued_to"] {
        database.execute(&format!("UPDATE devices SET {column} = {}", ahead / 1000)).await;
    }
    // `alice` refreshes, `bob` logs in: either is enough.
    let alice = refreshed(&alice).await;
    let bob = bob.log_in().await;
    for device in [&alice, &bob] {
        device.request("GET", "/v1/devices").send().await.expect(200);
        upload(device).await;
    }
    assert_eq!(download(&bob, &first).await, 200);
    bob.connect().await.expect_message("kept").await;
    eventually("the times to be corrected", async || rows_of_the_future(&server).await == 0).await;
    alice.log_out().await;
    let alice = alice.log_in().await;
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

/// A token of a clock that was weeks ahead would live for weeks.
#[tokio::test]
async fn an_access_token_of_a_wrong_clock_is_worth_nothing_when_the_clock_is_right() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    server.clock.set_wrong(FORTY_DAYS_MILLIS);
    server.clock.trust_wall_clock();
    let later = alice.log_in().await;
    later.request("GET", "/v1/devices").send().await.expect(200);
    server.clock.set_wrong(0);
    server.clock.trust_wall_clock();
    later.request("GET", "/v1/devices").send().await.expect(401);
    refreshed(&later).await.request("GET", "/v1/devices").send().await.expect(200);
}

/// A token of a clock that was weeks ahead would be good in those weeks, long after the session has been ended.
#[tokio::test]
async fn an_access_token_of_a_wrong_clock_does_not_come_back_after_the_session_was_ended() {
    for is_believed in [false, true] {
        let server = TestServer::start().await;
        let (alice, bob) = (server.account().await, server.account().await);
        server.clock.set_wrong(FORTY_DAYS_MILLIS);
        if is_believed {
            server.clock.trust_wall_clock();
        }
        let stolen = [alice.log_in().await, bob.log_in().await];
        server.clock.set_wrong(0);
        server.clock.trust_wall_clock();
        let alice = refreshed(&stolen[0]).await;
        alice.log_out().await;
        let [mut alice, mut bob] = [alice.log_in().await, stolen[1].log_in().await];
        // The tokens of a device whose void second lies in the future are good for everything.
        for device in [&alice, &bob] {
            device.request("GET", "/v1/devices").send().await.expect(200);
            device.request("PUT", "/v1/push-token").json(&json!({"token": "token"})).send().await.expect(204);
            device.connect().await.until_pong().await;
        }
        for day in 1..=42 {
            server.clock.advance(DAY);
            if day % 10 == 0 {
                (alice, bob) = (refreshed(&alice).await, refreshed(&bob).await);
                alice.request("GET", "/v1/devices").send().await.expect(200);
            }
            for token in &stolen {
                let answer = token.request("GET", "/v1/devices").send().await;
                assert_eq!(answer.status, 401, "after {day} days");
            }
        }
        (alice, bob) = (alice.log_in().await, bob.log_in().await);
        for device in [&alice, &bob] {
            device.request("GET", "/v1/devices").send().await.expect(200);
        }
    }
}

/// A machine that has slept: the monotonic clock stood still, so the trusted time is behind. A client goes by its own clock.
#[tokio::test]
async fn a_link_session_that_is_opened_while_the_clock_is_in_doubt_is_not_told_to_have_expired() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    for ahead in [2 * 60 * 60 * 1000, -FORTY_DAYS_MILLIS] {
        let right = server.clock.wall().seconds() + ahead.max(0) / 1000;
        server.clock.set_wrong(ahead);
        let body = json!({"username": alice.username, "password": PASSWORD});
        let session = server.client().post("/v1/link-sessions").json(&body).send().await.expect(201).json();
        let left = session["expiresAt"].as_i64().unwrap() - right;
        assert!((500..=660).contains(&left), "{left} s are left of ten minutes");
        let id = session["id"].as_str().unwrap();
        alice.request("PUT", &format!("/v1/link-sessions/{id}")).body("parcel").send().await.expect(204);
        alice.finish_link(id, Keys::default()).await;
        server.clock.set_wrong(0);
    }
}

/// Variables by which a process takes its wall clock from a file; its monotonic clock stays what it is.
fn faked<'a>(library: &'a str, file: &'a str) -> [(&'a str, &'a str); 5] {
    [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", file),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ]
}

/// The real program, and the clock of a whole process.
#[tokio::test]
async fn the_program_survives_forty_days_at_the_start_and_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let hand = folder.path().join("faketime");
    let (library, file) = (deployment::service("OBSCURA_TEST_FAKETIME"), hand.to_str().unwrap().to_owned());
    let set = |time: &str| std::fs::write(&hand, format!("{time}\n")).unwrap();
    let data = folder.path().join("data");
    // A bucket refuses requests that are signed by a wrong clock, so attachments are in a folder here.
    let storage = format!("--storage-endpoint=file:{}", folder.path().join("attachments").to_str().unwrap());
    let options = ["--messaging-cleanup-interval-secs=1", "--attachment-cleanup-interval-secs=1", &storage];
    set("+0d");
    let mut server = Binary::start_with(&data, &options, &faked(&library, &file)).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    alice.send_to(&bob, "before").await;
    let attachment = upload(&alice).await;
    let is_there = async |device: &Device| {
        device.connect().await.expect_message("before").await;
        assert_eq!(download(device, &attachment).await, 200);
    };

    set("+40d");
    let warning = "the clock of this machine is ahead of the time that the server trusts";
    eventually("a warning", async || server.output().contains(warning)).await;
    tokio::time::sleep(Duration::from_secs(3)).await; // Several sweeps, which leave no trace.
    is_there(&bob).await;
    set("+0d");
    eventually("the end of the doubt", async || server.output().contains("no longer in doubt")).await;
    is_there(&bob).await;

    // Once more, and this time it is found at the start.
    server.terminate();
    assert!(server.exit(Duration::from_secs(20)).await.success());
    set("+40d");
    let mut server = server.start_again_with(&options, &faked(&library, &file)).await;
    eventually("a warning", async || server.output().contains(warning)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    is_there(&bob).await;
    refreshed(&alice).await;

    // Forty days have really passed, says the operator.
    let mut command: Vec<String> = deployment::options(&data).await;
    command.push("confirm-clock".to_owned());
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let confirmed = Binary::run(&command, &faked(&library, &file)).await;
    assert!(confirmed.status.success() && confirmed.output.contains("Confirmed: it is"), "{}", confirmed.output);
    let database = Database::of(&data).await;
    eventually("what is forty days old to go", async || database.queued(&bob).await == 0).await;
    database.close().await;
    assert!(server.output().contains("was confirmed"), "{}", server.output());
    server.terminate();
    assert!(server.exit(Duration::from_secs(20)).await.success());
}
