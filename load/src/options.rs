//! What the command line asks for.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgMatches;
use clap::error::ErrorKind;
use serde_json::{Value, json};

use crate::grammar::grammar;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Sign-ups.
    Register,
    /// As many sends as the server takes, to devices that are offline.
    Send,
    /// As many sends as the server takes, to devices that are online and ack.
    Relay,
    /// Sends at fixed times, to devices that are online.
    Open,
    /// Devices that come back to a full inbox.
    Drain,
    /// Open sockets on which nothing happens.
    Idle,
    /// Bytes up and down.
    Attachments,
    /// A day in the life.
    Mixed,
    /// A start on a full database.
    Start,
    /// The same sends while there is ever more of something else.
    Growth,
    /// Attacks beside honest clients, with default limits.
    Attack,
}

/// What there is ever more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Accounts in the database.
    Users,
    /// Messages that wait for others.
    Waiting,
    /// Devices of the account that is written to.
    Devices,
    /// Accounts that one send is for.
    Group,
    /// Processes on the same database.
    Nodes,
}

/// What is measured.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A server that runs already, and its process when it is on this machine.
    Target { api: SocketAddr, process: Option<u32> },
    /// A program, of which a server is started for each run.
    Program(PathBuf),
}

impl Subject {
    pub fn name(&self) -> String {
        match self {
            Self::Target { api, .. } => api.to_string(),
            Self::Program(path) => path.display().to_string(),
        }
    }
}

/// The numbers of one measurement.
#[derive(Clone, Debug)]
pub struct Options {
    pub mode: Mode,
    pub runs: usize,
    pub subjects: Vec<Subject>,
    /// Processes that work for the server, such as its database.
    pub others: Vec<(String, u32)>,
    /// Further options for servers of our own, the folder to make their folders in, and what else they are to use.
    pub server_options: Vec<String>,
    pub parent: PathBuf,
    pub postgres: Option<String>,
    pub valkey: Option<String>,
    pub connections: usize,
    pub recipients: usize,
    pub receivers: usize,
    pub duration: Duration,
    pub size: usize,
    /// Sends per second, at fixed times. Without it each sender goes on as soon as it has its answer.
    pub rate: Option<f64>,
    pub sockets: usize,
    pub sockets_per_device: usize,
    pub messages: usize,
    pub volume: usize,
    pub devices: usize,
    /// Messages that are written into the database directly.
    pub fill: usize,
    pub axes: Vec<Axis>,
    pub steps: Option<Vec<usize>>,
    /// Names of the attacks to run; empty: all.
    pub attacks: Vec<String>,
    /// Whether the latencies under attack have to be within their limits as well.
    pub is_timed: bool,
    /// A `resolv.conf` for our own servers instead of the machine's.
    pub resolver: Option<PathBuf>,
    /// Where the Markdown table of the attacks goes.
    pub markdown: Option<PathBuf>,
    pub json: Option<PathBuf>,
    pub plot: Option<PathBuf>,
    mode_name: String,
}

/// What is taken when nothing else is said.
struct Defaults {
    connections: usize,
    recipients: usize,
    receivers: usize,
    seconds: usize,
    size: usize,
    rate: usize,
    messages: usize,
}

impl Mode {
    fn of(name: &str) -> Self {
        match name {
            "register" => Self::Register,
            "relay" => Self::Relay,
            "open" | "light" => Self::Open,
            "drain" => Self::Drain,
            "idle" => Self::Idle,
            "attachments" => Self::Attachments,
            "mixed" => Self::Mixed,
            "start" => Self::Start,
            "growth" => Self::Growth,
            "attack" => Self::Attack,
            _ => Self::Send,
        }
    }

    fn defaults(self) -> Defaults {
        let usual = Defaults {
            connections: 64,
            recipients: 200,
            receivers: 50,
            seconds: 10,
            size: 1024,
            rate: 0,
            messages: 200,
        };
        match self {
            Self::Send | Self::Relay => usual,
            Self::Register => Defaults { connections: 4, ..usual },
            Self::Open => Defaults { connections: 16, receivers: 16, seconds: 30, rate: 1000, ..usual },
            Self::Drain => Defaults { connections: 16, recipients: 50, ..usual },
            Self::Idle => Defaults { seconds: 30, ..usual },
            Self::Attachments => Defaults { connections: 16, size: 1 << 20, ..usual },
            Self::Mixed => Defaults { seconds: 30, rate: 500, ..usual },
            Self::Start => Defaults { connections: 16, recipients: 16, seconds: 2, ..usual },
            Self::Growth | Self::Attack => Defaults { seconds: 5, ..usual },
        }
    }
}

