//! Every mode against a fresh server, for a moment: is everything accounted for? How fast it was is not looked at.
//!
//! The server is the one that `cargo build` has made beside the tool. `OBSCURA_TEST_DEPLOYMENT=distributed` puts it on the
//! servers of `scripts/services`; attachments are in the bucket then.

#![expect(clippy::unwrap_used, reason = "what is missing in a test ends it")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// What the tool found in a run with these arguments.
struct Found {
    figures: Value,
    folder: tempfile::TempDir,
}

fn command(arguments: &[&str], folder: &Path) -> Command {
    let tool = Path::new(env!("CARGO_BIN_EXE_obscura-load"));
    let server = tool.with_file_name("obscura-server");
    assert!(server.exists(), "build the server first: cargo build");
    let mut command = Command::new(tool);
    command.args(arguments).arg("--runs=1").arg("--server").arg(&server).arg("--folder").arg(folder);
    command.envs(deployment(folder));
    command
}

fn run(arguments: &[&str]) -> Found {
    let folder = tempfile::tempdir().unwrap();
    let (json, plot) = (folder.path().join("figures.json"), folder.path().join("plot.svg"));
    let mut command = command(arguments, folder.path());
    command.arg("--json").arg(&json).arg("--plot").arg(&plot);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert!(line["machine"]["cores"].as_u64().unwrap() > 0);
    Found { figures: line["subjects"][0]["figures"].clone(), folder }
}

/// Where the tool's servers keep what they have.
fn deployment(folder: &Path) -> Vec<(&'static str, String)> {
    match std::env::var("OBSCURA_TEST_DEPLOYMENT").as_deref() {
        Ok("distributed") => {}
        Ok("embedded") | Err(_) => return Vec::new(),
        Ok(other) => panic!("OBSCURA_TEST_DEPLOYMENT is {other:?}; it takes embedded or distributed"),
    }
    let service =
        |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; use scripts/services"));
    let prefix = folder.file_name().unwrap().to_string_lossy().into_owned();
    vec![
        ("OBSCURA_LOAD_POSTGRES", service("OBSCURA_TEST_POSTGRES_URL")),
        ("OBSCURA_LOAD_VALKEY", service("OBSCURA_TEST_VALKEY_URL")),
        ("OBSCURA_STORAGE_ENDPOINT", service("OBSCURA_TEST_S3_ENDPOINT")),
        ("OBSCURA_STORAGE_ACCESS_KEY", service("OBSCURA_TEST_S3_ACCESS_KEY")),
        ("OBSCURA_STORAGE_SECRET_KEY", service("OBSCURA_TEST_S3_SECRET_KEY")),
        ("OBSCURA_STORAGE_BUCKET", format!("load-{}", std::process::id())),
        ("OBSCURA_STORAGE_CREATE_BUCKET", "true".to_owned()),
        ("OBSCURA_STORAGE_FORCE_PATH_STYLE", "true".to_owned()),
        ("OBSCURA_ATTACHMENT_PREFIX", format!("{prefix}/")),
    ]
}

impl Found {
    /// A figure that there is one case of.
    fn get(&self, key: &str) -> f64 {
        self.figures[key][0]["median"].as_f64().unwrap_or_else(|| panic!("{key} is not in {}", self.figures))
    }

    /// Nothing is lost, repeated or out of order, and something was sent.
    fn assert_exact(&self) {
        let something = self.figures["sent"].as_array().unwrap();
        assert!(something.iter().all(|case| case["median"].as_f64().unwrap() > 0.0), "{}", self.figures);
        for key in ["lost", "repeated", "reordered", "redelivered"] {
            let cases = self.figures[key].as_array().unwrap();
            assert!(cases.iter().all(|case| case["max"] == 0.0), "{key}: {}", self.figures);
        }
    }

    fn plot(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("plot.svg")).unwrap()
    }
}

