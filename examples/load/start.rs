//! How long a start takes when much is stored.

use anyhow::Result;

use crate::options::Options;
use crate::people::{fill, register};
use crate::report::Report;
use crate::server::{Server, Started};

pub async fn measure(options: &Options) -> Result<Report> {
    let recipients = if options.recipients == 200 { 100 } else { options.recipients };
    let mut server = Server::start(options).await?;
    let mut report = Report::default();
    let senders = register(server.api, options.connections).await?;
    let devices = register(server.api, recipients).await?;
    fill(server.api, &senders, &devices, options.messages, options.size).await?;
    report.add("queued messages", (devices.len() * options.messages) as f64);
    let add = |report: &mut Report, what: &str, started: Started| {
        report.add(format!("{what}: ready after, ms"), started.ready.as_secs_f64() * 1000.0);
        report.add(format!("{what}: API answers after, ms"), started.answering.as_secs_f64() * 1000.0);
    };
    // The first start finds the log of the writes as it was left in the middle of work.
    add(&mut report, "after kill -9", server.start_again("KILL").await?);
    add(&mut report, "after an orderly stop", server.start_again("TERM").await?);
    server.add_memory(&mut report, "after the start");
    Ok(report)
}
