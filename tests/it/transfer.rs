//! Moving in: what a stopped embedded server has is carried into PostgreSQL and into new storage, and clients go on.

mod large;
mod place;
mod refusals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::harness::{
    Binary, Client, Database, Device, Event, Keys, PATIENCE, Response, Socket, deployment, eventually, send_request,
    within,
};
use crate::transfer::place::Place;

/// The checksum of every file below a folder, but for the lock, which a transfer takes as a server does.
pub fn files_of(folder: &Path) -> BTreeMap<PathBuf, [u8; 32]> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_of(&path));
        } else if path.extension().is_none_or(|extension| extension != "lock") {
            files.insert(path.clone(), Sha256::digest(std::fs::read(path).unwrap()).into());
        }
    }
    files
}

/// An embedded server with two accounts that has been stopped in order.
pub async fn stopped_server(folder: &Path) -> Binary {
    let mut server = Binary::start_embedded(folder, &[]).await;
    for _ in 0..2 {
        Device::register(&server.client()).await;
    }
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    server
}

async fn upload(device: &Device, bytes: Vec<u8>) -> String {
    let answer = device.request("POST", "/v1/attachments").body(bytes).send().await.expect(201).json();
    answer["id"].as_str().unwrap().to_owned()
}

async fn download(device: &Device, id: &str) -> Vec<u8> {
    device.request("GET", &format!("/v1/attachments/{id}")).send().await.expect(200).body.to_vec()
}

async fn refresh(client: &Client, token: &str, key: Uuid) -> Response {
    let request = client.post("/v1/session/refresh").json(&json!({"refreshToken": token}));
    request.header("idempotency-key", key.to_string()).send().await
}

/// The ids of the one-time prekeys of both kinds that come with a bundle; the last-resort key is none.
async fn fetch_prekeys(asker: &Device, target: &Device) -> Vec<(&'static str, i64)> {
    let bundle = &asker.bundles(target.user).await[0];
    let ec = bundle["oneTimePreKey"]["keyId"].as_i64().map(|id| ("elliptic-curve", id));
    let pq = bundle["pqPreKey"]["keyId"].as_i64().filter(|id| *id < 1_000_000).map(|id| ("post-quantum", id));
    ec.into_iter().chain(pq).collect()
}

fn has_no_mail(events: &[Event]) -> bool {
    !events.iter().any(|event| matches!(event, Event::Mail(_)))
}

/// What clients have done with the old server, and expect to find on the new one.
struct Life {
    alice: Device,
    /// Another device of Alice's.
    tablet: Device,
    bob: Device,
    /// Sends of Alice to Bob: of the first the message is acknowledged, of the second it waits.
    keys: [Uuid; 2],
    ticket: String,
    link_session: String,
    refresh_key: Uuid,
    attachments: Vec<(String, Vec<u8>)>,
    prekeys: Vec<(&'static str, i64)>,
}

const LARGE: usize = 1 << 20;

impl Life {
    async fn begin(server: &Binary, folder: &Path) -> Self {
        let client = server.client();
        let alice = Device::register(&client).await;
        let tablet = alice.link().await;
        let bob = Device::register_with(&client, Keys { one_time: 5, pq_one_time: Some(4) }).await;
        bob.request("PUT", "/v1/push-token").json(&json!({"token": "a token"})).send().await.expect(204);
        let keys = [Uuid::new_v4(), Uuid::new_v4()];
        alice.post_messages(keys[0], &send_request(&[(&bob, b"one")])).await.expect(200);
        let mut socket = bob.connect().await;
        let one = socket.expect_message("one").await;
        socket.ack(&[one]).await;
        let database = Database::of_embedded(folder).await;
        eventually("the ack to be stored", async || database.queued(&bob).await == 0).await;
        socket.close().await;
        alice.post_messages(keys[1], &send_request(&[(&bob, b"two")])).await.expect(200);
        alice.send_to(&bob, vec![3; LARGE]).await;
        bob.send(&[(&alice, b"four"), (&tablet, b"four")]).await;
        // The clock of the old server may have been set back a little between a send and the messages before it.
        database.execute("UPDATE messages SET received_at = received_at + 1000").await;
        database.close().await;
        let refresh_key = Uuid::new_v4();
        refresh(&client, &tablet.refresh_token, refresh_key).await.expect(200);
        let mut attachments = Vec::new();
        for size in [1, 1000, 600_000] {
            let bytes: Vec<u8> = (0..size).map(|place: usize| (place * 7 / 3) as u8).collect();
            attachments.push((upload(&alice, bytes.clone()).await, bytes));
        }
        let prekeys = fetch_prekeys(&alice, &bob).await;
        assert_eq!(prekeys.len(), 2);
        let (ticket, link_session) = (bob.ticket().await, alice.approved_link_session().await);
        Self { alice, tablet, bob, keys, ticket, link_session, refresh_key, attachments, prekeys }
    }