#[test]
fn a_tool_that_is_told_to_end_takes_its_server_along() {
    let folder = tempfile::tempdir().unwrap();
    let idle = ["idle", "--sockets=8", "--seconds=60"];
    let mut tool = command(&idle, folder.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(tool.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("holding")), "the sockets are open at last");
    let id = tool.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let server = PathBuf::from(format!("/proc/{}", children.split_whitespace().next().unwrap()));
    assert!(server.exists());
    assert!(Command::new("kill").arg(id.to_string()).status().unwrap().success());
    assert!(!tool.wait().unwrap().success());
    let is_left = server.exists();
    if is_left {
        Command::new("kill").arg(server.file_name().unwrap()).status().unwrap();
    }
    assert!(!is_left, "its server goes on");
}

#[test]
fn accounts_are_made() {
    assert!(run(&["register", "--connections=2", "--seconds=1"]).get("signups_per_s") > 0.0);
}

#[test]
fn sends_are_accepted() {
    let found = run(&["send", "--connections=8", "--recipients=4", "--seconds=1"]);
    assert!(found.get("sends_per_s") > 0.0 && found.get("p99_ms") > 0.0);
    assert!(found.plot().contains("polyline"));
}

#[test]
fn what_is_relayed_arrives_once_and_in_order() {
    run(&["relay", "--connections=8", "--receivers=4", "--seconds=2"]).assert_exact();
}

#[test]
fn what_is_sent_at_fixed_times_arrives_once_and_in_order() {
    run(&["open", "--rate=100", "--connections=4", "--receivers=4", "--seconds=2"]).assert_exact();
}

#[test]
fn full_inboxes_are_emptied() {
    let found = run(&["drain", "--connections=4", "--recipients=4", "--messages=120"]);
    assert!(found.get("drained_per_s") > 0.0);
    assert_eq!(found.get("left"), 0.0);
}

#[test]
fn idle_sockets_stay_open() {
    let found = run(&["idle", "--sockets=40", "--seconds=1"]);
    assert!(found.get("opened_per_s") > 0.0 && found.get("socket_kib").is_finite());
}

#[test]
fn attachments_come_back_as_they_were() {
    let found = run(&["attachments", "--connections=4", "--volume=8", "--size=300000"]);
    assert_eq!(found.get("fetched"), 28.0);
    assert!(found.get("upload_ratio") > 0.0 && found.get("download_ratio") > 0.0);
}

#[test]
fn a_day_in_the_life_ends_with_everything_delivered_once() {
    let found = run(&["mixed", "--devices=12", "--rate=40", "--seconds=8"]);
    found.assert_exact();
    assert_eq!(found.get("delivered"), found.get("sent"));
    assert!(found.get("wakes") > 0.0 && found.get("group_sends") > 0.0);
}

#[test]
fn a_full_database_is_started_on() {
    let found = run(&["start", "--fill=5000", "--connections=2", "--recipients=2", "--seconds=1"]);
    assert_eq!(found.get("waiting"), 5000.0);
    assert!(found.get("ready_ms") > 0.0);
}

fn assert_exact_while_growing(axis: &str, steps: &str) {
    let size = ["--connections=2", "--recipients=2", "--receivers=3", "--seconds=1"];
    let found = run(&[&["growth", "--grow", axis, "--steps", steps], &size[..]].concat());
    found.assert_exact();
    assert!(found.plot().contains("relayed messages"));
}

#[test]
fn deliveries_are_exact_while_others_sign_up() {
    assert_exact_while_growing("users", "500,1000");
}

#[test]
fn deliveries_are_exact_while_messages_wait_for_others() {
    assert_exact_while_growing("waiting", "0,1500");
}

#[test]
fn deliveries_to_accounts_with_several_devices_are_exact() {
    assert_exact_while_growing("devices", "1,3");
}

#[test]
fn deliveries_to_groups_are_exact() {
    assert_exact_while_growing("group", "1,3");
}

