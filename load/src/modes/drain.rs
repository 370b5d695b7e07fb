//! Devices that come back to a full inbox, all at once.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::figures::Figures;
use crate::http::Connection;
use crate::job::Job;
use crate::modes::relay::unasked;
use crate::people::{Device, register};
use crate::sender::fill;
use crate::server::Server;
use crate::socket::{LARGE_BUFFER, Socket};

/// Acks wait up to half a second for company.
const AFTERMATH: Duration = Duration::from_secs(2);
/// How long an inbox may take.
const PATIENCE: Duration = Duration::from_secs(300);

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let (options, api) = (&job.options, server.api);
    let mut figures = Figures::default();
    job.phase("signing up", server);
    let senders = register(api, options.connections).await?;
    let devices = register(api, options.recipients).await?;
    let total = devices.len() * options.messages;
    job.phase("filling the inboxes", server);
    let filling = Instant::now();
    fill(api, &senders, &devices, options.messages, options.size).await?;
    figures.add("queued_per_s", total as f64 / filling.elapsed().as_secs_f64());
    server.add_memory(&mut figures, "with full inboxes");

    job.phase("draining", server);
    job.watch.begin();
    let meter = job.meter(server);
    let began = Instant::now();
    let mut work = JoinSet::new();
    for device in devices.clone() {
        let (watch, messages) = (job.watch.clone(), options.messages);
        work.spawn(async move {
            tokio::time::timeout(PATIENCE, empty(api, &device, messages)).await??;
            watch.record(began.elapsed());
            anyhow::Ok(())
        });
    }
    work.join_all().await.into_iter().collect::<Result<()>>()?;
    let delivered = began.elapsed();
    let curve = job.watch.end();
    tokio::time::sleep(AFTERMATH).await;
    let cost = meter.read();
    figures.add("drained_per_s", total as f64 / delivered.as_secs_f64());
    figures.add("drained_ms", delivered.as_secs_f64() * 1000.0);
    figures.add_latencies("connect to last message", &curve);
    cost.add_to(&mut figures, "", total as u64);
    let (mut connection, mut sockets) = (Connection::open(api).await?, Vec::new());
    for device in &devices {
        sockets.push(Socket::open(&mut connection, api, device, LARGE_BUFFER).await?);
    }
    figures.add("left", unasked(&mut sockets).await? as f64);
    server.add_memory(&mut figures, "after");
    figures.curve = Some(curve);
    Ok(figures)
}

/// Connects, takes everything and acks it.
async fn empty(api: SocketAddr, device: &Device, messages: usize) -> Result<()> {
    let mut connection = Connection::open(api).await?;
    let mut socket = Socket::open(&mut connection, api, device, LARGE_BUFFER).await?;
    let mut taken = 0;
    while taken < messages {
        let mail = socket.mail().await?;
        taken += mail.len();
        socket.ack(mail).await?;
    }
    ensure!(taken == messages, "{taken} messages came instead of {messages}");
    // Acks that have been sent count, even if the socket ends now.
    Ok(())
}
