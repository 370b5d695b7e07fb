//! Load far above the limits: a hundred thousand addresses, and clients whose request heads never end. Memory stays
//! flat, and whoever behaves is served meanwhile.
//!
//! All three come at the same time. It takes as long as it takes to see all the addresses; with `OBSCURA_TEST_FLOOD_SECS` at
//! least that many seconds: `OBSCURA_TEST_FLOOD_SECS=600 cargo test --release --test it flood:: -- --nocapture` prints a line
//! for each minute. `docs/PERFORMANCE.md` has what it said.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::harness::{Binary, Device, Socket, deployment, send_request, within, within_time};

/// Addresses that each appear once in a round, far more than there are tokens for.
const ADDRESSES: u64 = 100_000;
/// Addresses that ask all the time: every fifth request is of one of them.
const BUSY: u64 = 10;
/// Connections of the trusted proxy that all of them come through.
const PROXY_CONNECTIONS: usize = 4;
/// Requests that are under way on each of those.
const PIPELINE: u64 = 50;
/// Those among them that are not of busy clients.
const ONCE: u64 = PIPELINE / 5 * 4;
/// Clients who send a byte of their head now and then.
const SLOW_CLIENTS: usize = 200;
/// Clients behind the same proxy who ask once in a second.
const HONEST_CLIENTS: u64 = 10;
/// The server's patience with the slow; and with idle connections, such as those of the honest, whose pauses are shorter.
const HEAD_SECS: u64 = 8;
/// What it may take beside what it took before the flood: two tables of addresses, and buffers of connections.
const ALLOWED_BYTES: u64 = 40 << 20;
const MIB: u64 = 1 << 20;

#[derive(Default)]
struct Seen {
    /// Requests of addresses that appear once in a round.
    asked: AtomicU64,
    let_through: AtomicU64,
    refused: AtomicU64,
    /// Slow clients whose connection was closed.
    cut: AtomicU64,
    /// Requests of honest clients, and how many of them were answered with 200.
    honest: AtomicU64,
    served: AtomicU64,
}