    /// Everything is as it was, and goes on.
    async fn go_on(self) {
        let Self { alice, tablet, bob, keys, .. } = &self;
        let client = &alice.client;
        let mut socket = Socket::open(client.address(), &self.ticket).await.expect("the old ticket opens a socket");
        let mail = socket.messages(2).await;
        assert!(mail[0].message == "two" && mail[1].message == vec![3; LARGE], "the mail in its order");
        for (key, text) in keys.iter().zip(["one", "two"]) {
            alice.post_messages(*key, &send_request(&[(bob, text.as_bytes())])).await.expect(200);
        }
        assert!(has_no_mail(&socket.until_pong().await), "a repeated send has queued something");
        alice.send_to(bob, "five").await;
        let five = socket.expect_message("five").await;
        socket.ack(&[&mail[..], &[five]].concat()).await;
        alice.connect().await.expect_message("four").await;

        let repeated = refresh(client, &tablet.refresh_token, self.refresh_key).await.expect(200).json();
        let again = repeated["refreshToken"].as_str().unwrap();
        refresh(client, again, Uuid::new_v4()).await.expect(200);
        refresh(client, &bob.refresh_token, Uuid::new_v4()).await.expect(200);
        tablet.connect().await.expect_message("four").await;

        for (id, bytes) in &self.attachments {
            assert!(download(bob, id).await == *bytes, "an attachment of {} bytes has changed", bytes.len());
        }
        let mut prekeys = self.prekeys.clone();
        for _ in 0..6 {
            prekeys.extend(fetch_prekeys(alice, bob).await);
        }
        prekeys.sort_unstable();
        prekeys.dedup();
        assert_eq!(prekeys.len(), 5 + 4, "each prekey is handed out once: {prekeys:?}");

        // What has been numbered so far is not numbered again.
        bob.refill(2, 100, 5).await;
        let phone = alice.finish_link(&self.link_session, Keys::default()).await;
        let carol = Device::register(client).await;
        carol.send_to(bob, "six").await;
        socket.expect_message("six").await;
        bob.send(&[(alice, b"seven"), (tablet, b"seven"), (&phone, b"seven")]).await;
        phone.connect().await.expect_message("seven").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_moves_and_its_clients_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = Binary::start_embedded(folder.path(), &["--pre-key-refill-threshold=0"]).await;
    let life = Life::begin(&old, folder.path()).await;
    old.kill();
    let before = files_of(folder.path());
    let log = std::fs::metadata(folder.path().join("obscura.db-wal")).unwrap();
    assert!(log.len() > 0, "some of it is in the write-ahead log alone");

    let place = Place::new().await;
    let said = place.transfer(folder.path(), Duration::from_secs(60)).await;
    assert!(said.contains("2 accounts, 3 devices, 4 waiting messages"), "{said}");
    assert!(said.contains("Bytes of attachments in the new storage and compared: 3."), "{said}");
    assert!(said.contains("jwt-secret"), "{said}");
    assert_eq!(files_of(folder.path()), before, "the source has changed");

    let _new = place.start_server(&old, &deployment::kept_secret(folder.path())).await;
    let database = place.database().await;
    assert_eq!(database.number("SELECT count(*) FROM push_tokens").await, 1);
    assert_eq!(database.number("SELECT count(*) FROM pg_tables WHERE tablename = 'transfer_progress'").await, 0);
    assert_eq!(database.number("SELECT max(at_most) FROM account_locks").await, 2);
    let waiting = "SELECT count(*) FROM sends s WHERE EXISTS (SELECT 1 FROM messages m
                   WHERE m.position BETWEEN s.first_position AND s.last_position";
    assert_eq!(
        database.number(&format!("{waiting} AND m.received_at = s.sent_at)")).await,
        3,
        "as this database finds them"
    );
    assert_eq!(database.number("SELECT count(*) FROM sends").await, 4);
    within("clients to go on", life.go_on()).await;
}

#[tokio::test]
async fn a_stopped_server_moves_and_attachments_may_stay_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&old.client()).await;
    let id = upload(&alice, vec![9; 5000]).await;
    old.terminate();
    assert!(old.exit(PATIENCE).await.success());
    let before = files_of(folder.path());

    let place = Place::new().await;
    let from = format!("--from={}", folder.path().display());
    let finished = Binary::run(&["transfer", &from], &[("OBSCURA_DATABASE_URL", &place.url())]).await;
    assert!(finished.status.success(), "{}", finished.output);
    assert!(finished.output.contains("Bytes of attachments that have not been copied: 1."), "{}", finished.output);
    assert!(finished.output.contains("users: 1 of 1 copied (100 %)"), "{}", finished.output);
    assert_eq!(files_of(folder.path()), before, "the source has changed");

    let kept = format!("--storage-endpoint=file:{}/attachments", folder.path().display());
    let layout =
        [format!("--db-url={}", place.url()), format!("--jwt-secret={}", deployment::kept_secret(folder.path())), kept];
    let layout = [&layout[..], &["--pubsub-url=local:".to_owned()]].concat();
    let _new = old.start_elsewhere(layout).await;
    assert_eq!(download(&alice, &id).await, vec![9; 5000]);
}

#[tokio::test]
async fn an_empty_server_moves_and_its_first_account_comes_later() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = Binary::start_embedded(folder.path(), &[]).await;
    old.terminate();
    assert!(old.exit(PATIENCE).await.success());
    let place = Place::new().await;
    place.transfer(folder.path(), PATIENCE).await;
    let new = place.start_server(&old, &deployment::kept_secret(folder.path())).await;
    let alice = Device::register(&new.client()).await;
    let mut socket = alice.connect().await;
    let bob = Device::register(&new.client()).await;
    bob.send_to(&alice, "first").await;
    socket.expect_message("first").await;
}

#[tokio::test]
async fn an_attachment_that_the_source_has_lost_is_told_of_and_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut old = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&old.client()).await;
    let (kept, lost) = (upload(&alice, vec![1; 100]).await, upload(&alice, vec![2; 100]).await);
    old.kill();
    std::fs::remove_file(folder.path().join(format!("attachments/attachments/{lost}"))).unwrap();
    let place = Place::new().await;
    let said = place.transfer(folder.path(), PATIENCE).await;
    assert!(said.contains("new storage and compared: 1.") && said.contains("nobody can download them: 1."), "{said}");
    let _new = place.start_server(&old, &deployment::kept_secret(folder.path())).await;
    assert_eq!(download(&alice, &kept).await, vec![1; 100]);
}
