//! What the operator types: the server itself, or one of its commands.

mod transfer;

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Command as Grammar;

use crate::config::{self, Config, ConfigError, Loaded};
use crate::server::{self, Server};
use crate::store::{self, Store};

/// A command beside serving.
#[derive(Clone, Debug)]
pub enum Command {
    /// `after-restore`: see `after_restore`.
    AfterRestore,
    /// `transfer`: see `transfer`.
    Transfer(transfer::Request),
}

/// Reads the command line and the environment.
pub fn parse() -> Result<(Loaded, Option<Command>), ConfigError> {
    let after_restore = Grammar::new("after-restore").about(
        "Run once after restoring a backup, before the server starts: drops all one-time prekeys, since the ones in the \
         backup may have been handed out after it was made (devices upload new ones when they connect)",
    );
    let matches = Config::command().subcommand(after_restore).subcommand(transfer::grammar()).try_get_matches()?;
    let (matches, command) = match matches.subcommand() {
        Some(("transfer", matches)) => (matches.clone(), Some(Command::Transfer(transfer::Request::read(matches)))),
        Some((_, matches)) => (matches.clone(), Some(Command::AfterRestore)),
        None => (matches, None),
    };
    Ok((Config::read(&matches, config::environment)?, command))
}

impl Command {
    /// Runs the command to its end.
    pub fn run(self, config: Config) -> ExitCode {
        let done = match self {
            Self::AfterRestore => after_restore(config),
            Self::Transfer(request) => request.run(config),
        };
        match done {
            Ok(sentence) => {
                println!("{sentence}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("obscura-server: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}

/// Makes a restored database safe to serve from: no one-time prekey that may have been handed out since the backup is
/// handed out again.
#[tokio::main(flavor = "current_thread")]
async fn after_restore(config: Config) -> anyhow::Result<String> {
    let file = config.database.file().context("after-restore works on the SQLite database of --data-dir")?;
    if !file.exists() {
        bail!("there is no database at {}; restore the backup first", file.display());
    }
    let _lock = server::lock_database(file)?;
    let store = Store::open(&config.database, store::Limits::of(&config)).await?;
    let dropped = store.forget_one_time_prekeys().await?;
    store.close().await;
    Ok(format!("Dropped {dropped} one-time prekeys. The server can be started; devices will be asked for new ones."))
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
