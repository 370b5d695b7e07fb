//! The files of an embedded server are removed, replaced or overwritten while it runs: it notices, takes nothing more, and
//! stops. No second server gets in meanwhile.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;

use crate::harness::{Binary, Database, Device, eventually, send_request};

/// Clients that send all the time.
const SENDERS: usize = 8;
/// From then on no send may succeed.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);

/// The status of a send, 0 if there was no answer.
async fn status_of_send(from: &Device, to: &Device) -> u16 {
    let request = from.messages_request(Uuid::new_v4(), prost::Message::encode_to_vec(&send_request(&[(to, b"x")])));
    request.try_send().await.map_or(0, |response| response.status)
}

/// Sends one after another until it is told to stop, and returns when the last one succeeded.
async fn send_on(from: Device, to: Device, is_over: Arc<AtomicBool>) -> Option<Instant> {
    let mut last = None;
    while !is_over.load(Ordering::Relaxed) {
        match status_of_send(&from, &to).await {
            200 => last = Some(Instant::now()),
            // Its pace while it is refused.
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    last
}

/// Spoils the files of a running server under load, and sees it stop.
async fn assert_noticed(name: &str, spoil: impl FnOnce(&Path)) {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("data");
    let mut server = Binary::start_embedded(&folder, &["--max-inbox-size=1000000"]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    alice.send_to(&bob, "before").await;
    let is_over = Arc::<AtomicBool>::default();
    let load: Vec<_> =
        (0..SENDERS).map(|_| tokio::spawn(send_on(alice.clone(), bob.clone(), is_over.clone()))).collect();

    spoil(&folder);
    let spoilt = Instant::now();
    let mut words = None;
    eventually("sends to be refused", async || match status_of_send(&alice, &bob).await {
        200 => false,
        status => {
            assert!([0, 503].contains(&status), "{name}: {status}");
            let ready = server.management().get("/readyz").try_send().await;
            words = ready.ok().map(|ready| (ready.status, ready.json()["database"].clone()));
            true
        }
    })
    .await;
    assert!(spoilt.elapsed() < NOTICED_WITHIN, "{name}: only after {:?}", spoilt.elapsed());
    assert_eq!(words, Some((503, Value::from("error"))), "{name}");
    assert_ne!(status_of_send(&alice, &bob).await, 200, "{name}");

    let status = server.exit(Duration::from_secs(30)).await;
    assert!(status.code().is_some_and(|code| code != 0), "{name}: {status}");
    is_over.store(true, Ordering::Relaxed);
    for sender in load {
        let last = sender.await.unwrap().map(|last| last.saturating_duration_since(spoilt));
        assert!(last.is_none_or(|last| last < NOTICED_WITHIN), "{name}: the last send succeeded after {last:?}");
    }
    let output = server.output();
    assert!(output.contains("while the server ran") && output.contains("restore a backup"), "{name}: {output}");
}

fn replace(path: &Path) {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    fs::rename(copy, path).unwrap();
}

#[tokio::test]
async fn from_ten_seconds_after_the_database_is_gone_no_send_succeeds() {
    tokio::join!(
        assert_noticed("removed", |folder| fs::remove_file(folder.join("obscura.db")).unwrap()),
        assert_noticed("all of it removed", |folder| {
            for file in ["obscura.db", "obscura.db-wal", "obscura.db-shm", "obscura.db.lock"] {
                fs::remove_file(folder.join(file)).unwrap();
            }
        }),
        assert_noticed("replaced", |folder| replace(&folder.join("obscura.db"))),
        assert_noticed("emptied", |folder| {
            fs::File::options().write(true).open(folder.join("obscura.db")).unwrap().set_len(0).unwrap();
        }),
        assert_noticed("moved away with its folder", |folder| {
            fs::rename(folder, folder.with_extension("old")).unwrap();
        }),
    );
}

#[tokio::test]
async fn the_log_and_the_lock_of_the_database_are_watched_too() {
    tokio::join!(
        assert_noticed("the log removed", |folder| fs::remove_file(folder.join("obscura.db-wal")).unwrap()),
        assert_noticed("the index removed", |folder| fs::remove_file(folder.join("obscura.db-shm")).unwrap()),
        assert_noticed("the lock removed", |folder| fs::remove_file(folder.join("obscura.db.lock")).unwrap()),
        assert_noticed("the lock replaced", |folder| replace(&folder.join("obscura.db.lock"))),
    );
}

/// `cp backup obscura.db` leaves path and file what they were.
#[tokio::test]
async fn a_backup_that_is_copied_over_the_open_database_is_noticed() {
    let home = tempfile::tempdir().unwrap();
    let backup = home.path().join("backup.db");
    {
        let folder = home.path().join("data");
        let mut server = Binary::start_embedded(&folder, &[]).await;
        Device::register(&server.client()).await;
        server.terminate();
        assert!(server.exit(Duration::from_secs(20)).await.success());
        fs::copy(folder.join("obscura.db"), &backup).unwrap();
    }
    assert_noticed("copied over", |folder| {
        fs::copy(&backup, folder.join("obscura.db")).unwrap();
    })
    .await;
}

/// As `.restore` of SQLite's own shell does it.
#[tokio::test]
async fn another_mark_through_sqlite_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let database = Database::of_embedded(folder.path()).await;
    database.execute("PRAGMA application_id = 7").await;
    database.close().await;
    let status = server.exit(Duration::from_secs(30)).await;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(server.output().contains("overwritten"), "{}", server.output());
}

#[tokio::test]
async fn a_server_without_its_database_does_not_end_well_when_it_is_asked_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    fs::remove_file(folder.path().join("obscura.db")).unwrap();
    server.terminate();
    let status = server.exit(Duration::from_secs(20)).await;
    assert!(status.code().is_some_and(|code| code != 0), "{status}: {}", server.output());
}

/// SQLite writes its log back into the file at the end; a backup that was put there must stay what it is.
#[tokio::test]
async fn a_backup_that_was_put_in_place_is_not_written_to_by_the_server_that_ends() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("obscura.db");
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    Device::register(&server.client()).await;
    let backup = vec![7; 1 << 20];
    fs::write(&database, &backup).unwrap();
    assert!(!server.exit(Duration::from_secs(30)).await.success());
    assert!(fs::read(&database).unwrap() == backup);
}

