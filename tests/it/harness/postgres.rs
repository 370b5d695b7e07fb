//! A PostgreSQL of one test's own, for the tests that stop it, freeze it and kill it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, collect, free_port};

/// Short of memory and long on speed; processes end in these tests, machines don't.
const SETTINGS: &[&str] = &[
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=100",
    "shared_buffers=32MB",
    "fsync=off",
    "full_page_writes=off",
];
pub(super) const PASSWORD: &str = "only for one test";
const PASSWORD_IN_URL: &str = "only%20for%20one%20test";

/// A database server that keeps its folder and its port while it is away. Dropping it kills it.
pub struct Postgres {
    programs: PathBuf,
    folder: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
    log: Arc<Mutex<String>>,
}

impl Postgres {
    /// A new and empty one, ready to serve.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        give_away(folder.path());
        let mut postgres = Self { programs: programs(), folder, port: free_port(), child: None, log: Arc::default() };
        let password = postgres.folder.path().join("password");
        std::fs::write(&password, PASSWORD).expect("a file");
        give_away(&password);
        let mut initdb = postgres.command("initdb");
        initdb.args(["--username=obscura", "--pwfile=password", "--auth=scram-sha-256", "--encoding=UTF8"]);
        initdb.args(["--locale=C", "--no-sync", "--pgdata=data"]);
        let made = initdb.output().expect("initdb starts");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        // Somebody else may take a port before it does.
        while let Err(log) = postgres.try_to_start().await {
            assert!(log.contains("Address already in use"), "{log}");
            postgres.port = free_port();
        }
        postgres
    }

    /// Another server with a copy of what this one has, as a standby that was promoted is. This one is stopped for it and
    /// started again.
    pub async fn twin(&mut self) -> Self {
        self.stop().await;
        let folder = tempfile::tempdir().expect("a folder");
        let copied = Command::new("cp").arg("-a").arg(self.folder.path().join("data")).arg(folder.path()).status();
        assert!(copied.expect("cp starts").success(), "the folder can't be copied");
        give_away(folder.path());
        let mut twin =
            Self { programs: self.programs.clone(), folder, port: free_port(), child: None, log: Arc::default() };
        twin.start_again().await;
        self.start_again().await;
        twin
    }

    /// The URL of the database that is always there.
    pub fn url(&self) -> String {
        format!("postgres://obscura:{PASSWORD_IN_URL}@127.0.0.1:{}/postgres", self.port)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it after it has ended, on the same folder and port.
    pub async fn start_again(&mut self) {
        self.try_to_start().await.unwrap_or_else(|log| panic!("{log}"));
    }

    /// Fails with what it said when it ended at once.
    async fn try_to_start(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "PostgreSQL runs already");
        self.log.lock().unwrap().clear();
        let mut command = self.command("postgres");
        command.args(["-D", "data", "-c", &format!("port={}", self.port)]).process_group(0);
        SETTINGS.iter().for_each(|setting| {
            command.args(["-c", setting]);
        });
        let mut child = command.stderr(Stdio::piped()).spawn().expect("postgres starts");
        collect(child.stderr.take().expect("a pipe"), self.log.clone());
        let child = self.child.insert(child);
        let deadline = Instant::now() + PATIENCE;
        // It says so once it takes connections, which is later than that its port is open.
        while !self.log.lock().unwrap().contains("ready to accept connections") {
            let log = || self.log.lock().unwrap().clone();
            if let Some(status) = child.try_wait().expect("a child") {
                self.child = None;
                return Err(format!("PostgreSQL ended with {status}:\n{}", log()));
            }
            assert!(Instant::now() < deadline, "PostgreSQL does not get ready:\n{}", log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Ends it in order, without waiting for its clients: what an upgrade of the package does.
    pub async fn stop(&mut self) {
        let processes = self.processes();
        self.signal(&processes[..1], Signal::INT);
        self.gone(&processes).await;
    }

    /// `kill -9` for all of its processes.
    pub async fn kill(&mut self) {
        let processes = self.processes();
        self.signal(&processes, Signal::KILL);
        self.gone(&processes).await;
    }

    /// Stops all of its processes where they are: connections stay open, and nobody answers.
    pub fn freeze(&self) {
        // The main process first, which could start others otherwise.
        self.signal(&self.processes(), Signal::STOP);
    }

    /// Lets it go on after `freeze`.
    pub fn thaw(&self) {
        self.signal(&self.processes(), Signal::CONT);
    }

    fn main(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("PostgreSQL runs"))
    }

    /// The main process and those it has started, one for each connection among them. Each has a process group of its own.
    fn processes(&self) -> Vec<Pid> {
        let main = self.main();
        let mut processes = vec![main];
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let process = entry.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw);
            // A process that ends meanwhile has no file any more.
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            if parent.is_some_and(|parent| parent.trim() == main.as_raw_nonzero().to_string()) {
                processes.extend(process);
            }
        }
        processes
    }

    fn signal(&self, processes: &[Pid], signal: Signal) {
        for process in processes {
            // One that has ended by itself does not have to be told.
            let _ = kill_process(*process, signal);
        }
    }

    /// Waits until the main process, the first of these, and all others have ended.
    async fn gone(&mut self, processes: &[Pid]) {
        let deadline = Instant::now() + PATIENCE;
        let is_there = |process: &Pid| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero()));
            // The others become children of whoever collects orphans, which may take its time.
            status.is_ok_and(|status| !status.contains("State:\tZ"))
        };
        let mut child = self.child.take().expect("PostgreSQL runs");
        while child.try_wait().expect("a child").is_none() || processes[1..].iter().any(is_there) {
            assert!(Instant::now() < deadline, "PostgreSQL does not end:\n{}", self.log.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One of its programs, in its folder and as the user who owns that.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        if let Some((user, group)) = other_user() {
            command.uid(user).gid(group);
        }
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.signal(&self.processes(), Signal::KILL);
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

/// The folder that `scripts/services` names, or that with the newest PostgreSQL where Debian installs them.
fn programs() -> PathBuf {
    if let Some(folder) = std::env::var_os("OBSCURA_TEST_POSTGRES_BIN") {
        return folder.into();
    }
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let versions = installed.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    let newest = versions.filter(|version| *version >= 15).max();
    let newest = newest.map(|version| PathBuf::from(format!("/usr/lib/postgresql/{version}/bin")));
    newest.filter(|folder| folder.join("initdb").exists()).expect(
        "there is no PostgreSQL: run the tests by `scripts/services cargo test`, or name the folder of its programs in \
         OBSCURA_TEST_POSTGRES_BIN",
    )
}

/// PostgreSQL refuses to run as root; then the user and group to run it as.
pub(super) fn other_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("the users");
    let ids = |name: &str| {
        let fields: Vec<&str> = users.lines().find(|line| line.starts_with(name))?.split(':').collect();
        Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
    };
    Some(ids("postgres:").or_else(|| ids("nobody:")).expect("a user who is not root"))
}

/// Makes this belong to the user as whom PostgreSQL runs.
pub(super) fn give_away(path: &Path) {
    if let Some((user, group)) = other_user() {
        std::os::unix::fs::chown(path, Some(user), Some(group)).expect("root may do so");
    }
}