#[test]
fn deliveries_between_nodes_are_exact_and_a_folder_has_one_node() {
    match std::env::var("OBSCURA_TEST_DEPLOYMENT").as_deref() {
        Ok("distributed") => assert_exact_while_growing("nodes", "1,3"),
        _ => {
            let refused =
                command(&["growth", "--grow=nodes", "--steps=2"], tempfile::tempdir().unwrap().path()).output();
            let refused = refused.unwrap();
            assert!(!refused.status.success());
            assert!(String::from_utf8_lossy(&refused.stderr).contains("a database that they share"));
        }
    }
}

/// Success in time and latencies depend on what else runs on the machine: those are figures of `scripts/attack`.
#[test]
fn every_attack_gets_no_more_than_the_default_limits_allow_and_the_server_does_not_grow() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("attacks.json");
    let attack = ["attack", "--seconds=2", "--untimed"];
    let output = command(&attack, folder.path()).arg("--json").arg(&json).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_str(&std::fs::read_to_string(json).expect(&said)).unwrap();
    for attack in line["attacks"].as_array().unwrap() {
        let name = attack["name"].as_str().unwrap();
        if let Some(why) = attack["skipped"].as_str() {
            assert!(name == "push-silent-dns" && why.contains("root"), "{name} was skipped: {why}");
            continue;
        }
        let mut misses = attack["misses"].as_array().unwrap().iter().map(|miss| miss.as_str().unwrap());
        assert!(misses.all(|miss| miss.starts_with("honest success")), "{name}: {said}");
        assert!(attack["honest"]["succeeded"].as_u64().unwrap() > 0, "{attack}");
        assert!(attack["attacker"]["attempts"].as_u64().unwrap() > 0, "{attack}");
    }
}

#[test]
fn two_servers_that_run_already_are_measured_beside_each_other() {
    let tool = Path::new(env!("CARGO_BIN_EXE_obscura-load"));
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut servers: Vec<Running> = folders.iter().map(|folder| Running::start(folder.path())).collect();
    let mut command = Command::new(tool);
    command.args(["relay", "--connections=2", "--receivers=2", "--seconds=1", "--runs=2"]);
    for server in &servers {
        command.arg(format!("--target={}", server.url)).arg(format!("--target-pid={}", server.child.id()));
    }
    let json = folders[0].path().join("figures.json");
    let output = command.arg("--json").arg(&json).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    for (subject, server) in servers.iter_mut().enumerate() {
        let figures = &line["subjects"][subject]["figures"];
        assert_eq!(figures["lost"][0]["runs"], serde_json::json!([0.0, 0.0]));
        assert!(figures["server_cpu_us_each"][0]["median"].as_f64().is_some());
        assert!(server.child.try_wait().unwrap().is_none(), "a server that is not the tool's was ended");
    }
}

/// A server that the tool has not started. Embedded in any case: what is proven is not about the deployment.
struct Running {
    child: std::process::Child,
    url: String,
}

impl Running {
    fn start(folder: &Path) -> Self {
        use std::io::BufRead as _;

        let program: PathBuf = Path::new(env!("CARGO_BIN_EXE_obscura-load")).with_file_name("obscura-server");
        let limits =
            ["rate-limit-per-second", "rate-limit-burst", "auth-rate-limit-per-second", "auth-rate-limit-burst"];
        let mut child = Command::new(program)
            .arg("--data-dir")
            .arg(folder)
            .args(["--server-host=127.0.0.1", "--server-port=0", "--mgmt-port=0", "--account-rate-limit-per-second=0"])
            .args(limits.map(|limit| format!("--{limit}=1000000")))
            .arg("--target-rate-limit-per-second=0")
            .env("RUST_LOG", "warn")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.trim_start().starts_with("API") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the server did not start");
        }
        child.stdout = Some(output.into_inner());
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
        Self { child, url }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
