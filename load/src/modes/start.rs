//! How long a start takes when much is stored.

use anyhow::Result;

use crate::database::Rows;
use crate::figures::Figures;
use crate::job::Job;
use crate::modes::send;
use crate::server::{Server, Started};

/// Messages in each of the inboxes.
const EACH: usize = 500;

pub async fn measure(job: &Job, server: &mut Server) -> Result<Figures> {
    let options = &job.options;
    let mut figures = Figures::default();
    job.phase("filling the database", server);
    let rows = Rows { users: options.fill.div_ceil(EACH), messages_each: EACH.min(options.fill), size: options.size };
    let took = server.fill(rows).await?;
    figures.add("filled_s", took.as_secs_f64());
    figures.add("waiting", (rows.users * rows.messages_each) as f64);
    // So that the first start finds the log of the writes as it was left in the middle of work.
    send::measure(job, server).await?;
    let add = |figures: &mut Figures, of: &str, started: Started| {
        figures.add_of("ready_ms", of, started.ready.as_secs_f64() * 1000.0);
        figures.add_of("answering_ms", of, started.answering.as_secs_f64() * 1000.0);
    };
    job.phase("starting", server);
    add(&mut figures, "after kill -9", server.start_again("KILL").await?);
    add(&mut figures, "after an orderly stop", server.start_again("TERM").await?);
    server.add_memory(&mut figures, "after the start");
    Ok(figures)
}
