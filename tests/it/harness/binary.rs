//! The real program as a child process.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::client::Target;
use super::{Client, PATIENCE, collect, deployment, eventually, free_port, record};

/// What the program takes to listen on free ports of this machine and not to count requests.
const TEST_OPTIONS: &[&str] = &[
    "--server-host=127.0.0.1",
    "--server-port=0",
    "--mgmt-port=0",
    "--rate-limit-per-second=1000000",
    "--rate-limit-burst=1000000",
    "--auth-rate-limit-per-second=1000000",
    "--auth-rate-limit-burst=1000000",
    "--sign-ups-per-hour=0",
    "--sign-ups-per-day-per-address=0",
    "--sign-ups-per-day-per-network=0",
    "--wrong-passwords-per-hour=0",
    "--upload-rate-limit-per-second=0",
    "--account-rate-limit-per-second=0",
    "--target-rate-limit-per-second=0",
    "--prekey-fetches-per-hour=0",
    "--one-time-prekeys-per-hour=0",
    "--server-max-connections-per-address=10000",
];

/// The same for the former program, which doesn't know newer options.
const FORMER_OPTIONS: &[&str] = &[
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
    "--server-max-connections-per-address=10000",
];

/// A running server of its own process. Dropping it kills it.
pub struct Binary {
    child: Child,
    output: Arc<Mutex<String>>,
    target: Target,
    management: Target,
    /// The options that say where its state is.
    layout: Vec<String>,
    /// Whether it logs no more than by default.
    is_discreet: bool,
}

/// How a program that ended by itself ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub output: String,
}

impl Binary {
    /// The program on this folder, ready to serve.
    pub async fn start(folder: &Path, options: &[&str]) -> Self {
        Self::start_with(folder, options, &[]).await
    }

    /// The program with these further options and environment variables.
    pub async fn start_with(folder: &Path, options: &[&str], variables: &[(&str, &str)]) -> Self {
        let targets = (Target::anywhere(), Target::anywhere());
        Self::launch(deployment::options(folder).await, options, variables, targets).await
    }

    /// A node with exactly these options, and those of all tests.
    pub async fn start_node(options: &[String]) -> Self {
        Self::launch(options.to_vec(), &[], &[], (Target::anywhere(), Target::anywhere())).await
    }

    /// The former program with exactly these options, and those of the tests that it knows. What is started again from
    /// it is today's program.
    pub async fn start_former(layout: Vec<String>) -> Self {
        let program = deployment::service("OBSCURA_TEST_FORMER");
        let mut command = command_of(&program, &[]);
        command.args(&layout).args(FORMER_OPTIONS);
        Self::launched(command, layout, (Target::anywhere(), Target::anywhere()), true).await
    }

    /// A node with exactly these options, and those of all tests, that may take its time to start. Its ports are known
    /// from the beginning; when this returns, the management port answers.
    pub async fn begin_node(options: &[String]) -> Self {
        let address = |port: u16| Target::new(([127, 0, 0, 1], port).into());
        let (api, port) = (free_port(), free_port());
        let mut command = command(&[]);
        command.args(options).args(TEST_OPTIONS.iter().filter(|option| !option.contains("port=")));
        command.args([format!("--server-port={api}"), format!("--mgmt-port={port}")]);
        let (child, output) = spawn(command);
        let (target, management) = (address(api), address(port));
        let mut node = Self { child, output, target, management, layout: options.to_vec(), is_discreet: true };
        let is_there = async || {
            let ended = node.child.try_wait().expect("a child");
            assert!(ended.is_none(), "the server ended:\n{}", node.output());
            TcpStream::connect(node.management.get()).await.is_ok()
        };
        eventually("the management port to answer", is_there).await;
        node
    }

    /// Waits until it serves clients.
    pub async fn started(&mut self) {
        self.wait_for_addresses().await;
    }

    /// The program in embedded mode, whatever this run is about: for what only that has.
    pub async fn start_embedded(folder: &Path, options: &[&str]) -> Self {
        let targets = (Target::anywhere(), Target::anywhere());
        Self::launch(deployment::embedded_options(folder), options, &[], targets).await
    }

    /// The same, started by another program such as `nsenter`, which turns into it.
    pub async fn start_within(starter: &[&str], folder: &Path, options: &[&str]) -> Self {
        let layout = deployment::embedded_options(folder);
        let (program, arguments) = starter.split_first().expect("a program");
        let mut command = command_of(program, &[]);
        command.args(arguments).arg(env!("CARGO_BIN_EXE_obscura-server"));
        command.args(&layout).args(TEST_OPTIONS).args(options);
        Self::launched(command, layout, (Target::anywhere(), Target::anywhere()), true).await
    }

    /// The program on this folder, with the limits that it has by default.
    pub async fn start_limited(folder: &Path, options: &[&str]) -> Self {
        Self::start_limited_on(deployment::options(folder).await, options).await
    }

    /// The program on what this layout says, with the limits that it has by default.
    pub async fn start_limited_on(layout: Vec<String>, options: &[&str]) -> Self {
        let mut command = command(&[]);
        let [host, port, management, ..] = TEST_OPTIONS else { unreachable!("they come first") };
        command.args(&layout).args([host, port, management]).args(options);
        let (child, output) = spawn(command);
        let mut binary = Self {
            child,
            output,
            target: Target::anywhere(),
            management: Target::anywhere(),
            layout,
            is_discreet: true,
        };
        let (api, port) = binary.wait_for_addresses().await;
        binary.target.set(api);
        binary.management.set(port);
        binary
    }

