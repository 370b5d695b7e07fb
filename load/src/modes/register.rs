//! As many sign-ups as the server takes.

use std::time::Instant;

use anyhow::Result;
use tokio::task::JoinSet;

use crate::figures::Figures;
use crate::http::Connection;
use crate::job::Job;
use crate::people::Registrar;
use crate::server::Server;

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let mut figures = Figures::default();
    server.add_memory(&mut figures, "before");
    let (registrar, step) = (Registrar::new(), job.options.connections);
    let until = Instant::now() + job.options.duration;
    job.phase("signing up", server);
    job.watch.begin();
    let meter = job.meter(server);
    let mut work = JoinSet::new();
    for first in 0..step {
        let (api, registrar, watch) = (server.api, registrar.clone(), job.watch.clone());
        work.spawn(async move {
            let mut connection = Connection::open(api).await?;
            let mut count = 0;
            for n in (first..).step_by(step) {
                let began = Instant::now();
                if began >= until {
                    break;
                }
                registrar.sign_up(&mut connection, n).await?;
                watch.record(began.elapsed());
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let count: u64 = work.join_all().await.into_iter().sum::<Result<u64>>()?;
    let cost = meter.read();
    let curve = job.watch.end();
    figures.add("signups_per_s", count as f64 / cost.seconds);
    cost.add_to(&mut figures, "", count);
    figures.add_latencies("", &curve);
    server.add_memory(&mut figures, "after");
    figures.curve = Some(curve);
    Ok(figures)
}
