//! Reads the configuration, runs the server, sets the exit code.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use obscura_server::clock::Clock;
use obscura_server::commands;
use obscura_server::config::Loaded;
use obscura_server::server::{Drained, Server};
use obscura_server::telemetry::Telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What telemetry may take at the very end, when the server has stopped.
const FLUSHING: Duration = Duration::from_secs(2);
/// What it may take after a second signal, when its sender waits for nothing any more.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The ways in which a process is asked to stop.
type Stop = (Signal, Signal);

fn main() -> ExitCode {
    match commands::parse() {
        Ok((loaded, None)) => serve(loaded),
        Ok((loaded, Some(command))) => command.run(loaded.config),
        Err(error) => error.report(),
    }
}

#[tokio::main]
async fn serve(loaded: Loaded) -> ExitCode {
    let (telemetry, mut stop) = match prepare(&loaded) {
        Ok(prepared) => prepared,
        Err(error) => return complain(&error),
    };
    let ended = run(loaded, telemetry.clone(), &mut stop).await;
    let (exit, flushing) = ended.unwrap_or_else(|error| (complain(&error), FLUSHING));
    tokio::select! {
        () = telemetry.flush(flushing) => {}
        () = asked(&mut stop) => {}
    }
    // Ends what is left, such as a connection whose client never reads, without waiting for it.
    std::process::exit(if exit == ExitCode::SUCCESS { 0 } else { 1 })
}

fn prepare(loaded: &Loaded) -> anyhow::Result<(Telemetry, Stop)> {
    let telemetry = Telemetry::open(&loaded.config.telemetry)?;
    telemetry.start_logs(loaded.config.telemetry.log_format);
    loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
    Ok((telemetry, (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)))
}

fn complain(error: &anyhow::Error) -> ExitCode {
    eprintln!("obscura-server: {error:#}");
    ExitCode::FAILURE
}

/// Runs the server to its end. Answers the exit code, and how long telemetry may take then.
async fn run(loaded: Loaded, telemetry: Telemetry, stop: &mut Stop) -> anyhow::Result<(ExitCode, Duration)> {
    let data_dir = loaded.config.data_dir.clone();
    let server = tokio::select! {
        server = Server::start(loaded.config, Clock::system(), telemetry) => server?,
        () = asked(stop) => return Ok((ExitCode::SUCCESS, FLUSHING)),
    };
    // A closed standard output means that nothing is wanted there.
    let _ = writeln!(std::io::stdout(), "{}", commands::welcome(&server, data_dir.as_deref()));
    let mut exit = tokio::select! {
        () = asked(stop) => if server.has_its_files().await { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        () = server.failed() => ExitCode::FAILURE,
    };
    info!("stopping; a second signal stops at once");
    let stopped = async {
        // A server whose task has died has nothing good to give meanwhile.
        if exit == ExitCode::SUCCESS && server.drain().await == Drained::Failed {
            exit = ExitCode::FAILURE;
        }
        if !server.stop().await {
            exit = ExitCode::FAILURE;
        }
        exit
    };
    tokio::select! {
        exit = stopped => Ok((exit, FLUSHING)),
        () = asked(stop) => {
            error!("stopped at once, by a second signal");
            Ok((exit, LAST_WORDS))
        }
    }
}

/// Ends when the process is asked to stop.
async fn asked((terminate, interrupt): &mut Stop) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
