//! Sends to devices that are online: is everything delivered once and in order, and how soon?

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::audience::Audience;
use crate::figures::Figures;
use crate::http::Connection;
use crate::job::Job;
use crate::pace;
use crate::people::{Device, register};
use crate::sender::Sender;
use crate::server::Server;
use crate::socket::{LARGE_BUFFER, Socket};
use crate::tally::Tally;
use crate::wire::Label;

/// What is done before latencies count.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long the last messages may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for repeats to come, and for the last acks to be written.
const AFTERMATH: Duration = Duration::from_secs(2);
/// An inbox from which nothing came for so long is empty.
const LULL: Duration = Duration::from_secs(1);
/// How long a socket is listened to for what should not come.
const SILENCE: Duration = Duration::from_millis(100);

/// What all tasks of a measurement share.
struct Plan {
    job: Job,
    /// Senders and receivers take turns with the nodes.
    nodes: Vec<SocketAddr>,
    senders: Vec<Device>,
    audience: Audience,
    began: Instant,
    from: Instant,
    until: Instant,
    received: AtomicU64,
    enough: CancellationToken,
}

/// What a receiver got.
struct Received {
    /// Which receiver it is.
    by: usize,
    /// From each sender.
    tallies: Vec<Tally>,
    frames: u64,
}

/// What one sender has sent to each receiver.
struct Sent {
    by: usize,
    to: Vec<u32>,
    sends: u64,
    refused: u64,
}

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let mut figures = Figures::default();
    server.add_disk(&mut figures)?;
    job.phase("signing up", server);
    let senders = register(server.api, job.options.connections).await?;
    let receivers = register(server.api, job.options.receivers).await?;
    server.add_memory(&mut figures, "before");
    load(job, server, &mut figures, &senders, &Audience::singly(receivers)).await?;
    server.add_memory(&mut figures, "after");
    Ok(figures)
}

/// Each sender belongs to an account of its own; each device of the audience is online and acknowledges every frame.
pub async fn load(
    job: &Job,
    server: &Server,
    figures: &mut Figures,
    senders: &[Device],
    audience: &Audience,
) -> Result<()> {
    job.phase("connecting", server);
    let sockets = open(&server.nodes(), &audience.devices).await?;
    let began = Instant::now();
    let from = began + WARM_UP;
    let plan = Arc::new(Plan {
        job: job.clone(),
        nodes: server.nodes(),
        senders: senders.to_vec(),
        audience: audience.clone(),
        began,
        from,
        until: from + job.options.duration,
        received: AtomicU64::new(0),
        enough: CancellationToken::new(),
    });
    let mut receiving = JoinSet::new();
    for (number, socket) in sockets.into_iter().enumerate() {
        receiving.spawn(receive(socket, number, plan.clone()));
    }
    job.phase("relaying", server);
    job.watch.begin();
    let meter = job.meter(server);
    let sent = send(&plan).await?;
    let sending = meter.read().seconds;
    let total: u64 = sent.iter().flat_map(|sent| &sent.to).map(|count| u64::from(*count)).sum();
    let patience = Instant::now() + PATIENCE;
    while plan.received.load(Ordering::Relaxed) < total && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let cost = meter.read();
    let curve = job.watch.end();
    job.phase("waiting for what should not come", server);
    tokio::time::sleep(AFTERMATH).await;
    plan.enough.cancel();
    let received = receiving.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    figures.add("sends_per_s", sent.iter().map(|sent| sent.sends).sum::<u64>() as f64 / sending);
    figures.add("messages_per_s", total as f64 / sending);
    cost.add_to(figures, "", total);
    figures.add_latencies("", &curve);
    account(figures, &sent, &received);
    figures.add("redelivered", redelivered(&plan).await? as f64);
    figures.curve = Some(curve);
    Ok(())
}

/// The first receiver is connected to the last node, so that it is another one than the first sender's.
async fn open(nodes: &[SocketAddr], receivers: &[Device]) -> Result<Vec<Socket>> {
    let mut sockets = Vec::with_capacity(receivers.len());
    for (receiver, api) in receivers.iter().zip(nodes.iter().rev().cycle()) {
        let mut connection = Connection::open(*api).await?;
        sockets.push(Socket::open(&mut connection, *api, receiver, LARGE_BUFFER).await?);
    }
    Ok(sockets)
}

async fn send(plan: &Arc<Plan>) -> Result<Vec<Sent>> {
    let mut sending = JoinSet::new();
    for number in 0..plan.senders.len() {
        let plan = plan.clone();
        sending.spawn(async move { send_as(&plan, number).await });
    }
    let mut sent = sending.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    sent.sort_by_key(|sent| sent.by);
    Ok(sent)
}

