//! A disk of ours that fills up: growth is refused early, and everything that makes room goes on.

use serde_json::json;

use crate::harness::signer::Identity;
use crate::harness::{
    Device, Keys, PASSWORD, PATIENCE, Response, SmallDisk, TestServer, eventually, send_request, signed_key,
    unique_name,
};

/// More than any disk has.
const ENORMOUS: u64 = u64::MAX / 4;

#[tokio::test]
async fn a_full_disk_refuses_sends_and_uploads_and_lets_everything_else_go_on() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let upload = || alice.request("POST", "/v1/attachments").body("ciphertext");
    let id = upload().send().await.expect(201).json()["id"].as_str().unwrap().to_owned();
    alice.send_to(&bob, "waiting").await;
    let linked = alice.link().await;

    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let message = send_request(&[(&bob, b"too much")]);
    let refused = alice.post_messages(uuid::Uuid::new_v4(), &message).await.expect(507);
    assert!(!refused.error().is_empty());
    upload().send().await.expect(507);

    alice.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200);
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    let database = server.database().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
    alice.remove(&linked).await;
    let alice = alice.log_in().await;

    server.restart_with(|config| config.disk_reserve_bytes = 0).await;
    alice.send_to(&bob, "room again").await;
    alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(201);
}

/// The answer to an attempt to register.
async fn register(server: &TestServer) -> Response {
    let mut body = Keys::default().to_json(&Identity::generate());
    body["username"] = json!(unique_name("user"));
    body["password"] = json!(PASSWORD);
    server.client().post("/v1/users").json(&body).send().await
}

/// Everything that makes the database grow is refused.
async fn assert_no_growth(server: &TestServer, alice: &Device, bob: &Device) {
    alice.post_messages(uuid::Uuid::new_v4(), &send_request(&[(bob, b"too much")])).await.expect(507);
    alice.request("POST", "/v1/attachments").body("ciphertext").send().await.expect(507);
    register(server).await.expect(507);
    let body = json!({"username": alice.username, "password": PASSWORD});
    server.client().post("/v1/link-sessions").json(&body).send().await.expect(507);
    let keys = json!({"signedPreKey": signed_key(&alice.identity, 9), "oneTimePreKeys": []});
    alice.request("POST", "/v1/keys").json(&keys).send().await.expect(507);
}

#[tokio::test]
async fn a_full_disk_refuses_accounts_devices_and_keys() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let opened = alice.client.post("/v1/link-sessions");
    let opened = opened.json(&json!({"username": alice.username, "password": PASSWORD})).send().await.expect(201);
    let approved = alice.approved_link_session().await;

    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    assert_no_growth(&server, &alice, &bob).await;
    let path = format!("/v1/link-sessions/{}", opened.json()["id"].as_str().unwrap());
    alice.request("PUT", &path).body("approved").send().await.expect(507);
    let mut body = Keys::default().to_json(&alice.identity);
    body["linkSessionId"] = json!(approved);
    alice.client.post("/v1/devices").json(&body).send().await.expect(507);
    alice.bundles(bob.user).await;

    server.restart_with(|config| config.disk_reserve_bytes = 0).await;
    alice.finish_link(&approved, Keys::default()).await;
    register(&server).await.expect(201);
}

#[tokio::test]
async fn readiness_tells_of_a_full_disk_and_the_node_stays_ready() {
    let server = TestServer::start_embedded_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let ready = server.management().get("/readyz").send().await.expect(200);
    let expected = json!({"status": "ok", "database": "ok", "storage": "ok", "pubsub": "ok", "space": "full"});
    assert_eq!(ready.json(), expected);
}

#[tokio::test]
async fn a_database_above_its_bound_grows_no_more_and_its_messages_are_delivered() {
    let mut server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    alice.send_to(&bob, "waiting").await;

    server.restart_with(|config| config.database.max_size_bytes = 1).await;
    assert_no_growth(&server, &alice, &bob).await;
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    let database = server.database().await;
    eventually("the ack to be applied", async || database.queued(&bob).await == 0).await;
    assert_eq!(server.management().get("/readyz").send().await.expect(200).json()["space"], "full");

    server.restart_with(|config| config.database.max_size_bytes = 1 << 40).await;
    alice.send_to(&bob, "room again").await;
}

