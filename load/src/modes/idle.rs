//! What an open socket costs while nothing happens on it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use crate::figures::Figures;
use crate::http::Connection;
use crate::job::Job;
use crate::people::{Device, register};
use crate::proc::{open_files, resident_kib};
use crate::server::Server;
use crate::socket::{SMALL_BUFFER, Socket};

/// Connections that get tickets and open sockets with them.
const AT_ONCE: usize = 8;
/// For the server to finish what the opening or closing of the sockets has started.
const SETTLING: Duration = Duration::from_secs(3);

pub async fn measure(job: &Job, server: &mut Server) -> Result<Figures> {
    let options = &job.options;
    ensure!(open_files() > options.sockets + 100, "raise the limit of open files first: ulimit -n");
    let mut figures = Figures::default();
    job.phase("signing up", server);
    let devices = register(server.api, options.sockets.div_ceil(options.sockets_per_device)).await?;
    server.add_memory(&mut figures, "after sign-ups");
    if server.is_own() {
        // Sign-ups leave memory behind that the sockets would otherwise grow into unseen.
        server.start_again("TERM").await?;
    }
    let process = server.process().context("idle needs the process of the server: --target-pid")?;
    // What the first few sockets load is not what each of them costs.
    let mut connection = Connection::open(server.api).await?;
    let first = Socket::open(&mut connection, server.api, &devices[0], SMALL_BUFFER).await?;
    tokio::time::sleep(SETTLING).await;
    let before = resident_kib(process).context("the server is gone")?;

    job.phase("opening sockets", server);
    let opening = Instant::now();
    let opened = open(job, server, &devices).await?;
    figures.add("opened_per_s", options.sockets as f64 / opening.elapsed().as_secs_f64());
    drop((connection, first));
    let mut holding = JoinSet::new();
    // Reading answers the pings. None of them gets any mail.
    for mut socket in opened {
        holding.spawn(async move { socket.mail().await.map(drop) });
    }
    tokio::time::sleep(SETTLING).await;
    job.phase("holding them", server);
    let meter = job.meter(server);
    tokio::time::sleep(options.duration).await;
    let (after, cost) = (resident_kib(process).context("the server is gone")?, meter.read());
    ensure!(holding.try_join_next().is_none(), "a socket has been closed; {} are left", holding.len());
    figures.add_of("resident_mib", "before", before.0 / 1024.0);
    figures.add_of("resident_mib", "with the sockets", after.0 / 1024.0);
    figures.add("socket_kib", (after.0 - before.0) / options.sockets as f64);
    figures.add("socket_anonymous_kib", (after.1 - before.1) / options.sockets as f64);
    figures.add("server_cores", cost.server.unwrap_or(f64::NAN) / cost.seconds);
    holding.shutdown().await;
    tokio::time::sleep(SETTLING).await;
    server.add_memory(&mut figures, "after closing them");
    Ok(figures)
}

async fn open(job: &Job, server: &Server, devices: &[Device]) -> Result<Vec<Socket>> {
    let (api, count) = (server.api, job.options.sockets);
    let mut work = JoinSet::new();
    for first in 0..AT_ONCE {
        let (devices, watch) = (devices.to_vec(), job.watch.clone());
        work.spawn(async move {
            let (mut connection, mut sockets) = (Connection::open(api).await?, Vec::new());
            for number in (first..count).step_by(AT_ONCE) {
                let device = &devices[number % devices.len()];
                sockets.push(Socket::open(&mut connection, api, device, SMALL_BUFFER).await?);
                watch.count(1);
            }
            anyhow::Ok(sockets)
        });
    }
    let opened = work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(opened.into_iter().flatten().collect())
}