impl Options {
    /// Reads the command line; ends the program when it can't be understood.
    pub fn parse() -> Self {
        Self::of(&grammar().get_matches())
    }

    fn of(given: &ArgMatches) -> Self {
        let text = |name: &str| given.get_one::<String>(name).cloned();
        let number = |name: &str, default: usize| given.get_one::<usize>(name).copied().unwrap_or(default);
        let mode_name = text("mode").unwrap_or_default();
        let mode = Mode::of(&mode_name);
        let usual = mode.defaults();
        let rate = number("rate", if mode_name == "light" { 100 } else { usual.rate });
        let axes: Vec<String> = given.get_many("grow").into_iter().flatten().cloned().collect();
        Self {
            mode,
            runs: number("runs", if mode == Mode::Attack { 1 } else { 3 }).max(1),
            subjects: subjects(given),
            others: given.get_many::<String>("other-pid").into_iter().flatten().map(|text| named_pid(text)).collect(),
            server_options: given.get_many("server-options").into_iter().flatten().cloned().collect(),
            parent: text("folder").map_or_else(std::env::temp_dir, PathBuf::from),
            postgres: text("postgres"),
            valkey: text("valkey"),
            connections: number("connections", usual.connections).max(1),
            recipients: number("recipients", usual.recipients).max(1),
            receivers: number("receivers", usual.receivers).max(1),
            duration: Duration::from_secs(number("seconds", usual.seconds) as u64),
            size: number("size", usual.size).max(crate::wire::LABEL),
            rate: (rate > 0).then_some(rate as f64),
            sockets: number("sockets", 15_000).max(1),
            sockets_per_device: number("sockets-per-device", 8).max(1),
            messages: number("messages", usual.messages),
            volume: number("volume", 512).max(1) << 20,
            devices: number("devices", 200).max(2),
            fill: number("fill", 1_000_000),
            axes: axes.iter().filter_map(|axis| Axis::of(axis)).collect(),
            steps: given.get_many::<usize>("steps").map(|steps| steps.copied().collect()),
            attacks: given.get_many("attacks").into_iter().flatten().cloned().collect(),
            is_timed: !given.get_flag("untimed"),
            resolver: None,
            markdown: text("markdown").map(PathBuf::from),
            json: text("json").map(PathBuf::from),
            plot: text("plot").map(PathBuf::from),
            mode_name,
        }
    }

    /// What is above a drawing.
    pub fn title(&self) -> String {
        let each = self.rate.map_or_else(String::new, |rate| format!(", {rate}/s"));
        format!("{}{each}, {} connections, {} bytes", self.mode_name, self.connections, self.size)
    }

    /// What was asked for, without secrets and names of files.
    pub fn json(&self) -> Value {
        json!({
            "mode": self.mode_name,
            "runs": self.runs,
            "server_options": self.server_options.iter().map(|option| without_secrets(option)).collect::<Vec<_>>(),
            "postgres": self.postgres.is_some(),
            "valkey": self.valkey.is_some(),
            "connections": self.connections,
            "recipients": self.recipients,
            "receivers": self.receivers,
            "seconds": self.duration.as_secs(),
            "size": self.size,
            "rate": self.rate,
            "sockets": self.sockets,
            "sockets_per_device": self.sockets_per_device,
            "messages": self.messages,
            "volume_mib": self.volume >> 20,
            "devices": self.devices,
            "fill": self.fill,
            "grow": self.axes.iter().map(|axis| axis.option()).collect::<Vec<_>>(),
            "steps": self.steps,
            "attacks": self.attacks,
        })
    }
}

impl Axis {
    /// Those that take little to set up come first.
    pub const ALL: [Self; 5] = [Self::Group, Self::Devices, Self::Users, Self::Waiting, Self::Nodes];

