//! As many sends as the server takes.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::task::JoinSet;

use crate::audience::Audience;
use crate::figures::Figures;
use crate::job::Job;
use crate::people::{Device, register};
use crate::sender::Sender;
use crate::server::Server;
use crate::watch::Watch;
use crate::wire::Label;

/// What is done before the counting starts.
const WARM_UP: Duration = Duration::from_secs(2);

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let mut figures = Figures::default();
    server.add_disk(&mut figures)?;
    job.phase("signing up", server);
    let senders = register(server.api, job.options.connections).await?;
    let recipients = register(server.api, job.options.recipients).await?;
    server.add_memory(&mut figures, "before");
    load(job, server, &mut figures, &senders, &Audience::singly(recipients)).await?;
    server.add_memory(&mut figures, "after");
    Ok(figures)
}

/// Each connection belongs to an account of its own, sends to the first of its turn, waits for the answer, and goes on.
pub async fn load(
    job: &Job,
    server: &Server,
    figures: &mut Figures,
    senders: &[Device],
    audience: &Audience,
) -> Result<()> {
    job.phase("warming up", server);
    let from = Instant::now() + WARM_UP.min(job.options.duration);
    let until = from + job.options.duration;
    let mut work = JoinSet::new();
    for ((n, device), api) in senders.iter().enumerate().zip(server.nodes().into_iter().cycle()) {
        let sender = Sender::open(api, device, job.options.size).await?;
        let first = n * audience.sets() / senders.len();
        let (audience, job) = (audience.clone(), job.clone());
        work.spawn(async move { keep_sending(sender, &audience, first, &job.watch, from, until).await });
    }
    tokio::time::sleep_until(from.into()).await;
    job.phase("sending", server);
    job.watch.begin();
    let meter = job.meter(server);
    tokio::time::sleep_until(until.into()).await;
    let cost = meter.read();
    let curve = job.watch.end();
    let counts = work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    let sends: u64 = counts.iter().map(|(sends, _)| sends).sum();
    figures.add("sends_per_s", sends as f64 / cost.seconds);
    if audience.size() > 1 {
        figures.add("messages_per_s", sends as f64 * audience.size() as f64 / cost.seconds);
    }
    cost.add_to(figures, "", sends);
    figures.add_latencies("", &curve);
    figures.add("refused", counts.iter().map(|(_, refused)| refused).sum::<u64>() as f64);
    figures.curve = Some(curve);
    Ok(())
}

/// Answers how many sends ended between `from` and `until`, and how often one was refused.
async fn keep_sending(
    mut sender: Sender,
    audience: &Audience,
    first: usize,
    watch: &Watch,
    from: Instant,
    until: Instant,
) -> Result<(u64, u64)> {
    let (mut count, mut device_messages) = (0, Vec::new());
    for turn in first.. {
        let began = Instant::now();
        if began >= until {
            break;
        }
        device_messages.clear();
        device_messages.extend(audience.set(turn).iter().map(|n| audience.device_message(*n, Label::default())));
        sender.send(&device_messages).await?;
        let ended = Instant::now();
        if ended >= from && ended < until {
            watch.record(ended - began);
            count += 1;
        }
    }
    Ok((count, sender.refused))
}
