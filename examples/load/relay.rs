//! Sends to devices that are online: is everything delivered once and in order, and how soon?

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::{BufMut, BytesMut};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::http::Connection;
use crate::options::Options;
use crate::people::{Device, Sender, random_bytes, register};
use crate::report::{Meter, Report};
use crate::server::Server;
use crate::socket::Socket;

/// What is done before latencies count.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long the last messages may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Long enough for repeats to come, and for the last acks to be written.
const AFTERMATH: Duration = Duration::from_secs(2);
const READ_BUFFER: usize = 64 << 10;

/// What all tasks of a measurement share.
struct Plan {
    api: SocketAddr,
    senders: Vec<Device>,
    receivers: Vec<Device>,
    size: usize,
    rate: Option<f64>,
    began: Instant,
    from: Instant,
    until: Instant,
    received: AtomicUsize,
    enough: CancellationToken,
}

/// What a receiver got.
#[derive(Default)]
struct Received {
    /// Which receiver it is.
    by: usize,
    /// For each sender, how often each of its messages came.
    times: Vec<Vec<u8>>,
    reordered: usize,
    frames: usize,
    /// Microseconds from the intended moment of the send to the arrival.
    latencies: Vec<u32>,
}

pub async fn measure(options: &Options) -> Result<Report> {
    let server = Server::start(options).await?;
    let mut report = Report::default();
    server.add_disk(&mut report)?;
    let (senders, receivers) =
        (register(server.api, options.connections).await?, register(server.api, options.receivers).await?);
    server.add_memory(&mut report, "before");

    let sockets = open(server.api, &receivers).await?;
    let began = Instant::now();
    let from = began + WARM_UP;
    let plan = Arc::new(Plan {
        api: server.api,
        senders,
        receivers,
        size: options.size,
        rate: options.rate,
        began,
        from,
        until: from + options.duration,
        received: AtomicUsize::new(0),
        enough: CancellationToken::new(),
    });
    let mut receiving = JoinSet::new();
    for (number, socket) in sockets.into_iter().enumerate() {
        receiving.spawn(receive(socket, number, plan.clone()));
    }
    let meter = Meter::start(server.pid());
    let sent = send(&plan).await?;
    let total: usize = sent.iter().flatten().sum();
    let sending = meter.read().seconds;
    let patience = Instant::now() + PATIENCE;
    while plan.received.load(Ordering::Relaxed) < total && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let cost = meter.read();
    tokio::time::sleep(AFTERMATH).await;
    plan.enough.cancel();
    let received = receiving.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    report.add("sends/s", total as f64 / sending);
    report.add_cost(&cost, total);
    account(&mut report, &sent, received);
    report.add("redelivered after a reconnect", redelivered(&plan).await? as f64);
    server.add_memory(&mut report, "after");
    Ok(report)
}

async fn open(api: SocketAddr, receivers: &[Device]) -> Result<Vec<Socket>> {
    let mut connection = Connection::open(api).await?;
    let mut sockets = Vec::with_capacity(receivers.len());
    for receiver in receivers {
        sockets.push(Socket::open(&mut connection, api, receiver, READ_BUFFER).await?);
    }
    Ok(sockets)
}

/// Answers how many messages each sender sent to each receiver.
async fn send(plan: &Arc<Plan>) -> Result<Vec<Vec<usize>>> {
    let mut sending = JoinSet::new();
    for number in 0..plan.senders.len() {
        let plan = plan.clone();
        sending.spawn(async move { anyhow::Ok((number, send_as(&plan, number).await?)) });
    }
    let mut sent = sending.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    sent.sort_by_key(|(number, _)| *number);
    Ok(sent.into_iter().map(|(_, sent)| sent).collect())
}

/// The message says who sends it, which one it is between these two, and when it was to be sent.
async fn send_as(plan: &Plan, number: usize) -> Result<Vec<usize>> {
    let mut sender = Sender::open(plan.api, &plan.senders[number]).await?;
    let (mut sent, filling) = (vec![0; plan.receivers.len()], random_bytes(plan.size - 16));
    for turn in 0.. {
        let mut intended = Instant::now();
        if let Some(rate) = plan.rate {
            intended = plan.began + Duration::from_secs_f64((turn * plan.senders.len() + number) as f64 / rate);
            tokio::time::sleep_until(intended.into()).await;
        }
        if intended >= plan.until {
            break;
        }
        let receiver = (number + turn) % plan.receivers.len();
        let mut message = BytesMut::with_capacity(plan.size);
        message.put_u32(u32::try_from(number)?);
        message.put_u32(u32::try_from(sent[receiver])?);
        message.put_u64((intended - plan.began).as_micros() as u64);
        message.put_slice(&filling);
        sender.send(&[&plan.receivers[receiver]], message.freeze()).await?;
        sent[receiver] += 1;
    }
    Ok(sent)
}

async fn receive(mut socket: Socket, by: usize, plan: Arc<Plan>) -> Result<Received> {
    let mut received = Received { by, times: vec![Vec::new(); plan.senders.len()], ..Received::default() };
    loop {
        let mail = tokio::select! {
            mail = socket.mail() => mail?,
            () = plan.enough.cancelled() => return Ok(received),
        };
        let arrived = plan.began.elapsed();
        received.frames += 1;
        for mail in &mail {
            received.take(&mail.message, arrived, plan.from - plan.began).context("a message that nobody sent")?;
        }
        plan.received.fetch_add(mail.len(), Ordering::Relaxed);
        socket.ack(&mail).await?;
    }
}

impl Received {
    fn take(&mut self, message: &[u8], arrived: Duration, from: Duration) -> Option<()> {
        let sender = u32::from_be_bytes(*message.first_chunk()?);
        let number = u32::from_be_bytes(*message.get(4..)?.first_chunk()?) as usize;
        let intended = Duration::from_micros(u64::from_be_bytes(*message.get(8..)?.first_chunk()?));
        let times = self.times.get_mut(sender as usize)?;
        if number >= times.len() {
            times.resize(number + 1, 0);
        } else if times[number] == 0 {
            self.reordered += 1;
        }
        times[number] = times[number].saturating_add(1);
        if intended >= from {
            self.latencies.push(arrived.saturating_sub(intended).as_micros() as u32);
        }
        Some(())
    }
}

fn account(report: &mut Report, sent: &[Vec<usize>], received: Vec<Received>) {
    let (mut lost, mut repeated, mut reordered, mut frames, mut latencies) = (0, 0, 0, 0, Vec::new());
    for received in received {
        for (sender, times) in received.times.iter().enumerate() {
            let distinct = times.iter().filter(|times| **times > 0).count();
            lost += sent[sender][received.by].saturating_sub(distinct);
            repeated += times.iter().map(|times| usize::from(*times)).sum::<usize>() - distinct;
        }
        reordered += received.reordered;
        frames += received.frames;
        latencies.extend(received.latencies);
    }
    report.add_latencies("send to delivery", &mut latencies);
    let total: usize = sent.iter().flatten().sum();
    report.add("messages in a frame", total as f64 / frames as f64);
    report.add("sent", total as f64);
    report.add("lost", lost as f64);
    report.add("repeated", repeated as f64);
    report.add("reordered", reordered as f64);
}

/// How many messages come again though they were acknowledged.
async fn redelivered(plan: &Plan) -> Result<usize> {
    let mut count = 0;
    let mut sockets = open(plan.api, &plan.receivers).await?;
    for socket in &mut sockets {
        if let Ok(mail) = tokio::time::timeout(Duration::from_millis(100), socket.mail()).await {
            count += mail?.len();
        }
    }
    Ok(count)
}
