//! The server under load: a process of our own, or one that runs already.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::http::Connection;
use crate::options::Options;
use crate::report::{Report, resident_kib};

/// Ports that are free, and limits that are not what is measured.
const SERVER_OPTIONS: &[&str] = &[
    "--server-host=127.0.0.1",
    "--server-port=0",
    "--mgmt-port=0",
    "--rate-limit-per-second=1000000",
    "--rate-limit-burst=1000000",
    "--auth-rate-limit-per-second=1000000",
    "--auth-rate-limit-burst=1000000",
    "--account-rate-limit-per-second=0",
    "--target-rate-limit-per-second=0",
    "--prekey-fetches-per-hour=0",
    "--server-max-connections=100000",
    "--server-max-connections-per-address=100000",
    "--max-inbox-size=1000000",
    "--access-token-ttl-secs=86400",
];

/// A server. Dropping it kills the process and removes the folder, if they are ours.
pub struct Server {
    pub api: SocketAddr,
    management: Option<SocketAddr>,
    pid: Option<u32>,
    own: Option<Own>,
}

struct Own {
    child: Child,
    program: PathBuf,
    options: Vec<String>,
    folder: TempDir,
}

/// How long a start took, from the start of the process on.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    /// Until `/readyz` was answered with 200.
    pub ready: Duration,
    /// Until an API request was answered.
    pub answering: Duration,
}

impl Server {
    /// Starts a server on an empty folder, or takes the one that was named.
    pub async fn start(options: &Options) -> Result<Self> {
        if let Some(api) = options.target {
            Connection::open(api).await?;
            return Ok(Self { api, management: None, pid: options.server_pid, own: None });
        }
        let folder = tempfile::Builder::new().prefix("obscura-load-").tempdir_in(&options.parent)?;
        let (child, api, management) = spawn(&options.program, folder.path(), &options.server_options)?;
        let pid = Some(child.id());
        let own = Own { child, program: options.program.clone(), options: options.server_options.clone(), folder };
        let server = Self { api, management: Some(management), pid, own: Some(own) };
        server.wait_until_ready().await?;
        Ok(server)
    }

    /// The process, if it is known.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Ends the process with a signal and starts it again on the same folder.
    pub async fn start_again(&mut self, signal: &str) -> Result<Started> {
        let own = self.own.as_mut().context("only a server of our own can be started again")?;
        end(&mut own.child, signal)?;
        let began = Instant::now();
        let (child, api, management) = spawn(&own.program, own.folder.path(), &own.options)?;
        (self.pid, own.child) = (Some(child.id()), child);
        (self.api, self.management) = (api, Some(management));
        self.wait_until_ready().await?;
        let ready = began.elapsed();
        let answer = Connection::open(api).await?.get("/v1/devices").await?;
        ensure!(answer.status == 401, "the API answered {}", answer.status);
        Ok(Started { ready, answering: began.elapsed() })
    }

    async fn wait_until_ready(&self) -> Result<()> {
        let Some(management) = self.management else { return Ok(()) };
        let answer = Connection::open(management).await?.get("/readyz").await?;
        ensure!(answer.status == 200, "the server is not ready: {}", String::from_utf8_lossy(&answer.body));
        Ok(())
    }

    /// Adds what the process has in memory now.
    pub fn add_memory(&self, report: &mut Report, when: &str) {
        if let Some((resident, _)) = self.pid.and_then(resident_kib) {
            report.add(format!("resident memory {when}, MiB"), resident / 1024.0);
        }
    }

    /// Adds how long the disk takes to confirm a small write, which bounds every durable send from below.
    pub fn add_disk(&self, report: &mut Report) -> Result<()> {
        let Some(own) = &self.own else { return Ok(()) };
        let mut file = File::create(own.folder.path().join("probe"))?;
        let mut micros = Vec::new();
        for _ in 0..100 {
            let began = Instant::now();
            file.write_all(&[0; 4096])?;
            file.sync_data()?;
            micros.push(began.elapsed().as_micros() as f64 / 1000.0);
        }
        micros.sort_by(f64::total_cmp);
        report.add("disk, confirmed write of 4 KiB, ms", micros[micros.len() / 2]);
        Ok(())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, folder: &Path, options: &[String]) -> Result<(Child, SocketAddr, SocketAddr)> {
    let mut child = Command::new(program)
        .arg("--data-dir")
        .arg(folder)
        .args(SERVER_OPTIONS)
        .args(options)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start {}; build it with `cargo build --release`", program.display()))?;
    let mut output = BufReader::new(child.stdout.take().context("no output")?);
    let (mut api, mut management, mut line) = (None, None, String::new());
    loop {
        line.clear();
        if output.read_line(&mut line)? == 0 {
            child.wait()?;
            bail!("the server did not start");
        }
        let address = line.split_once("http://").and_then(|(_, rest)| rest.trim().parse().ok());
        match line.split_whitespace().next() {
            Some("API") => api = address,
            Some("management") => management = address,
            _ => {}
        }
        if let (Some(api), Some(management)) = (api, management) {
            // Kept open, so that the rest of the greeting has somewhere to go.
            child.stdout = Some(output.into_inner());
            return Ok((child, api, management));
        }
    }
}

fn end(child: &mut Child, signal: &str) -> Result<()> {
    let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status()?;
    ensure!(sent.success(), "the server could not be stopped");
    child.wait()?;
    Ok(())
}