#[tokio::test]
async fn a_second_server_stays_out_of_a_folder_whose_lock_file_and_database_were_replaced() {
    for removed in [&["obscura.db.lock"][..], &["obscura.db.lock", "obscura.db", "obscura.db-wal", "obscura.db-shm"]] {
        let folder = tempfile::tempdir().unwrap();
        let _first = Binary::start_embedded(folder.path(), &[]).await;
        for file in removed {
            let file = folder.path().join(file);
            fs::remove_file(&file).unwrap();
            fs::write(&file, "").unwrap();
        }
        let option = format!("--data-dir={}", folder.path().display());
        let second = Binary::run(&[&option, "--server-port=0", "--mgmt-port=0"], &[]).await;
        assert!(!second.status.success(), "{}", second.output);
        assert!(second.output.contains("another server is already running"), "{}", second.output);
    }
}

#[tokio::test]
async fn a_second_server_leaves_what_the_first_one_holds_back_of_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Binary::start_embedded(folder.path(), &[]).await;
    let reserve = folder.path().join("obscura.db.reserve-1");
    eventually("the reserve to be made", async || reserve.exists()).await;
    let option = format!("--data-dir={}", folder.path().display());
    let second = Binary::run(&[&option, "--server-port=0", "--mgmt-port=0"], &[]).await;
    assert!(second.output.contains("another server is already running"), "{}", second.output);
    assert!(reserve.exists());
}

/// It is read at the start only, and at the next start its loss would log all clients out.
#[tokio::test]
async fn a_removed_signing_secret_is_told_of_and_everything_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    fs::remove_file(folder.path().join("jwt-secret")).unwrap();
    eventually("the loss to be told of", async || {
        server.output().contains("the file with the signing secret was removed while the server ran")
    })
    .await;
    let alice = alice.log_in().await;
    assert_eq!(status_of_send(&alice, &bob).await, 200);
    server.management().get("/readyz").send().await.expect(200);
    server.terminate();
    assert!(server.exit(Duration::from_secs(20)).await.success(), "{}", server.output());
}

/// A volume that is unmounted leaves an empty folder in its place.
#[tokio::test]
async fn attachments_are_refused_while_another_folder_is_in_the_place_of_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await;
    let upload = || alice.request("POST", "/v1/attachments").body("ciphertext");
    let id = upload().send().await.expect(201).json()["id"].as_str().unwrap().to_owned();
    let download = || alice.request("GET", &format!("/v1/attachments/{id}"));
    let (attachments, away) = (folder.path().join("attachments"), folder.path().join("away"));
    fs::rename(&attachments, &away).unwrap();
    fs::create_dir(&attachments).unwrap();
    upload().send().await.expect(503);
    download().send().await.expect(503);
    assert_eq!(server.management().get("/readyz").send().await.json()["storage"], "error");
    fs::remove_dir(&attachments).unwrap();
    fs::rename(&away, &attachments).unwrap();
    upload().send().await.expect(201);
    download().send().await.expect(200);
}
