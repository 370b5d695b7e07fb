//! Reads the configuration, runs the server, sets the exit code.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use obscura_server::clock::Clock;
use obscura_server::commands;
use obscura_server::config::Loaded;
use obscura_server::server::Server;
use obscura_server::telemetry::Telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

/// What telemetry may take at the very end, when the server has stopped.
const FLUSHING: Duration = Duration::from_secs(2);

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
    let (telemetry, stop) = match prepare(&loaded) {
        Ok(prepared) => prepared,
        Err(error) => return complain(&error),
    };
    let exit = run(loaded, telemetry.clone(), stop).await.unwrap_or_else(|error| complain(&error));
    telemetry.flush(FLUSHING).await;
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

async fn run(loaded: Loaded, telemetry: Telemetry, mut stop: Stop) -> anyhow::Result<ExitCode> {
    let data_dir = loaded.config.data_dir.clone();
    let server = tokio::select! {
        server = Server::start(loaded.config, Clock::system(), telemetry) => server?,
        () = asked(&mut stop) => return Ok(ExitCode::SUCCESS),
    };
    // Whoever closed our standard output doesn't want to know.
    let _ = writeln!(std::io::stdout(), "{}", commands::welcome(&server, data_dir.as_deref()));
    let exit = tokio::select! {
        () = asked(&mut stop) => ExitCode::SUCCESS,
        () = server.failed() => ExitCode::FAILURE,
    };
    info!("stopping; a second signal stops at once");
    let stopped = async {
        // A server whose task has died has nothing good to give meanwhile.
        if exit == ExitCode::SUCCESS {
            server.drain().await;
        }
        server.stop().await;
    };
    tokio::select! {
        () = stopped => {}
        () = asked(&mut stop) => error!("stopped at once, by a second signal"),
    }
    Ok(exit)
}

/// Ends when the process is asked to stop.
async fn asked((terminate, interrupt): &mut Stop) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
