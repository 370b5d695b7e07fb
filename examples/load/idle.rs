//! What an open socket costs while nothing happens on it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use crate::http::Connection;
use crate::options::Options;
use crate::people::register;
use crate::report::{Meter, Report, resident_kib};
use crate::server::Server;
use crate::socket::Socket;

/// Sockets of one connection that gets the tickets for them.
const AT_ONCE: usize = 8;
const READ_BUFFER: usize = 1024;
/// For the server to finish what the opening or closing of the sockets has started.
const SETTLING: Duration = Duration::from_secs(3);

pub async fn measure(options: &Options) -> Result<Report> {
    ensure!(open_files()? > options.sockets + 100, "raise the limit of open files first: ulimit -n");
    let mut server = Server::start(options).await?;
    let mut report = Report::default();
    let devices = register(server.api, options.sockets.div_ceil(options.sockets_per_device)).await?;
    server.add_memory(&mut report, "after sign-ups");
    if options.is_own_server() {
        // Sign-ups leave memory behind that the sockets would otherwise grow into unseen.
        server.start_again("TERM").await?;
    }
    let pid = server.pid().context("idle needs the process of the server")?;
    // What the first few sockets load is not what each of them costs.
    let mut connection = Connection::open(server.api).await?;
    let first = Socket::open(&mut connection, server.api, &devices[0], READ_BUFFER).await?;
    tokio::time::sleep(SETTLING).await;
    let before = resident_kib(pid).context("the server is gone")?;

    let opening = Instant::now();
    let mut work = JoinSet::new();
    for start in 0..AT_ONCE {
        let (api, devices) = (server.api, devices.clone());
        let numbers = (start..options.sockets).step_by(AT_ONCE);
        work.spawn(async move {
            let (mut connection, mut sockets) = (Connection::open(api).await?, Vec::new());
            for number in numbers {
                let device = &devices[number % devices.len()];
                sockets.push(Socket::open(&mut connection, api, device, READ_BUFFER).await?);
            }
            anyhow::Ok(sockets)
        });
    }
    let opened = work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    report.add("sockets opened/s", options.sockets as f64 / opening.elapsed().as_secs_f64());
    drop((connection, first));
    let mut holding = JoinSet::new();
    // Reading answers the pings. None of them gets any mail.
    opened
        .into_iter()
        .flatten()
        .for_each(|mut socket| drop(holding.spawn(async move { socket.mail().await.map(drop) })));

    tokio::time::sleep(SETTLING).await;
    let meter = Meter::start(Some(pid));
    tokio::time::sleep(options.duration).await;
    let (after, cost) = (resident_kib(pid).context("the server is gone")?, meter.read());
    ensure!(holding.try_join_next().is_none(), "a socket has been closed; {} are left", holding.len());
    report.add("resident memory before, MiB", before.0 / 1024.0);
    report.add("resident memory with the sockets, MiB", after.0 / 1024.0);
    report.add("resident memory per socket, KiB", (after.0 - before.0) / options.sockets as f64);
    report.add("of that anonymous, KiB", (after.1 - before.1) / options.sockets as f64);
    report.add("server, cores in use", cost.server_cpu.unwrap_or(f64::NAN) / cost.seconds);
    holding.shutdown().await;
    tokio::time::sleep(SETTLING).await;
    server.add_memory(&mut report, "after closing them");
    Ok(report)
}

fn open_files() -> Result<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit of open files")?;
    Ok(line.split_whitespace().nth(3).and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX))
}
