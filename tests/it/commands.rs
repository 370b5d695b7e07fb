//! The commands that go with containers: a health check without a shell, and the settings of the compose file.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::harness::{Binary, Device, Finished, eventually, unique_name};

/// Asks what listens on this port.
async fn healthcheck(port: u16) -> Finished {
    let finished = Binary::run(&["healthcheck", &format!("--mgmt-port={port}")], &[]).await;
    assert_eq!(finished.output.lines().count(), 1, "more than a sentence: {}", finished.output);
    assert!(finished.status.code().is_some_and(|code| code < 2), "{}", finished.output);
    finished
}

fn management_port(server: &Binary) -> u16 {
    let output = server.output();
    let line = output.lines().find(|line| line.trim_start().starts_with("management")).unwrap();
    line.split_once("http://").unwrap().1.parse::<SocketAddr>().unwrap().port()
}

#[tokio::test]
async fn a_health_check_succeeds_while_the_server_is_ready_and_names_what_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Binary::start_embedded(folder.path(), &[]).await;
    let port = management_port(&server);
    assert!(healthcheck(port).await.status.success());

    std::fs::remove_dir_all(folder.path().join("attachments")).unwrap();
    std::fs::write(folder.path().join("attachments"), "no folder").unwrap();
    let finished = healthcheck(port).await;
    assert!(!finished.status.success());
    assert!(finished.output.contains("storage can't be used"), "{}", finished.output);

    server.kill();
    let finished = healthcheck(port).await;
    assert!(!finished.status.success() && finished.output.contains("no answer"), "{}", finished.output);
}

/// Probes come every few seconds, and an outage may last.
#[tokio::test]
async fn an_outage_that_probes_find_is_told_once_and_so_is_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start_embedded(folder.path(), &[]).await;
    let (attachments, away) = (folder.path().join("attachments"), folder.path().join("away"));
    let told = |sentence: &str| server.output().matches(sentence).count();
    let probe = async || server.management().get("/readyz").send().await.status;
    for outage in 1..=2 {
        std::fs::rename(&attachments, &away).unwrap();
        std::fs::write(&attachments, "no folder").unwrap();
        for _ in 0..3 {
            assert_eq!(probe().await, 503);
        }
        std::fs::remove_file(&attachments).unwrap();
        std::fs::rename(&away, &attachments).unwrap();
        for _ in 0..3 {
            assert_eq!(probe().await, 200);
        }
        eventually("its end to be told", async || told("is ready again") == outage).await;
        assert_eq!(told("a part of the server is not ready"), outage, "{}", server.output());
    }
}

#[tokio::test]
async fn a_health_check_reads_the_same_variables_as_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    let port = management_port(&server).to_string();
    let variables = [("OBSCURA_SERVER_MGMT_PORT", port.as_str()), ("OBSCURA_SERVER_HOST", "0.0.0.0")];
    let finished = Binary::run(&["healthcheck"], &variables).await;
    assert!(finished.status.success(), "{}", finished.output);
}

#[tokio::test]
async fn a_health_check_of_a_server_that_hangs_fails_within_three_seconds() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let started = Instant::now();
    let finished = healthcheck(silent.local_addr().unwrap().port()).await;
    assert!(!finished.status.success() && finished.output.contains("seconds have passed"), "{}", finished.output);
    let took = started.elapsed();
    assert!(took >= Duration::from_secs(3), "it gave up early, after {took:?}");
    // Beyond three seconds there is only the start of a process, on a machine that may be busy.
    assert!(took < Duration::from_secs(6), "it took {took:?}");
}

#[tokio::test]
async fn a_health_check_of_the_api_port_says_that_it_is_the_wrong_one() {
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &[]).await;
    Device::register(&server.client()).await;
    let finished = healthcheck(server.address().port()).await;
    assert!(!finished.status.success() && finished.output.contains("--mgmt-port"), "{}", finished.output);
}

#[tokio::test]
async fn made_settings_are_for_their_owner_alone_and_replace_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(unique_name("env"));
    let command = ["make-env", "--output", path.to_str().unwrap()];
    let finished = Binary::run(&command, &[]).await;
    assert!(finished.status.success(), "{}", finished.output);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let made = std::fs::read_to_string(&path).unwrap();
    let secret = made.lines().last().unwrap().split_once('=').unwrap().1;
    assert!(!finished.output.contains(secret), "a secret on the screen");

    let finished = Binary::run(&command, &[]).await;
    assert!(!finished.status.success() && finished.output.contains("already"), "{}", finished.output);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), made);
}
