//! A day in the life: devices come and go, write to each other and to groups, and share attachments. At the end every
//! accepted message has been delivered once, be it to a device that had to come back for it.

mod person;
mod reader;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::figures::Figures;
use crate::http::Connection;
use crate::job::Job;
use crate::modes::relay::unasked;
use crate::people::{Device, register};
use crate::sender::random_bytes;
use crate::server::Server;
use crate::socket::{SMALL_BUFFER, Socket};
use person::Accepted;
use reader::Read;

/// Members of a group, its sender among them.
const GROUP: usize = 50;
/// Bytes of an attachment: a small picture.
const ATTACHMENT: usize = 64 << 10;
/// Connections that fetch attachments, and how many may wait for them.
const FETCHERS: usize = 4;
const FETCHES: usize = 1024;
/// How long the last messages may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Long enough for repeats to come, and for the last acks to be written.
const AFTERMATH: Duration = Duration::from_secs(2);

/// What all tasks share.
struct Plan {
    job: Job,
    api: SocketAddr,
    devices: Vec<Device>,
    attachment: Vec<u8>,
    began: Instant,
    until: Instant,
    /// Messages that came for the first time.
    delivered: AtomicU64,
    /// The senders are done: no reader sleeps any more.
    evening: CancellationToken,
    /// Everything has come, or never will.
    night: CancellationToken,
    fetches: mpsc::Sender<Fetch>,
}

/// An attachment that a reader was told about.
struct Fetch {
    reader: usize,
    id: [u8; 16],
}

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let mut figures = Figures::default();
    job.phase("signing up", server);
    let devices = register(server.api, job.options.devices).await?;
    server.add_memory(&mut figures, "before");
    let (fetches, incoming) = mpsc::channel(FETCHES);
    let began = Instant::now();
    let plan = Arc::new(Plan {
        job: job.clone(),
        api: server.api,
        devices,
        attachment: random_bytes(ATTACHMENT),
        began,
        until: began + job.options.duration,
        delivered: AtomicU64::new(0),
        evening: CancellationToken::new(),
        night: CancellationToken::new(),
        fetches,
    });
    let fetching = fetch(&plan, incoming).await?;
    job.phase("living", server);
    job.watch.begin();
    let meter = job.meter(server);
    let (accepted, read, late) = live(&plan).await?;
    let cost = meter.read();
    let curve = job.watch.end();
    let figure = account(&mut figures, &accepted, &read);
    figures.add("waited_to_the_end", late as f64);
    cost.add_to(&mut figures, "", figure);
    figures.add_latencies("to whoever is online", &curve);
    figures.add("redelivered", redelivered(&plan).await? as f64);
    drop(plan);
    let fetched: u64 = fetching.join_all().await.into_iter().sum::<Result<u64>>()?;
    figures.add("fetched", fetched as f64);
    server.add_memory(&mut figures, "after");
    figures.curve = Some(curve);
    Ok(figures)
}

/// Answers what was sent by whom, what was read by whom, and how much of it only when all had come back.
async fn live(plan: &Arc<Plan>) -> Result<(Vec<Accepted>, Vec<Read>, u64)> {
    let (mut reading, mut acting) = (JoinSet::new(), JoinSet::new());
    for number in 0..plan.devices.len() {
        let (reader, actor) = (plan.clone(), plan.clone());
        reading.spawn(async move { reader::read(&reader, number).await });
        acting.spawn(async move { person::act(&actor, number).await });
    }
    let mut accepted = acting.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    accepted.sort_by_key(|accepted| accepted.by);
    let total: u64 = accepted.iter().map(Accepted::messages).sum();
    let late = total.saturating_sub(plan.delivered.load(Ordering::Relaxed));
    plan.evening.cancel();
    let patience = Instant::now() + PATIENCE;
    while plan.delivered.load(Ordering::Relaxed) < total && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(AFTERMATH).await;
    plan.night.cancel();
    let read = reading.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    Ok((accepted, read, late))
}

/// Fetches what is asked for and compares it; ends when no reader can ask any more.
async fn fetch(plan: &Plan, incoming: mpsc::Receiver<Fetch>) -> Result<JoinSet<Result<u64>>> {
    let incoming = Arc::new(tokio::sync::Mutex::new(incoming));
    let mut work = JoinSet::new();
    for _ in 0..FETCHERS {
        let mut connection = Connection::open(plan.api).await?;
        let (incoming, expected) = (incoming.clone(), plan.attachment.clone());
        let tokens: Vec<String> = plan.devices.iter().map(|device| device.token.clone()).collect();
        work.spawn(async move {
            let mut count = 0;
            while let Some(Fetch { reader, id }) = incoming.lock().await.recv().await {
                let path = format!("/v1/attachments/{}", uuid::Uuid::from_bytes(id));
                connection.download(&path, &tokens[reader], &expected).await?;
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    Ok(work)
}

/// Answers how many messages were delivered.
fn account(figures: &mut Figures, accepted: &[Accepted], read: &[Read]) -> u64 {
    let (mut lost, mut repeated, mut reordered, mut wakes) = (0, 0, 0, 0);
    for read in read {
        for (sender, tally) in &read.tallies {
            let sent = accepted.get(*sender as usize).and_then(|accepted| accepted.to.get(&(read.by as u32)));
            lost += tally.lost(sent.copied().unwrap_or_default());
            repeated += tally.repeated;
            reordered += tally.reordered;
        }
        wakes += read.wakes;
        // Of those of whom nothing came at all.
        let unheard = accepted.iter().filter(|accepted| !read.tallies.contains_key(&(accepted.by as u32)));
        lost +=
            unheard.filter_map(|accepted| accepted.to.get(&(read.by as u32))).map(|sent| u64::from(*sent)).sum::<u64>();
    }
    let sent: u64 = accepted.iter().map(Accepted::messages).sum();
    let seconds = accepted.iter().map(|accepted| accepted.seconds).fold(0.0, f64::max);
    figures.add("sends_per_s", accepted.iter().map(|accepted| accepted.sends).sum::<u64>() as f64 / seconds);
    figures.add("messages_per_s", sent as f64 / seconds);
    figures.add("sent", sent as f64);
    figures.add("delivered", (sent - lost) as f64);
    figures.add("lost", lost as f64);
    figures.add("repeated", repeated as f64);
    figures.add("reordered", reordered as f64);
    figures.add("refused", accepted.iter().map(|accepted| accepted.refused).sum::<u64>() as f64);
    figures.add("group_sends", accepted.iter().map(|accepted| accepted.group_sends).sum::<u64>() as f64);
    figures.add("wakes", wakes as f64);
    sent - lost
}

/// How many messages come again though they were acknowledged.
async fn redelivered(plan: &Plan) -> Result<usize> {
    let (mut connection, mut sockets) = (Connection::open(plan.api).await?, Vec::new());
    for device in &plan.devices {
        let socket = Socket::open(&mut connection, plan.api, device, SMALL_BUFFER).await;
        sockets.push(socket.context("after the end of the day")?);
    }
    unasked(&mut sockets).await
}
