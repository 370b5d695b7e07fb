//! Reads the configuration, runs the server, sets the exit code.

use std::io::Write;
use std::process::ExitCode;

use obscura_server::clock::Clock;
use obscura_server::config::Loaded;
use obscura_server::server::Server;
use obscura_server::{commands, telemetry};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

fn main() -> ExitCode {
    match commands::parse() {
        Ok((loaded, None)) => serve(loaded),
        Ok((loaded, Some(command))) => command.run(loaded.config),
        Err(error) => error.report(),
    }
}

#[tokio::main]
async fn serve(loaded: Loaded) -> ExitCode {
    telemetry::start(loaded.config.telemetry.log_format);
    loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
    match run(loaded).await {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("obscura-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(loaded: Loaded) -> anyhow::Result<ExitCode> {
    let data_dir = loaded.config.data_dir.clone();
    let mut stop = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = tokio::select! {
        server = Server::start(loaded.config, Clock::system()) => server?,
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
    // Ends what is left, such as a connection whose client never reads, without waiting for it.
    std::process::exit(if exit == ExitCode::SUCCESS { 0 } else { 1 })
}

/// Ends when the process is asked to stop.
async fn asked((terminate, interrupt): &mut (Signal, Signal)) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
