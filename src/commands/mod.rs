//! What the operator types: the server itself, or one of its commands.

mod after_restore;
mod confirm_clock;
mod healthcheck;
mod make_env;
mod transfer;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Arg, ArgMatches, Command as Grammar, value_parser};

use crate::config::{self, Config, ConfigError, Loaded};
use crate::server::Server;

/// A command beside serving.
#[derive(Clone, Debug)]
pub enum Command {
    /// Makes a restored backup safe to serve from.
    AfterRestore,
    /// Ends a doubt about the clock.
    ConfirmClock,
    /// Asks the running server whether it is ready.
    Healthcheck,
    /// Makes the settings of `docker-compose.yml`.
    MakeEnv {
        /// The file to write instead of printing them.
        output: Option<PathBuf>,
    },
    /// Moves an embedded server's data to PostgreSQL.
    Transfer(transfer::Request),
}

/// Reads the command line and the environment.
pub fn parse() -> Result<(Loaded, Option<Command>), ConfigError> {
    let matches = Config::command().subcommands(grammars()).try_get_matches()?;
    let (matches, command) = match matches.subcommand() {
        Some((name, matches)) => (matches.clone(), Command::chosen(name, matches)),
        None => (matches, None),
    };
    Ok((Config::read(&matches, config::environment)?, command))
}

fn grammars() -> [Grammar; 5] {
    let after_restore = Grammar::new("after-restore").about(
        "Run once after restoring a backup, before the server starts: drops all one-time prekeys, since the ones in the \
         backup may have been handed out after it was made (devices upload new ones when they connect)",
    );
    let confirm_clock = Grammar::new("confirm-clock").about(
        "Tells the servers of this database that the clock of this machine is right, when they doubt theirs after a jump or \
         a long rest: ages count by it from then on. Look at `date` first. Runs beside the servers",
    );
    let healthcheck = Grammar::new("healthcheck").about(
        "Asks the server that runs on this machine with the same options whether it is ready: ends with 0 when it is, \
         otherwise with 1 and a sentence, within 3 seconds",
    );
    let output = Arg::new("output")
        .long("output")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("Writes them to this file, which must not exist yet, readable by its owner only");
    let make_env = Grammar::new("make-env")
        .about("Prints the settings that docker-compose.yml reads from a file named .env, with fresh secrets")
        .arg(output);
    [after_restore, confirm_clock, healthcheck, make_env, transfer::grammar()]
}

impl Command {
    fn chosen(name: &str, matches: &ArgMatches) -> Option<Self> {
        Some(match name {
            "after-restore" => Self::AfterRestore,
            "confirm-clock" => Self::ConfirmClock,
            "healthcheck" => Self::Healthcheck,
            "transfer" => Self::Transfer(transfer::Request::read(matches)),
            "make-env" => Self::MakeEnv { output: matches.get_one("output").cloned() },
            _ => return None,
        })
    }

    /// Runs the command to its end.
    pub fn run(self, config: Config) -> ExitCode {
        let done = match self {
            Self::AfterRestore => after_restore::run(config),
            Self::ConfirmClock => confirm_clock::run(config),
            Self::Healthcheck => healthcheck::run(&config.server),
            Self::MakeEnv { output } => make_env::run(output.as_deref()),
            Self::Transfer(request) => request.run(config),
        };
        // Half a file of settings, because the disk behind standard output is full, is no success.
        let printed = done.and_then(|text| writeln!(io::stdout(), "{text}").context("standard output takes no more"));
        match printed {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("obscura-server: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}

/// What the operator sees once the server runs. Tools may read the addresses from it.
pub fn welcome(server: &Server, data_dir: Option<&Path>) -> String {
    let mut text = format!("Obscura Server {}\n", env!("CARGO_PKG_VERSION"));
    let api = reachable(server.api_address());
    let _ = writeln!(text, "  API         http://{api}");
    let _ = writeln!(text, "  management  http://{}", reachable(server.management_address()));
    if let Some(folder) = data_dir {
        let _ = writeln!(text, "  data        {}", folder.display());
    }
    let _ = write!(
        text,
        "Try next:\n  curl http://{}/readyz\n  cd examples/javascript && npm ci && node two-people.mjs http://{api}",
        reachable(server.management_address())
    );
    text
}

/// An address that a client on this machine can use.
fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port())
    } else {
        address
    }
}
