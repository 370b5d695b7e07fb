//! A real Valkey or Redis for one test, on a port of its own, that can be stopped, killed, frozen and started again.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{PATIENCE, free_port};

/// A running server. Dropping it kills it.
pub struct Valkey {
    child: Child,
    port: u16,
    options: Vec<String>,
    folder: TempDir,
}

impl Valkey {
    /// A server that keeps nothing on disk and asks for no password.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With these further options, as on its command line.
    pub async fn start_with(options: &[&str]) -> Self {
        let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
        // Somebody else may take a free port before the server does. Then it ends, and another port is tried.
        for _ in 0..10 {
            let folder = tempfile::tempdir().expect("a folder for Valkey");
            let port = free_port();
            let child = spawn(&options, port, &folder);
            let mut valkey = Self { child, port, options: options.clone(), folder };
            if valkey.is_up().await {
                return valkey;
            }
        }
        panic!("Valkey does not start");
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Its URL, without a user or password.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let _ = self.child.wait();
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// From now on it does nothing, while its connections stay open.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Ends what [`Valkey::freeze`] began.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// A new, empty process on the same port, after this one has ended.
    pub async fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.options, self.port, &self.folder);
        assert!(self.is_up().await, "Valkey does not start again");
    }

    /// A connection of the test's own, for looking at the server.
    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("a URL");
        client.get_multiplexed_async_connection().await.expect("a connection")
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("a process of ours");
    }

    /// Waits until it answers. False when it has ended.
    async fn is_up(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait().expect("a child").is_some() {
                return false;
            }
            if answers(self.address()).await {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }
}

impl Drop for Valkey {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a server there says anything to a PING, be it that it wants a password.
async fn answers(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address).await else { return false };
    if stream.write_all(b"PING\r\n").await.is_err() {
        return false;
    }
    let mut answer = [0; 1];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut answer)).await;
    matches!(read, Ok(Ok(_)))
}

fn spawn(options: &[String], port: u16, folder: &TempDir) -> Child {
    let mut command = Command::new(program());
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.arg("--dir").arg(folder.path()).args(options);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("Valkey can be run")
}

/// The program: the one that is named, or the first that is installed.
fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("OBSCURA_TEST_VALKEY_SERVER") {
        return path.into();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = ["valkey-server", "redis-server"]
        .iter()
        .find_map(|name| std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file()));
    found.expect(
        "there is no valkey-server or redis-server here; `scripts/services` gets one and sets OBSCURA_TEST_VALKEY_SERVER",
    )
}
