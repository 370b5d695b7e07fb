//! A large server moves: twice interrupted by `kill -9`, and nothing is lost or doubled.

use std::path::Path;
use std::time::Duration;

use crate::harness::{Binary, Database, Device, deployment};
use crate::transfer::{files_of, place::Place};

const USERS: i64 = 10_000;
const MESSAGES: i64 = 200_000;
const ATTACHMENTS: i64 = 1_000;
const MESSAGE_BYTES: i64 = 1024;
const ATTACHMENT_BYTES: usize = 10 << 10;
const PATIENCE: Duration = Duration::from_secs(120);

/// Fills the database of a stopped server with accounts that are like `device`'s, and with mail from it to all.
async fn fill(folder: &Path, device: &Device) {
    let (user, id) = (device.user.simple(), device.id.simple());
    let accounts = USERS - 2;
    let statement = format!(
        "BEGIN;
         CREATE TEMP TABLE n AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT {MESSAGES})
             SELECT x FROM n;
         INSERT INTO users (id, username, password_hash, identity_key) SELECT randomblob(16), 'generated_' || x, password_hash, identity_key
             FROM n CROSS JOIN users WHERE id = x'{user}' AND x <= {accounts};
         INSERT INTO devices (id, user_id, name, registration_id, is_primary)
             SELECT randomblob(16), id, 'a phone', 1, 1 FROM users WHERE username LIKE 'generated_%';
         INSERT INTO device_keys SELECT d.no, signed_id, signed_key, signed_signature, NULL, NULL, NULL
             FROM devices d CROSS JOIN device_keys k
             WHERE d.name = 'a phone' AND k.device_no = (SELECT no FROM devices WHERE id = x'{id}');
         INSERT INTO one_time_prekeys (device_no, kind, key_id, public_key)
             SELECT no, 0, x, randomblob(33) FROM (SELECT x FROM n LIMIT 3) CROSS JOIN devices WHERE name = 'a phone';
         INSERT INTO messages (device_no, id, sender_user, sender_device, received_at, body)
             SELECT (SELECT MIN(no) FROM devices) + x % {USERS}, randomblob(16), x'{user}', x'{id}',
                    unixepoch() * 1000, randomblob({MESSAGE_BYTES})
             FROM n ORDER BY x;
         INSERT INTO attachments SELECT randomblob(16), x'{user}', {ATTACHMENT_BYTES}, 1, unixepoch() * 1000
             FROM n WHERE x <= {ATTACHMENTS};
         COMMIT;"
    );
    let database = Database::of_embedded(folder).await;
    database.execute(&statement).await;
    let ids = database.text("SELECT group_concat(hex(id)) FROM attachments").await;
    database.close().await;
    for (n, id) in ids.split(',').enumerate() {
        let id = uuid::Uuid::parse_str(id).unwrap();
        let bytes: Vec<u8> = (0..ATTACHMENT_BYTES).map(|place| (place * (n + 1) / 3) as u8).collect();
        std::fs::write(folder.join(format!("attachments/attachments/{id}")), bytes).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_server_moves_though_the_transfer_is_killed_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = Binary::start_embedded(folder.path(), &[]).await;
    let client = old.client();
    let (alice, bob) = (Device::register(&client).await, Device::register(&client).await);
    old.kill();
    fill(folder.path(), &alice).await;
    let before = files_of(folder.path());
    let place = Place::new().await;

    let mut transfer = place.begin_transfer(folder.path());
    place.wait_for_middle_of("messages", MESSAGES).await;
    let memory = transfer.resident_bytes();
    transfer.kill();
    assert!(memory < 128 << 20, "{} MiB are in use", memory >> 20);
    let mut transfer = place.begin_transfer(folder.path());
    place.wait_for_middle_of("bytes of attachments", ATTACHMENTS).await;
    transfer.kill();
    let said = place.transfer(folder.path(), PATIENCE).await;
    assert!(said.contains("Going on where the last run stopped"), "{said}");
    assert!(said.contains("10000 accounts, 10000 devices, 200000 waiting messages"), "{said}");
    assert!(said.contains("Bytes of attachments in the new storage and compared: 1000."), "{said}");
    assert_eq!(files_of(folder.path()), before, "the source has changed");

    let _new = place.start_server(&old, &deployment::kept_secret(folder.path())).await;
    let database = place.database().await;
    for (table, count) in [("users", USERS), ("messages", MESSAGES), ("account_locks", USERS)] {
        assert_eq!(database.number(&format!("SELECT count(*) FROM {table}")).await, count, "{table}");
    }
    assert_eq!(database.number("SELECT max(at_most) FROM account_locks").await, MESSAGES / USERS);
    let mut inbox = bob.connect().await;
    let waiting = inbox.messages((MESSAGES / USERS) as usize).await;
    alice.send_to(&bob, "and one more").await;
    inbox.expect_message("and one more").await;
    inbox.ack(&waiting).await;
    let id = database.text("SELECT min(id::text) FROM attachments").await;
    let downloaded = bob.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200).body;
    assert_eq!(downloaded, std::fs::read(folder.path().join(format!("attachments/attachments/{id}"))).unwrap());
}
