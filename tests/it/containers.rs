//! The container files fit the program: the settings they name exist, the secrets they ask for are made, and the image is
//! built by the Rust that the project needs.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use obscura_server::config::GROUPS;
use serde_yaml_ng::Value;
use tokio::net::TcpStream;

use crate::harness::{Binary, eventually, free_port};

const COMPOSE: &str = include_str!("../../docker-compose.yml");
const DOCKERFILE: &str = include_str!("../../Dockerfile");
const MANIFEST: &str = include_str!("../../Cargo.toml");

/// The variables without which the compose file is refused.
fn demanded() -> BTreeSet<&'static str> {
    COMPOSE.split("${").skip(1).filter_map(|rest| Some(rest.split_once(":?")?.0)).filter(|name| is_name(name)).collect()
}

fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
}

#[tokio::test]
async fn the_compose_file_demands_exactly_what_make_env_makes() {
    let made = Binary::run(&["make-env"], &[]).await;
    let made: BTreeSet<&str> = made
        .output
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    assert_eq!(demanded(), made);
}

#[test]
fn every_setting_of_the_container_files_is_an_option() {
    let options: BTreeSet<&str> = GROUPS.iter().flat_map(|group| group.options).map(|option| option.variable).collect();
    let compose: Value = serde_yaml_ng::from_str(COMPOSE).unwrap();
    let environment = compose["services"]["server"]["environment"].as_mapping().unwrap();
    let names = environment.keys().map(|name| name.as_str().unwrap());
    let in_image = DOCKERFILE.lines().filter_map(|line| line.strip_prefix("ENV ")?.split('=').next());
    let unknown: Vec<&str> = names.chain(in_image).filter(|name| !options.contains(name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// The server takes only its own loopback address for the management port by default, which no other container reaches.
#[tokio::test]
async fn in_the_image_the_management_port_can_be_reached_from_outside_of_the_container() {
    let settings = DOCKERFILE.lines().filter_map(|line| line.strip_prefix("ENV ")?.split_once('='));
    // The folder of the image is not there.
    let settings: Vec<_> = settings.filter(|(name, _)| *name != "OBSCURA_DATA_DIR").collect();
    let folder = tempfile::tempdir().unwrap();
    let option = format!("--data-dir={}", folder.path().display());
    let (server, port) = (free_port(), free_port());
    let options = [option, format!("--server-port={server}"), format!("--mgmt-port={port}")];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let _server = Binary::begin_with(&options, &settings);
    // Any address of this machine but the one that is listened on by default.
    let elsewhere = SocketAddr::from(([127, 0, 0, 2], port));
    eventually("the management port to be open", async || TcpStream::connect(elsewhere).await.is_ok()).await;
}

/// Only the server's own image may be built, all others are named with a version.
#[test]
fn every_image_of_the_compose_file_has_a_version() {
    let compose: Value = serde_yaml_ng::from_str(COMPOSE).unwrap();
    for (name, service) in compose["services"].as_mapping().unwrap() {
        let image = service["image"].as_str().unwrap();
        let version = image.split_once(':').map_or("", |(_, version)| version);
        assert!(service.get("build").is_some() || (!version.is_empty() && version != "latest"), "{name:?}: {image}");
    }
}

#[test]
fn the_image_is_built_by_the_rust_that_the_manifest_asks_for() {
    let version =
        MANIFEST.lines().find_map(|line| line.strip_prefix("rust-version = \"")).unwrap().trim_end_matches('"');
    assert!(DOCKERFILE.contains(&format!("FROM rust:{version}-")), "another Rust than {version}");
}