async fn send_as(plan: &Plan, by: usize) -> Result<Sent> {
    let api = plan.nodes[by % plan.nodes.len()];
    let mut sender = Sender::open(api, &plan.senders[by], plan.job.options.size).await?;
    let (mut to, mut sends) = (vec![0; plan.audience.devices.len()], 0);
    let (mut device_messages, number) = (Vec::new(), u32::try_from(by)?);
    for turn in 0.. {
        let mut intended = Instant::now();
        if let Some(rate) = plan.job.options.rate {
            intended = plan.began + Duration::from_secs_f64((turn * plan.senders.len() + by) as f64 / rate);
            pace::until(intended).await;
        }
        if intended >= plan.until {
            break;
        }
        let micros = (intended - plan.began).as_micros() as u64;
        device_messages.clear();
        for receiver in plan.audience.set(by + turn) {
            let label = Label { sender: number, number: to[*receiver], intended: micros, ..Label::default() };
            device_messages.push(plan.audience.device_message(*receiver, label));
            to[*receiver] += 1;
        }
        sender.send(&device_messages).await?;
        sends += 1;
    }
    Ok(Sent { by, to, sends, refused: sender.refused })
}

async fn receive(mut socket: Socket, by: usize, plan: Arc<Plan>) -> Result<Received> {
    let mut received = Received { by, tallies: vec![Tally::default(); plan.senders.len()], frames: 0 };
    let from = plan.from - plan.began;
    loop {
        let mail = tokio::select! {
            mail = socket.mail() => mail?,
            () = plan.enough.cancelled() => return Ok(received),
        };
        let arrived = plan.began.elapsed();
        received.frames += 1;
        for mail in &mail {
            let label = Label::of(&mail.message).context("a message that nobody sent")?;
            let tally = received.tallies.get_mut(label.sender as usize).context("a message that nobody sent")?;
            tally.take(label.number);
            let intended = Duration::from_micros(label.intended);
            match intended >= from {
                true => plan.job.watch.record(arrived.saturating_sub(intended)),
                false => plan.job.watch.count(1),
            }
        }
        plan.received.fetch_add(mail.len() as u64, Ordering::Relaxed);
        socket.ack(mail).await?;
    }
}

fn account(figures: &mut Figures, sent: &[Sent], received: &[Received]) {
    let (mut lost, mut repeated, mut reordered) = (0, 0, 0);
    for received in received {
        for (sent, tally) in sent.iter().zip(&received.tallies) {
            lost += tally.lost(sent.to[received.by]);
            repeated += tally.repeated;
            reordered += tally.reordered;
        }
    }
    let total: u64 = sent.iter().flat_map(|sent| &sent.to).map(|count| u64::from(*count)).sum();
    let frames: u64 = received.iter().map(|received| received.frames).sum();
    figures.add("messages_per_frame", total as f64 / frames.max(1) as f64);
    figures.add("sent", total as f64);
    figures.add("lost", lost as f64);
    figures.add("repeated", repeated as f64);
    figures.add("reordered", reordered as f64);
    figures.add("refused", sent.iter().map(|sent| sent.refused).sum::<u64>() as f64);
}

/// How many messages come again though they were acknowledged.
async fn redelivered(plan: &Plan) -> Result<usize> {
    let mut sockets = open(&plan.nodes, &plan.audience.devices).await?;
    unasked(&mut sockets).await
}

/// Takes and acknowledges all that waits for these devices.
pub async fn empty(api: SocketAddr, devices: &[Device]) -> Result<()> {
    let mut emptying = JoinSet::new();
    for mut socket in open(&[api], devices).await? {
        emptying.spawn(async move {
            while let Ok(mail) = tokio::time::timeout(LULL, socket.mail()).await {
                socket.ack(mail?).await?;
            }
            // Answers that all acks before it have been read.
            socket.close().await
        });
    }
    emptying.join_all().await.into_iter().collect::<Result<()>>()?;
    // Deletion may lag by half a second.
    tokio::time::sleep(AFTERMATH).await;
    Ok(())
}

/// How many messages come over these sockets in a moment in which none should.
pub async fn unasked(sockets: &mut [Socket]) -> Result<usize> {
    // What they were sent has had all the time of the others' opening to arrive.
    tokio::time::sleep(SILENCE).await;
    let mut count = 0;
    for socket in sockets {
        if let Ok(mail) = tokio::time::timeout(Duration::from_millis(5), socket.mail()).await {
            count += mail?.len();
        }
    }
    Ok(count)
}
