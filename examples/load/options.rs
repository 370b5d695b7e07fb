//! What the command line asks for.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches, Command, value_parser};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As many sends as the server takes, to devices that are offline.
    Send,
    /// As many sends as the server takes, to devices that are online and ack.
    Relay,
    /// Few sends, at fixed times, to devices that are online.
    Light,
    /// Open sockets on which nothing happens.
    Idle,
    /// Devices that come back to a full inbox.
    Drain,
    /// A start on a full database.
    Start,
}

/// The numbers of one measurement.
#[derive(Clone, Debug)]
pub struct Options {
    pub mode: Mode,
    pub runs: usize,
    /// A server that runs already, and its process when it is on this machine.
    pub target: Option<SocketAddr>,
    pub server_pid: Option<u32>,
    /// The program to start otherwise, the folder to make its folder in, and further options for it.
    pub program: PathBuf,
    pub parent: PathBuf,
    pub server_options: Vec<String>,
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
}

impl Options {
    /// Reads the command line; ends the program when it can't be understood.
    pub fn parse() -> Self {
        let given = grammar().get_matches();
        let mode = match given.get_one::<String>("mode").map(String::as_str) {
            Some("relay") => Mode::Relay,
            Some("light") => Mode::Light,
            Some("idle") => Mode::Idle,
            Some("drain") => Mode::Drain,
            Some("start") => Mode::Start,
            _ => Mode::Send,
        };
        let text = |name: &str| given.get_one::<String>(name).cloned();
        let number = |name: &str, default: usize| given.get_one::<usize>(name).copied().unwrap_or(default);
        let (connections, seconds, messages) = match mode {
            Mode::Send => (64, 10, 0),
            Mode::Relay => (16, 10, 0),
            Mode::Light => (16, 30, 0),
            Mode::Idle => (0, 30, 0),
            Mode::Drain => (16, 0, 200),
            Mode::Start => (16, 0, 1000),
        };
        let rate = given.get_one::<usize>("rate").map(|rate| *rate as f64);
        Self {
            mode,
            runs: number("runs", 3).max(1),
            target: target(&given),
            server_pid: given.get_one::<usize>("server-pid").and_then(|pid| u32::try_from(*pid).ok()),
            program: text("server").unwrap_or_else(|| "target/release/obscura-server".into()).into(),
            parent: text("folder").map_or_else(std::env::temp_dir, PathBuf::from),
            server_options: given.get_many("server-options").into_iter().flatten().cloned().collect(),
            connections: number("connections", connections).max(1),
            recipients: number("recipients", if mode == Mode::Drain { 50 } else { 200 }).max(1),
            receivers: number("receivers", 16).max(1),
            duration: Duration::from_secs(number("seconds", seconds) as u64),
            size: number("size", 1024).max(16),
            rate: rate.or((mode == Mode::Light).then_some(100.0)).filter(|rate| *rate > 0.0),
            sockets: number("sockets", 5000),
            sockets_per_device: number("sockets-per-device", 8).max(1),
            messages: number("messages", messages),
        }
    }

    /// Where to count what the program itself uses.
    pub fn is_own_server(&self) -> bool {
        self.target.is_none()
    }
}

fn target(given: &ArgMatches) -> Option<SocketAddr> {
    let url = given.get_one::<String>("target")?;
    let address = url.trim_start_matches("http://").trim_end_matches('/').parse();
    Some(address.unwrap_or_else(|_| {
        grammar().error(clap::error::ErrorKind::InvalidValue, "--target takes http://ADDRESS:PORT").exit()
    }))
}

fn grammar() -> Command {
    let modes = ["send", "relay", "light", "idle", "drain", "start"];
    let number = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("N").help(help).value_parser(value_parser!(usize))
    };
    let text = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("load").about("Puts load on an Obscura server and tells what it did").args([
        Arg::new("mode").required(true).value_parser(PossibleValuesParser::new(modes)).help("What to measure"),
        number("runs", "How often; the medians are told too [3]"),
        text("target", "URL", "A server that runs already; it has to allow the rate and the connections"),
        number("server-pid", "Its process, for CPU time and memory"),
        text("server", "PROGRAM", "The program to start otherwise [target/release/obscura-server]"),
        text("folder", "DIR", "Where its folder is made; the disk under it matters [the folder for temporary files]"),
        number("connections", "send, drain, start: connections that send; relay, light: senders [64, else 16]"),
        number(
            "recipients",
            "send: devices written to; drain, start: devices whose inboxes are filled [200, drain 50]",
        ),
        number("receivers", "relay, light: devices that are online [16]"),
        number("seconds", "How long [10, light and idle 30]"),
        number("size", "Bytes of a message [1024]"),
        number("rate", "relay, light: sends per second at fixed times; 0: as many as possible [light 100]"),
        number("sockets", "idle: open sockets [5000]"),
        number("sockets-per-device", "idle: up to this many of them share a device [8]"),
        number("messages", "drain, start: messages in each inbox [200, start 1000]"),
        Arg::new("server-options").last(true).num_args(..).help("Further options of the server, behind --"),
    ])
}
