//! Push endpoints whose names are never resolved.

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;

use super::attacker::{Attacker, elsewhere};
use super::inbox::queue;
use crate::http::{Connection, bearer};

/// Where the resolver listens that never answers.
const RESOLVER: &str = "127.66.0.53";
/// Devices with such endpoints.
const DEVICES: usize = 60;
/// From the queueing of a message until its push is due, by default.
const GRACE: Duration = Duration::from_secs(10);
/// A point of P-256, from RFC 8291, and a secret.
const POINT: &str = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
const SECRET: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// A resolver that takes questions and never answers them.
pub struct SilentResolver {
    _socket: UdpSocket,
    folder: TempDir,
}

impl SilentResolver {
    /// An error if this process may not do what it takes.
    pub fn start() -> Result<Self> {
        let probe = ["--mount", "sh", "-c", "mount --bind /etc/resolv.conf /etc/resolv.conf"];
        let tried = Command::new("unshare").args(probe).output().context("there is no `unshare`")?;
        ensure!(tried.status.success(), "a mount namespace of its own takes root");
        let socket = UdpSocket::bind((RESOLVER, 53)).context("port 53 of a loopback address takes root")?;
        let folder = tempfile::Builder::new().prefix("obscura-load-resolver-").tempdir()?;
        fs::write(folder.path().join("resolv.conf"), format!("nameserver {RESOLVER}\n"))?;
        Ok(Self { _socket: socket, folder })
    }

    /// The `resolv.conf` that names it.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("resolv.conf")
    }
}

pub async fn endpoints(attacker: Attacker) -> Result<()> {
    let devices = attacker.sign_up(DEVICES + 1).await?;
    let (from, others) = (&devices[0], &devices[1..]);
    for (n, device) in others.iter().enumerate() {
        let mut connection = Connection::open_from(attacker.api(), &elsewhere(48_000 + n)).await?;
        let endpoint = format!("https://{}.example.org/push", Uuid::from_bytes(rand::random()).simple());
        let subscription = json!({"endpoint": endpoint, "keys": {"p256dh": POINT, "auth": SECRET}});
        let body = json!({"subscription": subscription}).to_string();
        let fields = format!("{}content-type: application/json\r\n", bearer(&device.token));
        connection.request("PUT", "/v1/push-token", &fields, body.as_bytes()).await?.expect(204)?;
    }
    for (n, device) in others.iter().enumerate() {
        queue(&attacker, n, from, device, 1).await?;
        attacker.attempts(1);
    }
    tokio::time::sleep(GRACE).await;
    attacker.begin().await;
    Ok(())
}