impl Seen {
    fn read(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// The requests of many clients, as their proxy passes them on.
async fn proxy(address: SocketAddr, seen: Arc<Seen>) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut answers = Vec::new();
    loop {
        let first = seen.asked.fetch_add(ONCE, Ordering::Relaxed);
        let mut requests = String::new();
        for number in 0..PIPELINE {
            let one = (first + number) % ADDRESSES;
            let client = match number {
                ..ONCE => format!("2001:db8:{:x}:{:x}::1", one >> 16, one & 0xffff),
                _ => format!("198.51.100.{}", number % BUSY),
            };
            requests += &format!("GET /v1/devices HTTP/1.1\r\nhost: x\r\nx-forwarded-for: {client}\r\n\r\n");
        }
        stream.write_all(requests.as_bytes()).await.unwrap();
        answers.clear();
        let mut whole = 0;
        while whole < PIPELINE {
            let known = answers.len();
            let read = within("answers to the flood", stream.read_buf(&mut answers)).await.unwrap();
            assert!(read > 0, "the proxy's connection was closed");
            // Bodies end so, and heads have none.
            whole += answers[known..].iter().filter(|&&byte| byte == b'}').count() as u64;
        }
        let text = String::from_utf8_lossy(&answers);
        seen.let_through.fetch_add(text.matches("HTTP/1.1 401 ").count() as u64, Ordering::Relaxed);
        seen.refused.fetch_add(text.matches("HTTP/1.1 429 ").count() as u64, Ordering::Relaxed);
    }
}

/// Somebody whose request head never ends, and who comes again when he is thrown out.
async fn dawdle(address: SocketAddr, seen: Arc<Seen>) {
    loop {
        let Ok(mut stream) = TcpStream::connect(address).await else { continue };
        let _ = stream.write_all(b"GET /openapi.yaml HTTP/1.1\r\nx: ").await;
        let mut answer = [0; 64];
        loop {
            // The pause is what he does.
            match tokio::time::timeout(Duration::from_millis(250), stream.read(&mut answer)).await {
                Err(_) => {}
                Ok(Ok(1..)) => continue,
                Ok(_) => break,
            }
            if stream.write_all(b"x").await.is_err() {
                break;
            }
        }
        seen.cut.fetch_add(1, Ordering::Relaxed);
    }
}

/// Somebody who keeps to the limits, from an address of his own.
async fn behave(device: Device, number: u64, seen: Arc<Seen>) {
    let address = format!("203.0.113.{number}");
    loop {
        seen.honest.fetch_add(1, Ordering::Relaxed);
        let answer = device.request("GET", "/v1/devices").header("x-forwarded-for", &address).send().await;
        if answer.status == 200 {
            seen.served.fetch_add(1, Ordering::Relaxed);
        }
        // His pace.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// One message, sent, delivered and acknowledged.
async fn pass_a_message(server: &Binary, from: &Device, to: &Device, socket: &mut Socket) {
    let sent = from.post_messages(Uuid::new_v4(), &send_request(&[(to, b"in the middle of it")])).await;
    assert_eq!(sent.status, 200, "{}", server.output());
    let envelopes = socket.messages(1).await;
    socket.ack(&envelopes).await;
}

fn seconds_asked_for() -> Duration {
    let text = std::env::var("OBSCURA_TEST_FLOOD_SECS").unwrap_or_default();
    Duration::from_secs(text.parse().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_from_a_hundred_thousand_addresses_takes_little_memory_and_stops_no_other_client() {
    let folder = tempfile::tempdir().unwrap();
    let head = format!("--server-header-timeout-secs={HEAD_SECS}");
    let server = Binary::start_limited_on(deployment::embedded_options(folder.path()), &[&head]).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    let mut socket = bob.connect().await;
    let at_rest = server.resident_bytes();

    let (begun, limit, seen) = (Instant::now(), seconds_asked_for(), Arc::<Seen>::default());
    let mut flood = JoinSet::new();
    for _ in 0..SLOW_CLIENTS {
        flood.spawn(dawdle(server.address(), seen.clone()));
    }
    for _ in 0..PROXY_CONNECTIONS {
        flood.spawn(proxy(server.address(), seen.clone()));
    }
    for number in 0..HONEST_CLIENTS {
        let device = if number % 2 == 0 { &alice } else { &bob };
        flood.spawn(behave(device.at(&server.client()), number, seen.clone()));
    }
    let (mut sent, mut slowest, mut most, mut told) = (0, Duration::ZERO, 0, Instant::now());
    let honest = async {
        while begun.elapsed() < limit || Seen::read(&seen.asked) < ADDRESSES || Seen::read(&seen.cut) == 0 {
            let sending = Instant::now();
            pass_a_message(&server, &alice, &bob, &mut socket).await;
            slowest = slowest.max(sending.elapsed());
            sent += 1;
            most = most.max(server.resident_bytes());
            if told.elapsed() > Duration::from_mins(1) {
                told = Instant::now();
                let (minutes, served) = (begun.elapsed().as_secs() / 60, Seen::read(&seen.served));
                println!("minute {minutes}: {} MiB, {served} honest requests served", server.resident_bytes() / MIB);
            }
            // The pace of somebody who keeps to the limits.
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    };
    within_time(limit + Duration::from_mins(3), "the flood to be over", honest).await;
    flood.abort_all();
    while let Some(ended) = flood.join_next().await {
        assert!(!ended.is_err_and(|error| error.is_panic()), "a client gave up");
    }

    let [asked, let_through, refused, cut] = [&seen.asked, &seen.let_through, &seen.refused, &seen.cut].map(Seen::read);
    let [honest, served] = [&seen.honest, &seen.served].map(Seen::read);
    println!(
        "{:?}: {asked} requests of {ADDRESSES} addresses, a quarter as many of {BUSY} busy ones; {let_through} let \
         through, {refused} refused; {cut} slow heads cut; {served} of {honest} honest requests served, {sent} honest \
         messages, the slowest {slowest:?}; {} MiB before, {} at the end, at most {} MiB",
        begun.elapsed(),
        at_rest / MIB,
        server.resident_bytes() / MIB,
        most / MIB,
    );
    // One of each may have been under way.
    assert!(served > 0 && honest - served <= HONEST_CLIENTS, "{served} of {honest} honest requests were served");
    // The default: 20 at once and 10 a second; and 20 more whenever there are more addresses than can be remembered.
    let allowed = BUSY * (20 * (1 + asked / ADDRESSES) + 10 * (begun.elapsed().as_secs() + 1));
    assert!(let_through <= asked + allowed, "the busy ones got {} of {allowed}", let_through.saturating_sub(asked));
    let under_way = PROXY_CONNECTIONS as u64 * ONCE;
    assert!(refused + allowed >= asked.saturating_sub(under_way) / 4, "{refused} refused, {allowed} were allowed");
    assert!(most < at_rest + ALLOWED_BYTES, "{} MiB before, {} MiB in the flood", at_rest / MIB, most / MIB);
    server.client().get("/openapi.yaml").send().await.expect(200);
}
