//! Puts load on a server and tells what it did.
//!
//! ```text
//! cargo build --release && cargo run --release --example load -- send
//! ```
//!
//! Each run starts a server of its own, on an empty folder, and stops it again; `--target` measures one that is running
//! already. The tool shares the machine with the server, so it tells its own CPU time too. See docs/PERFORMANCE.md.

mod drain;
mod http;
mod idle;
mod options;
mod people;
mod relay;
mod report;
mod send;
mod server;
mod socket;
mod start;

#[path = "../../tests/it/harness/signer.rs"]
#[expect(dead_code, reason = "the tests use all of it, this tool only a part")]
mod signer;

use anyhow::{Result, bail};

use options::{Mode, Options};
use report::Report;

// One thread: the tool should leave the other cores to the server.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let options = Options::parse();
    let mut reports = Vec::new();
    for run in 1..=options.runs {
        eprintln!("run {run} of {}, load average {}", options.runs, report::load_average());
        reports.push(tokio::select! {
            report = measure(&options) => report?,
            // Ends the server and removes its folder on the way out.
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        });
    }
    println!("{}", Report::table(&reports));
    Ok(())
}

async fn measure(options: &Options) -> Result<Report> {
    match options.mode {
        Mode::Send => send::measure(options).await,
        Mode::Relay | Mode::Light => relay::measure(options).await,
        Mode::Idle => idle::measure(options).await,
        Mode::Drain => drain::measure(options).await,
        Mode::Start => start::measure(options).await,
    }
}
