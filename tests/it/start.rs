//! What the operator sees when the server can't start: one sentence that names the thing and what to do, an exit code
//! that is not 0, and nothing damaged.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::harness::{Binary, Database, Device, PATIENCE, deployment};

/// Runs the program, which has to give up, and answers the one sentence that it says.
async fn refusal(options: &[&str], variables: &[(&str, &str)]) -> String {
    let finished = Binary::run(options, variables).await;
    assert!(!finished.status.success(), "{}", finished.output);
    assert!(finished.status.code().is_some(), "killed: {}", finished.output);
    let output = finished.output;
    assert!(!output.contains("panicked") && !output.contains("Error {"), "{output}");
    assert_eq!(output.trim().lines().count(), 1, "more than a sentence: {output}");
    output
}

const PORTS: [&str; 3] = ["--server-host=127.0.0.1", "--server-port=0", "--mgmt-port=0"];

fn folder_options<'a>(folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--data-dir", folder], &PORTS[..], more].concat()
}

#[tokio::test]
async fn started_with_no_options_it_names_the_way_to_try_it_on_one_machine() {
    let sentence = refusal(&["--db-url=postgres://user:hunter2@127.0.0.1:1/db"], &[]).await;
    assert!(sentence.contains("--data-dir"), "{sentence}");
    assert!(!sentence.contains("hunter2"), "{sentence}");
    let sentence = refusal(&[], &[]).await;
    assert!(sentence.contains("--data-dir"), "{sentence}");
}

#[tokio::test]
async fn a_data_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    let below = file.join("data");
    for path in [below.to_str().unwrap(), file.to_str().unwrap(), "/proc/data", "/sys/data"] {
        let sentence = refusal(&folder_options(path, &[]), &[]).await;
        assert!(sentence.contains("--data-dir") && sentence.contains(path), "{sentence}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not a folder");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().to_str().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for option in ["--server-port", "--mgmt-port"] {
        let given = format!("{option}={port}");
        let options = ["--data-dir", folder, "--server-host=127.0.0.1", "--server-port=0", "--mgmt-port=0"];
        let options: Vec<&str> =
            options.into_iter().filter(|other| !other.starts_with(option)).chain([&given[..]]).collect();
        let sentence = refusal(&options, &[]).await;
        assert!(sentence.contains(&port) && sentence.contains(option), "{sentence}");
    }
}

#[tokio::test]
async fn a_wrong_value_is_named_with_what_is_allowed() {
    for (option, value) in [
        ("--server-port", "70000"),
        ("--ttl-days", "0"),
        ("--server-host", "localhost:80"),
        ("--trusted-proxies", "10.0.0.0/33"),
        ("--db-url", "mysql://x"),
        ("--log-format", "xml"),
    ] {
        let sentence = refusal(&["--data-dir=/nonexistent", &format!("{option}={value}")], &[]).await;
        assert!(sentence.contains(option), "{sentence}");
        assert!(option == "--db-url" || sentence.contains(value), "{sentence}");
        assert!(sentence.contains("takes"), "{sentence}");
    }
    let sentence = refusal(&["--data-dir=/nonexistent"], &[("OBSCURA_TTL_DAYS", "soon")]).await;
    assert!(sentence.contains("OBSCURA_TTL_DAYS") && sentence.contains("soon"), "{sentence}");
}

#[tokio::test]
async fn a_password_in_the_address_of_a_collector_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let options = folder_options(folder.path().to_str().unwrap(), &["--otlp-endpoint=http://user:hunter2@[bad"]);
    let sentence = refusal(&options, &[]).await;
    assert!(sentence.contains("--otlp-endpoint can't be used"), "{sentence}");
    assert!(!sentence.contains("hunter2"), "{sentence}");
}

#[tokio::test]
async fn a_published_or_short_secret_is_refused_and_never_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("data");
    for secret in ["change_me_in_production", "hunter2hunter2"] {
        let options = folder_options(folder.to_str().unwrap(), &[]);
        let sentence = refusal(&options, &[("OBSCURA_AUTH_JWT_SECRET", secret)]).await;
        assert!(sentence.contains("--jwt-secret"), "{sentence}");
        assert!(!sentence.contains(secret), "{sentence}");
    }
}

#[tokio::test]
async fn a_generated_secret_is_for_the_owner_only_and_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut server = Binary::start_embedded(&data, &[]).await;
    let alice = Device::register(&server.client()).await;
    let file = data.join("jwt-secret");
    let secret = std::fs::read_to_string(&file).unwrap();
    assert!(secret.trim().len() >= 32);
    assert_eq!(mode(&file), 0o600);
    assert_eq!(mode(&data), 0o700);
    server.kill();

    let server = server.start_again(&[]).await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), secret);
    alice.request("GET", "/v1/devices").send().await.expect(200);
    assert!(!server.output().contains(secret.trim()));
}