    /// A new process where this one was, after that has ended. Clients made before go on with the new one.
    pub async fn start_again(&self, options: &[&str]) -> Self {
        let targets = (self.target.clone(), self.management.clone());
        Self::launch(self.layout.clone(), options, &[], targets).await
    }

    /// The same with these environment variables.
    pub async fn start_again_with(&self, options: &[&str], variables: &[(&str, &str)]) -> Self {
        let targets = (self.target.clone(), self.management.clone());
        Self::launch(self.layout.clone(), options, variables, targets).await
    }

    /// A new process with these options, on whatever they name, after this one has ended. Clients made before go on with
    /// the new one.
    pub async fn start_elsewhere(&self, layout: Vec<String>) -> Self {
        Self::launch(layout, &[], &[], (self.target.clone(), self.management.clone())).await
    }

    async fn launch(
        layout: Vec<String>,
        options: &[&str],
        variables: &[(&str, &str)],
        (target, management): (Target, Target),
    ) -> Self {
        let mut command = command(variables);
        // What a test asks for stands in place of what is usual.
        let is_usual = |usual: &&String| {
            let flag = usual.split('=').next().unwrap_or_default();
            !options.iter().any(|option| option.split('=').next() == Some(flag))
        };
        command.args(layout.iter().filter(is_usual)).args(TEST_OPTIONS).args(options);
        Self::launched(command, layout, (target, management), is_discreet(variables)).await
    }

    async fn launched(
        command: Command,
        layout: Vec<String>,
        (target, management): (Target, Target),
        is_discreet: bool,
    ) -> Self {
        let (child, output) = spawn(command);
        let mut binary = Self { child, output, target, management, layout, is_discreet };
        let (api, port) = binary.wait_for_addresses().await;
        binary.target.set(api);
        binary.management = Target::new(port);
        binary
    }

    async fn wait_for_addresses(&mut self) -> (SocketAddr, SocketAddr) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.output();
            let address = |name: &str| {
                let (_, rest) =
                    output.lines().find(|line| line.trim_start().starts_with(name))?.split_once("http://")?;
                rest.split_whitespace().next()?.trim_end_matches('/').parse().ok()
            };
            if let (Some(api), Some(management)) = (address("API"), address("management")) {
                return (api, management);
            }
            if let Some(status) = self.child.try_wait().expect("a child") {
                panic!("the server ended with {status}:\n{}", self.output());
            }
            assert!(Instant::now() < deadline, "the server does not say where it listens:\n{output}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Runs the program to its end, which has to come by itself.
    pub async fn run(options: &[&str], variables: &[(&str, &str)]) -> Finished {
        let mut binary = Self::begin_with(options, variables);
        let status = binary.exit(PATIENCE).await;
        Finished { status, output: binary.output() }
    }

    /// The program with these options, which is no server and ends by itself.
    pub fn begin(options: &[&str]) -> Self {
        Self::begin_with(options, &[])
    }

    /// The same with these environment variables.
    pub fn begin_with(options: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = command(variables);
        command.args(options);
        let (child, output) = spawn(command);
        let is_discreet = is_discreet(variables);
        let (target, management) = (Target::anywhere(), Target::anywhere());
        Self { child, output, target, management, layout: Vec::new(), is_discreet }
    }

    /// Somebody who talks to the API port of this process and of those started again from it.
    pub fn client(&self) -> Client {
        Client::new(self.target.clone())
    }

    /// Somebody who talks to the management port.
    pub fn management(&self) -> Client {
        Client::management(self.management.clone())
    }

    /// Where the API port is.
    pub fn address(&self) -> SocketAddr {
        self.target.get()
    }

    /// Everything written to standard output and standard error so far.
    pub fn output(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the process to end.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh").args(["-c", &kill]).status().expect("a shell");
        assert!(status.success(), "{kill}");
    }

    /// Waits for the process to end by itself.
    pub async fn exit(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                // The readers of the pipes may be a moment behind.
                while Arc::strong_count(&self.output) > 1 && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                return status;
            }
            assert!(Instant::now() < deadline, "still running after {patience:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The time that it has spent on processors so far.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a process");
        // Behind the name, which may contain anything: user and system time are the 14th and 15th of all fields.
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number"));
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    /// Bytes of memory that are in use now.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most bytes of memory that were in use since the start, or since [`Binary::forget_peak`].
    pub fn peak_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// Begins to look for the peak anew, for instance behind the one that hashing a password has left.
    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").expect("a process");
    }

    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a process");
        let line = status.lines().find(|line| line.starts_with(name)).expect("a figure");
        let kilobytes = line.split_whitespace().nth(1).expect("a number");
        kilobytes.parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        self.kill();
        if self.is_discreet {
            record::output(&self.output());
        }
    }
}

fn is_discreet(variables: &[(&str, &str)]) -> bool {
    variables.iter().all(|(name, value)| *name != "RUST_LOG" || ["info", "warn", "error"].contains(value))
}

/// The program in an environment in which nothing of ours is set but these variables.
fn command(variables: &[(&str, &str)]) -> Command {
    command_of(env!("CARGO_BIN_EXE_obscura-server"), variables)
}

fn command_of(program: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OBSCURA_") || name == "RUST_LOG" || name == "RUST_BACKTRACE" {
            command.env_remove(name);
        }
    }
    command.envs(variables.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn spawn(mut command: Command) -> (Child, Arc<Mutex<String>>) {
    let mut child = command.spawn().expect("the program starts");
    let output = Arc::new(Mutex::new(String::new()));
    collect(child.stdout.take().expect("a pipe"), output.clone());
    collect(child.stderr.take().expect("a pipe"), output.clone());
    (child, output)
}
