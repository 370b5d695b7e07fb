//! Devices that come back to a full inbox, all at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::http::Connection;
use crate::options::Options;
use crate::people::{Device, fill, register};
use crate::report::{Meter, Report};
use crate::server::Server;
use crate::socket::Socket;

const READ_BUFFER: usize = 64 << 10;
/// Acks wait up to half a second for company.
const AFTERMATH: Duration = Duration::from_secs(2);

pub async fn measure(options: &Options) -> Result<Report> {
    let server = Server::start(options).await?;
    let mut report = Report::default();
    let senders = register(server.api, options.connections).await?;
    let devices = register(server.api, options.recipients).await?;
    let total = devices.len() * options.messages;
    let filling = Meter::start(server.pid());
    fill(server.api, &senders, &devices, options.messages, options.size).await?;
    report.add("queued in batches, messages/s", total as f64 / filling.read().seconds);
    server.add_memory(&mut report, "with full inboxes");

    let meter = Meter::start(server.pid());
    let began = Instant::now();
    let mut work = JoinSet::new();
    for device in devices.clone() {
        work.spawn(empty(server.api, device, options.messages, began));
    }
    let mut latencies = work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    let delivered = began.elapsed();
    tokio::time::sleep(AFTERMATH).await;
    let cost = meter.read();
    report.add("delivered, messages/s", total as f64 / delivered.as_secs_f64());
    report.add("all delivered after, ms", delivered.as_secs_f64() * 1000.0);
    report.add_latencies("connect to last message", &mut latencies);
    if let Some(cpu) = cost.server_cpu {
        report.add("server, CPU s per 1000", cpu * 1000.0 / total as f64);
    }
    report.add("this tool, CPU s per 1000", cost.own_cpu * 1000.0 / total as f64);
    let mut left = 0;
    let mut connection = Connection::open(server.api).await?;
    for device in &devices {
        let mut socket = Socket::open(&mut connection, server.api, device, READ_BUFFER).await?;
        if let Ok(mail) = tokio::time::timeout(Duration::from_millis(50), socket.mail()).await {
            left += mail?.len();
        }
    }
    report.add("left in the inboxes", left as f64);
    server.add_memory(&mut report, "after");
    Ok(report)
}

/// Connects, takes everything and acks it. Answers after how many microseconds the last message was there.
async fn empty(api: std::net::SocketAddr, device: Device, messages: usize, began: Instant) -> Result<u32> {
    let mut connection = Connection::open(api).await?;
    let mut socket = Socket::open(&mut connection, api, &device, READ_BUFFER).await?;
    let mut taken = 0;
    while taken < messages {
        let mail = socket.mail().await?;
        taken += mail.len();
        socket.ack(&mail).await?;
    }
    ensure!(taken == messages, "{taken} messages came instead of {messages}");
    let micros = began.elapsed().as_micros() as u32;
    // Acks that have been sent count, even if the socket ends now.
    Ok(micros)
}