/// As docs/OPERATIONS.md says.
#[tokio::test]
async fn a_secret_that_was_moved_aside_is_accepted_until_its_file_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let (secret, previous) = (folder.path().join("jwt-secret"), folder.path().join("jwt-secret-previous"));
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let alice = Device::register(&server.client()).await;
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    std::fs::rename(&secret, &previous).unwrap();

    let mut server = server.start_again(&[]).await;
    assert_ne!(std::fs::read(&secret).unwrap(), std::fs::read(&previous).unwrap());
    alice.request("GET", "/v1/devices").send().await.expect(200);
    let bob = Device::register(&server.client()).await;
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    std::fs::remove_file(&previous).unwrap();

    let _server = server.start_again(&[]).await;
    alice.request("GET", "/v1/devices").send().await.expect(401);
    bob.request("GET", "/v1/devices").send().await.expect(200);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start(folder.path(), &[]).await;
    server.terminate();
    assert!(server.exit(PATIENCE).await.success());
    let database = Database::of(folder.path()).await;
    database
        .execute(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             SELECT 9999, 'future', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .await;
    let before = database.everything().await;
    let options = deployment::options(folder.path()).await;
    let options: Vec<&str> = options.iter().map(String::as_str).chain(PORTS).collect();
    let sentence = refusal(&options, &[]).await;
    assert!(sentence.contains("newer") && sentence.contains("9999"), "{sentence}");
    assert!(database.everything().await == before, "something was changed");
}

#[tokio::test]
async fn a_broken_database_is_named_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("obscura.db");
    let text = "this is a letter and no database, ".repeat(300);
    std::fs::write(&file, &text).unwrap();
    let sentence = refusal(&folder_options(folder.path().to_str().unwrap(), &[]), &[]).await;
    assert!(sentence.contains("obscura.db"), "{sentence}");
    assert!(std::fs::read_to_string(&file).unwrap() == text, "something was changed");
}

/// A new database in the place of the old one would say that there are no accounts.
#[tokio::test]
async fn a_folder_with_a_secret_or_attachments_and_no_database_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    drop(Binary::start_embedded(folder.path(), &[]).await);
    for file in ["obscura.db", "obscura.db-wal", "obscura.db-shm"] {
        let _ = std::fs::remove_file(folder.path().join(file));
    }
    let sentence = refusal(&folder_options(path, &[]), &[]).await;
    assert!(sentence.contains(path) && sentence.contains("a signing secret and no database"), "{sentence}");
    assert!(sentence.contains("restore it from a backup") && sentence.contains("start over"), "{sentence}");
    assert!(!folder.path().join("obscura.db").exists());

    std::fs::remove_file(folder.path().join("jwt-secret")).unwrap();
    std::fs::write(folder.path().join("attachments").join("one"), "ciphertext").unwrap();
    let sentence = refusal(&folder_options(path, &[]), &[]).await;
    assert!(sentence.contains("attachments and no database"), "{sentence}");
}

#[tokio::test]
async fn a_start_that_failed_before_the_first_database_was_made_can_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--server-port={}", taken.local_addr().unwrap().port());
    let path = folder.path().to_str().unwrap();
    refusal(&["--data-dir", path, "--server-host=127.0.0.1", "--mgmt-port=0", &port], &[]).await;
    assert!(folder.path().join("jwt-secret").exists());
    Binary::start_embedded(folder.path(), &[]).await;
}

#[tokio::test]
async fn a_missing_lock_file_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    drop(Binary::start_embedded(folder.path(), &[]).await);
    std::fs::remove_file(folder.path().join("obscura.db.lock")).unwrap();
    Binary::start_embedded(folder.path(), &[]).await;
}

#[tokio::test]
async fn two_servers_do_not_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let first = Binary::start_embedded(folder.path(), &[]).await;
    let sentence = refusal(&folder_options(folder.path().to_str().unwrap(), &[]), &[]).await;
    assert!(sentence.contains("--data-dir"), "{sentence}");
    Device::register(&first.client()).await;
}

#[tokio::test]
async fn it_says_where_it_listens_and_what_to_try_next() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    let output = server.output();
    assert!(output.contains(&format!("http://{}", server.address())), "{output}");
    assert!(output.contains("Try next"), "{output}");
    server.management().get("/readyz").send().await.expect(200);
    server.client().get("/openapi.yaml").send().await.expect(200);
}

#[tokio::test]
async fn help_and_version_are_no_failures() {
    for option in ["--help", "--version"] {
        let finished = Binary::run(&[option], &[]).await;
        assert!(finished.status.success(), "{}", finished.output);
        assert!(finished.output.contains("obscura-server"), "{}", finished.output);
    }
}
