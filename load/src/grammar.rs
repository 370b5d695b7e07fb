//! The command line.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, Command, value_parser};

use crate::modes::attack::ATTACKS;
use crate::options::Axis;

const MODES: &[&str] = &[
    "register",
    "send",
    "relay",
    "open",
    "light",
    "drain",
    "idle",
    "attachments",
    "mixed",
    "start",
    "growth",
    "attack",
];

const BEHIND: &str = "\
Modes:
  register     sign-ups, each connection the next one as soon as it has its answer
  send         sends to devices that are offline, each connection the next one as soon as it has its answer
  relay        sends to devices that are online and acknowledge; lost, repeated and reordered ones are counted
  open, light  the same at a fixed rate; latency from the moment a send was due, so that no stall is hidden
  drain        devices that come back to a full inbox, all at once
  idle         open sockets on which nothing happens
  attachments  up and down, compared byte for byte, beside plain copies on the same disk
  mixed        a day in the life: devices come and go, write to each other and to groups, share attachments
  start        the start of a server on a full database
  growth       sends and relay while there is ever more of something else
  attack       attacks beside ten honest clients, on a server with default limits; fails when they feel it

It starts a server of its own for each run, on an empty folder, unless --target names one that runs.
load/README.md explains what is measured and every figure.";

pub fn grammar() -> Command {
    Command::new("obscura-load")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Measures a relay of the obscura.v1 protocol")
        .after_help(BEHIND)
        .arg(Arg::new("mode").required(true).value_parser(PossibleValuesParser::new(MODES)).help("What to measure"))
        .arg(
            Arg::new("attacks")
                .value_name("NAME")
                .num_args(0..)
                .value_parser(PossibleValuesParser::new(ATTACKS.iter().map(|attack| attack.name)))
                .help("attack: these only [all]"),
        )
        .args(whom())
        .args(how_much())
        .args(output())
        .arg(Arg::new("server-options").last(true).num_args(..).help("Further options of our own servers, behind --"))
}

fn number(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("N").help(help).value_parser(value_parser!(usize))
}

fn text(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn whom() -> [Arg; 8] {
    [
        text("target", "URL", "A server that runs already, with high enough limits; may be repeated: measured in turn")
            .action(ArgAction::Append),
        number("target-pid", "Its process, for CPU time and memory; may be repeated, in the order of --target")
            .action(ArgAction::Append),
        text("server", "PROGRAM", "The program to start otherwise; may be repeated [target/release/obscura-server]")
            .action(ArgAction::Append),
        text("other-pid", "NAME=PID", "A process that works for the server, such as its database; may be repeated")
            .action(ArgAction::Append),
        text(
            "folder",
            "DIR",
            "Where folders of servers are made; the disk under it matters [the one for temporary files]",
        ),
        text("postgres", "URL", "Our own servers use this PostgreSQL, each a database of its own")
            .env("OBSCURA_LOAD_POSTGRES")
            .hide_env_values(true),
        text("valkey", "URL", "Our own servers use this Valkey, each with a prefix of its own")
            .env("OBSCURA_LOAD_VALKEY")
            .hide_env_values(true),
        number("runs", "How often; medians are told, and the lowest and highest [3]"),
    ]
}

fn how_much() -> [Arg; 14] {
    let axes = PossibleValuesParser::new(Axis::options());
    [
        number(
            "connections",
            "Connections that send, sign up or transfer at the same time [64; register 4; others 16]",
        ),
        number("recipients", "send, growth: devices written to; drain: devices with full inboxes [200; drain 50]"),
        number("receivers", "relay, open: devices that are online [50; open 16]"),
        number("seconds", "How long [10; open, idle, mixed 30; growth 5 for each step, attack 5 for each]"),
        number("size", "Bytes of a message, or of an attachment [1024; attachments 1048576]"),
        number("rate", "relay, open: sends per second; mixed: actions per second [open 1000; light 100; mixed 500]"),
        number("sockets", "idle: open sockets [15000]"),
        number("sockets-per-device", "idle: up to this many of them share a device [8]"),
        number("messages", "drain: messages in each inbox [200]"),
        number("volume", "attachments: MiB that are uploaded, downloaded and copied [512]"),
        number("devices", "mixed: devices [200]"),
        number("fill", "start: waiting messages, written into the database directly [1000000]"),
        text("grow", "WHAT", "growth: of what there is ever more; may be repeated [all]")
            .action(ArgAction::Append)
            .value_parser(axes),
        number("steps", "growth: how much of it, separated by commas").value_delimiter(',').requires("grow"),
    ]
}

fn output() -> [Arg; 4] {
    [
        text("markdown", "FILE", "attack: writes the table into this file, as Markdown"),
        Arg::new("untimed")
            .long("untimed")
            .action(ArgAction::SetTrue)
            .help("attack: latencies are told and not judged, for machines that are busy"),
        text("json", "FILE", "Appends the figures to this file, as one line [printed behind the table]"),
        text("plot", "FILE", "Draws latencies and throughput into this SVG file"),
    ]
}
