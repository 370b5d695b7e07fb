//! Repeated cleaning: whatever has an age goes by itself.

use std::time::Duration;

use serde_json::json;

use crate::harness::{PASSWORD, TestServer, deployment, eventually};

#[tokio::test]
async fn everything_that_expires_is_forgotten() {
    let mut server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "acknowledged").await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    drop(socket);
    alice.send_to(&bob, "never fetched").await;
    alice.ticket().await;
    let client = server.client();
    let credentials = json!({"username": alice.username, "password": PASSWORD});
    client.post("/v1/link-sessions").json(&credentials).send().await.expect(201);
    client.post("/v1/session/refresh").json(&json!({"refreshToken": bob.refresh_token})).send().await.expect(200);
    alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);

    let tables = ["messages", "gateway_tickets", "link_sessions", "refresh_uses", "sessions", "attachments"];
    let database = server.database().await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    for table in tables {
        assert!(rows(table).await > 0, "{table} is empty from the start");
    }
    // Every job has a round soon after the start.
    server.clock.advance(Duration::from_hours(24 * 31));
    // As `confirm-clock` does it: by itself a server doubts so long a rest.
    server.server().app().store.set_time(server.clock.wall()).await.unwrap();
    server.restart().await;
    for table in tables {
        eventually(&format!("{table} to be swept"), async || rows(table).await == 0).await;
    }
    // The outcome of the send whose message waited may take a day longer; that of the other goes at once.
    eventually("sends to be swept", async || rows("sends").await <= 1).await;
    assert_eq!(rows("devices").await, 2, "devices do not expire");
}

/// A node of the former version removes a device without its notice, and a sweep may write one at that moment.
#[tokio::test]
async fn what_is_kept_for_devices_and_accounts_that_are_gone_is_forgotten() {
    let mut server = TestServer::start().await;
    let alice = server.account().await;
    alice.bundles(alice.user).await;
    let database = server.database().await;
    let notices = "INSERT INTO inbox_notices (device_no, period, since, expired, refused) \
                   SELECT no, 1, 1, 1, 0 FROM devices UNION ALL SELECT no + 1000, 1, 1, 1, 0 FROM devices";
    database.execute(notices).await;
    let of_another = match deployment::is_distributed() {
        true => "INSERT INTO spent_prekeys SELECT gen_random_uuid(), fingerprint FROM spent_prekeys",
        false => "INSERT INTO spent_prekeys SELECT randomblob(16), fingerprint FROM spent_prekeys",
    };
    database.execute(of_another).await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    assert_eq!((rows("inbox_notices").await, rows("spent_prekeys").await), (2, 2));
    // Each job has a round soon after the start, unless a node has had one lately.
    if deployment::is_distributed() {
        database.execute("DELETE FROM jobs").await;
    }
    server.restart().await;
    for table in ["inbox_notices", "spent_prekeys"] {
        eventually(&format!("{table} to be swept"), async || rows(table).await == 1).await;
    }
    assert_eq!(database.number("SELECT count(*) FROM inbox_notices JOIN devices ON no = device_no").await, 1);
    assert_eq!(database.number("SELECT count(*) FROM spent_prekeys JOIN users ON id = user_id").await, 1);
}

/// A year of service days passes; the accounts stay as they are.
async fn let_a_year_pass(server: &TestServer) {
    // Or the first round of the job, which may be late, would find the accounts before the restart.
    let runs = "obscura_job_runs_total{job_name=\"unused accounts\",outcome=\"done\"} ";
    let has_run = async || {
        let page = server.management().get("/metrics").send().await.expect(200);
        let page = String::from_utf8(page.body.to_vec()).unwrap();
        page.lines().any(|line| line.strip_prefix(runs).is_some_and(|count| count != "0"))
    };
    eventually("the job to have run", has_run).await;
    let database = server.database().await;
    database.execute("UPDATE service_days SET number = number + 365").await;
    // Of several nodes one does the job, and not again within the hour.
    if deployment::is_distributed() {
        database.execute("DELETE FROM jobs").await;
    }
}

#[tokio::test]
async fn an_account_that_was_never_used_goes_by_default_and_one_that_was_used_stays() {
    let mut server = TestServer::start().await;
    let (alice, bot) = (server.account().await, server.account().await);
    alice.request("GET", "/v1/devices").send().await.expect(200);
    let database = server.database().await;
    let used = "SELECT count(*) FROM users WHERE used_on = 1 AND NOT CAST(is_unused AS boolean)";
    eventually("the use to be written", async || database.number(used).await == 1).await;
    let_a_year_pass(&server).await;
    server.restart().await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    eventually("the unused account to go", async || rows("users").await == 1).await;
    assert_eq!((rows("devices").await, rows("sessions").await), (1, 1));
    bot.request("GET", "/v1/devices").send().await.expect(401);
    alice.request("GET", "/v1/devices").send().await.expect(200);
}

#[tokio::test]
async fn an_account_that_is_not_used_any_more_goes_with_its_mail_and_its_name_is_free() {
    let mut server = TestServer::start_with(|config| config.accounts.idle = Duration::from_hours(24 * 60)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "nobody will read this").await;
    bob.send_to(&alice, "but this").await;
    let database = server.database().await;
    let used = "SELECT count(*) FROM users WHERE used_on = 1 AND NOT CAST(is_unused AS boolean)";
    eventually("the uses to be written", async || database.number(used).await == 2).await;
    let_a_year_pass(&server).await;
    let alone = format!("UPDATE users SET used_on = used_on + 365 WHERE id = {}", database.literal(alice.user));
    database.execute(&alone).await;
    server.restart().await;
    let rows = async |table: &str| database.number(&format!("SELECT count(*) FROM {table}")).await;
    eventually("the account to go", async || rows("users").await == 1).await;
    assert_eq!(database.queued(&bob).await, 0);
    bob.request("GET", "/v1/devices").send().await.expect(401);
    // What it sent stays.
    alice.connect().await.expect_message("but this").await;
    let mut body = crate::harness::Keys::default().to_json(&bob.identity);
    body["username"] = json!(bob.username);
    body["password"] = json!(PASSWORD);
    server.client().post("/v1/users").json(&body).send().await.expect(201);
    let page = server.management().get("/metrics").send().await.expect(200);
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(page.contains("obscura_accounts_expired_total 1"), "{page}");
}

#[tokio::test]
async fn an_account_whose_socket_stays_open_is_in_use() {
    let server = TestServer::start().await;
    let bob = server.account().await;
    let _socket = bob.connect().await;
    let database = server.database().await;
    let day = "SELECT used_on FROM users";
    eventually("the connection to be written as a use", async || database.number(day).await == 1).await;
    // The same socket on the next day.
    server.clock.advance(Duration::from_hours(25));
    eventually("the open socket to count as a use", async || database.number(day).await == 2).await;
}