/// What PostgreSQL says when its own disk is full.
#[tokio::test]
async fn a_database_server_whose_disk_is_full_is_told_as_such_on_every_route() {
    let attachments = tempfile::tempdir().unwrap();
    let server = TestServer::start_node_with(|config| {
        config.attachments.endpoint = Some(format!("file:{}", attachments.path().display()));
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    let database = server.database().await;
    database
        .execute(
            "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = '53100'; END $$",
        )
        .await;
    for table in ["messages", "users", "link_sessions", "device_keys", "attachments", "push_tokens"] {
        let trigger = format!(
            "CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION no_space()"
        );
        database.execute(&trigger).await;
    }
    assert_no_growth(&server, &alice, &bob).await;
    alice.request("PUT", "/v1/push-token").json(&json!({"token": "t"})).send().await.expect(507);
}

#[tokio::test]
async fn a_full_disk_does_not_change_the_answer_to_a_repeat() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let (alice, bob) = (server.account().await, server.account().await);
    let (key, message) = (uuid::Uuid::new_v4(), send_request(&[(&bob, b"once")]));
    alice.post_messages(key, &message).await.expect(200);
    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let repeated = alice.post_messages(key, &message).await.expect(200);
    assert_eq!(repeated.headers["idempotency-replayed"], "true");
}

#[tokio::test]
async fn a_refused_upload_is_not_read() {
    let mut server = TestServer::start_embedded_with(|_| {}).await;
    let device = server.account().await;
    server.restart_with(|config| config.disk_reserve_bytes = ENORMOUS).await;
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\n",
        device.token
    );
    let answer = crate::harness::raw_request(server.address(), head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 507 "), "{answer}");
    assert_eq!(server.database().await.number("SELECT count(*) FROM attachments").await, 0);
}

#[tokio::test]
async fn a_disk_without_a_free_byte_or_inode_does_not_prevent_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::make(folder.path(), 64, 80);
    let options = ["--disk-reserve-bytes=16000000"];
    let mut server = disk.start(&options).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let linked = alice.link().await;
    alice.send_to(&bob, "waiting").await;
    let upload = |device: &Device| device.request("POST", "/v1/attachments").body("ciphertext");
    let id = upload(&alice).send().await.expect(201).json()["id"].as_str().unwrap().to_owned();
    server.terminate();
    server.exit(PATIENCE).await;
    disk.fill();

    let server = disk.start(&options).await;
    let (alice, bob) = (alice.at(&server.client()), bob.at(&server.client()));
    alice.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200);
    alice.post_messages(uuid::Uuid::new_v4(), &send_request(&[(&bob, b"too much")])).await.expect(507);
    upload(&alice).send().await.expect(507);
    let mut socket = bob.connect().await;
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
    drop(socket);
    alice.remove(&linked).await;
    eventually("the ack to be applied", async || {
        let page = String::from_utf8(server.management().get("/metrics").send().await.body.to_vec()).unwrap();
        page.contains("obscura_queue_left_total{cause=\"acked\"} 1")
    })
    .await;
    bob.log_in().await;
}

#[tokio::test]
async fn uploads_of_a_byte_stop_before_the_inodes_run_out_and_the_next_start_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::make(folder.path(), 64, 100);
    let options = ["--disk-reserve-bytes=16000000"];
    let mut server = disk.start(&options).await;
    let alice = Device::register(&server.client()).await;
    let mut stored = 0;
    let refused = loop {
        let answer = alice.request("POST", "/v1/attachments").body("a").send().await;
        if answer.status != 201 {
            break answer;
        }
        stored += 1;
        assert!(stored < 100, "a disk of 100 files took as many attachments");
        // What the file system says is remembered for a second.
        if stored % 20 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        }
    };
    refused.expect(507);
    assert_eq!(server.management().get("/readyz").send().await.expect(200).json()["space"], "low");
    let free = rustix::fs::statvfs(disk.seen_from_here()).unwrap().f_favail;
    assert!(free >= 5, "{free} inodes are left");
    let bob = Device::register(&server.client()).await;
    alice.send_to(&bob, "messages need no inode").await;
    let page = String::from_utf8(server.management().get("/metrics").send().await.body.to_vec()).unwrap();
    assert!(page.contains("\nobscura_disk_free_inodes"), "{page}");
    server.terminate();
    server.exit(PATIENCE).await;
    let server = disk.start(&options).await;
    bob.at(&server.client()).connect().await.expect_message("messages need no inode").await;
}
