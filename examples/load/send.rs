//! As many sends as the server takes.

use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::options::Options;
use crate::people::{Device, Sender, random_bytes, register};
use crate::report::{Meter, Report};
use crate::server::Server;

/// What is done before the counting starts.
const WARM_UP: Duration = Duration::from_secs(2);

/// Each connection belongs to an account of its own, sends one message to one device, waits for the answer, and goes on
/// with the next device.
pub async fn measure(options: &Options) -> Result<Report> {
    let server = Server::start(options).await?;
    let mut report = Report::default();
    server.add_disk(&mut report)?;
    let senders = register(server.api, options.connections).await?;
    let recipients = register(server.api, options.recipients).await?;
    server.add_memory(&mut report, "before");

    let from = Instant::now() + WARM_UP;
    let until = from + options.duration;
    let mut work = JoinSet::new();
    for (n, device) in senders.iter().enumerate() {
        let sender = Sender::open(server.api, device).await?;
        let first = n * recipients.len() / senders.len();
        work.spawn(keep_sending(sender, recipients.clone(), first, options.size, from, until));
    }
    tokio::time::sleep_until(from.into()).await;
    let meter = Meter::start(server.pid());
    tokio::time::sleep_until(until.into()).await;
    let cost = meter.read();
    let mut latencies = work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat();

    report.add("sends/s", latencies.len() as f64 / cost.seconds);
    report.add_cost(&cost, latencies.len());
    report.add_latencies("send to answer", &mut latencies);
    server.add_memory(&mut report, "after");
    Ok(report)
}

/// Answers how many microseconds each send took that ended between `from` and `until`.
async fn keep_sending(
    mut sender: Sender,
    recipients: Vec<Device>,
    first: usize,
    size: usize,
    from: Instant,
    until: Instant,
) -> Result<Vec<u32>> {
    let message = Bytes::from(random_bytes(size));
    let mut latencies = Vec::new();
    for recipient in recipients.iter().cycle().skip(first) {
        let began = Instant::now();
        if began >= until {
            break;
        }
        sender.send(&[recipient], message.clone()).await?;
        let ended = Instant::now();
        if ended >= from && ended < until {
            latencies.push((ended - began).as_micros() as u32);
        }
    }
    Ok(latencies)
}