    /// What it is called on the command line.
    pub fn option(self) -> &'static str {
        match self {
            Self::Users => "users",
            Self::Waiting => "waiting",
            Self::Devices => "devices",
            Self::Group => "group",
            Self::Nodes => "nodes",
        }
    }

    /// Those that may be named.
    pub fn options() -> [&'static str; 5] {
        Self::ALL.map(Self::option)
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|axis| axis.option() == name)
    }
}

/// An option of the server as it may be shown: of what may hold a secret only the name is left.
fn without_secrets(option: &str) -> String {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let is_delicate = ["url", "secret", "key", "password", "token", "credentials", "contact", "endpoint"];
    if value.is_empty() && !name.starts_with("--") {
        // The value of the option before it, perhaps.
        return "…".to_owned();
    }
    if value.is_empty() || !is_delicate.iter().any(|word| name.contains(word)) {
        return option.to_owned();
    }
    let scheme = value.split_once("://").map_or("", |(scheme, _)| scheme);
    format!("{name}={scheme}…")
}

fn subjects(given: &ArgMatches) -> Vec<Subject> {
    let list = |name: &str| given.get_many::<String>(name).into_iter().flatten().cloned().collect::<Vec<_>>();
    let pids: Vec<usize> = given.get_many::<usize>("target-pid").into_iter().flatten().copied().collect();
    let (targets, mut programs) = (list("target"), list("server"));
    if pids.len() > targets.len() {
        refuse("there are more --target-pid than --target");
    }
    if targets.is_empty() && programs.is_empty() {
        programs.push("target/release/obscura-server".to_owned());
    }
    let target = |(n, url): (usize, &String)| {
        let address = url.trim_start_matches("http://").trim_end_matches('/').parse();
        let api = address.unwrap_or_else(|_| refuse("--target takes http://ADDRESS:PORT"));
        Subject::Target { api, process: pids.get(n).and_then(|pid| u32::try_from(*pid).ok()) }
    };
    let programs = programs.iter().map(|path| Subject::Program(path.into()));
    targets.iter().enumerate().map(target).chain(programs).collect()
}

fn named_pid(text: &str) -> (String, u32) {
    let parsed = text.split_once('=').and_then(|(name, pid)| Some((name.to_owned(), pid.parse().ok()?)));
    parsed.unwrap_or_else(|| refuse("--other-pid takes NAME=PID"))
}

fn refuse(what: &str) -> ! {
    grammar().error(ErrorKind::InvalidValue, what).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Options {
        Options::of(&grammar().get_matches_from([&["obscura-load"], arguments].concat()))
    }

    #[test]
    fn several_servers_are_measured_in_one_run() {
        let options =
            parsed(&["send", "--target", "http://127.0.0.1:1", "--target", "127.0.0.1:2", "--target-pid", "7"]);
        let shown: Vec<String> = options.subjects.iter().map(Subject::name).collect();
        assert_eq!(shown, ["127.0.0.1:1", "127.0.0.1:2"]);
        assert!(matches!(options.subjects[0], Subject::Target { process: Some(7), .. }));
        assert!(matches!(options.subjects[1], Subject::Target { process: None, .. }));
        assert_eq!(parsed(&["send"]).subjects.len(), 1);
    }

    #[test]
    fn light_is_open_at_a_hundred_a_second() {
        assert_eq!((parsed(&["light"]).mode, parsed(&["light"]).rate), (Mode::Open, Some(100.0)));
        assert_eq!(parsed(&["light", "--rate", "7"]).rate, Some(7.0));
        assert_eq!(parsed(&["relay"]).rate, None);
    }

    #[test]
    fn secrets_are_not_told() {
        let options =
            ["send", "--postgres", "postgres://me:secret@host/db", "--", "--db-url=postgres://me:secret@host/db"];
        let told = parsed(&[&options[..], &["--jwt-secret", "secret", "--storage-secret-key=secret"]].concat()).json();
        assert!(!told.to_string().contains("secret@") && !told.to_string().contains("\"secret\""), "{told}");
        assert!(!told.to_string().contains("=secret") && told.to_string().contains("--db-url=postgres…"), "{told}");
    }
}
