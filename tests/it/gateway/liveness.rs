//! Pings, and clients that are no longer there.

use std::time::{Duration, Instant};

use obscura_server::config::Config;

use crate::harness::{Binary, Device, Event, RawSocket, TestServer, opcode, within_time};

const SECOND: Duration = Duration::from_secs(1);

fn impatient(config: &mut Config) {
    config.gateway.ping_interval = SECOND;
    config.gateway.ping_timeout = SECOND;
}

#[tokio::test]
async fn a_silent_client_is_pinged_and_then_closed_with_an_empty_frame() {
    let server = TestServer::start_with(impatient).await;
    let alice = server.account().await;
    let mut socket = RawSocket::open(server.address(), &alice.ticket().await).await;
    let begun = Instant::now();
    assert_eq!(socket.receive().await, Some((opcode::PING, Vec::new())));
    assert!(begun.elapsed() > SECOND / 2, "the first ping comes after an interval");
    let closed = async {
        loop {
            match socket.receive().await {
                Some((opcode::PING, payload)) => assert!(payload.is_empty()),
                other => break other,
            }
        }
    };
    let closed = within_time(SECOND * 10, "the server to close", closed).await;
    assert_eq!(closed, Some((opcode::CLOSE, Vec::new())));
    assert_eq!(socket.receive().await, None);
    let took = begun.elapsed();
    assert!(took > SECOND * 2 - SECOND / 4, "closed too early, after {took:?}");
    assert!(took < SECOND * 4 + SECOND, "closed too late, after {took:?}"); // a second for a busy machine
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_as_soon() {
    let server = TestServer::start_with(impatient).await;
    let (alice, bob) = (server.account().await, server.account().await);
    fill(&alice, &bob, 8).await;
    let socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    let begun = Instant::now();
    let client = socket.stream.local_addr().unwrap().port();
    within_time(SECOND * 5, "the server to give up", server_gives_up(server.address().port(), client)).await;
    assert!(begun.elapsed() > SECOND, "given up too early");
}

/// Queues this many messages of nearly 2 MiB.
async fn fill(sender: &Device, receiver: &Device, count: usize) {
    for number in 0..count {
        sender.send_to(receiver, vec![number as u8; 2 * 1024 * 1024 - 200]).await;
    }
}

/// Waits until the kernel no longer counts the server's end of a connection among the established ones.
async fn server_gives_up(server: u16, client: u16) {
    let (local, remote) = (format!(":{server:04X}"), format!(":{client:04X}"));
    let is_established = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        table.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields[1].ends_with(&local) && fields[2].ends_with(&remote) && fields[3] == "01"
        })
    };
    while is_established() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn clients_that_say_anything_at_all_stay_connected() {
    let server = TestServer::start_with(impatient).await;
    let alice = server.account().await;
    let mut answering = alice.connect().await;
    let mut pinging = RawSocket::open(server.address(), &alice.ticket().await).await;
    let mut talking = RawSocket::open(server.address(), &alice.ticket().await).await;
    let mut pings = 0;
    while pings < 4 {
        assert_eq!(answering.next().await, Event::Ping);
        pings += 1;
        pinging.send(opcode::PING, b"me too").await.unwrap();
        talking.send(opcode::TEXT, b"ignored, but heard").await.unwrap();
    }
    answering.until_pong().await;
    for socket in [&mut pinging, &mut talking] {
        socket.send(opcode::PING, b"still here").await.unwrap();
        loop {
            match socket.receive().await {
                Some((opcode::PONG, payload)) if payload == b"still here" => break,
                Some((opcode::PING | opcode::PONG, _)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Slow, but reading: the server sees its bytes being taken, and that is a sign of life.
#[tokio::test]
async fn a_client_that_takes_a_large_frame_slowly_is_not_closed() {
    const MESSAGES: usize = 12;
    let server = TestServer::start_with(|config| {
        impatient(config);
        config.gateway.max_batch_bytes = 64 * 1024 * 1024; // all of it is one frame
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    fill(&alice, &bob, MESSAGES).await;
    let mut socket = RawSocket::open_with_buffer(server.address(), &bob.ticket().await, 256 * 1024).await;
    let (begun, mut received) = (Instant::now(), 0);
    let mut buffer = vec![0; 128 * 1024];
    while received + buffer.len() < MESSAGES * (2 * 1024 * 1024 - 200) {
        let read = tokio::io::AsyncReadExt::read_exact(&mut socket.stream, &mut buffer);
        match within_time(SECOND * 5, "more of the frame", read).await {
            Ok(length) => received += length,
            Err(error) => panic!("closed after {received} bytes and {:?}: {error}", begun.elapsed()),
        }
        // The pace is the point here: the whole takes longer than a silent client is given.
        tokio::time::sleep(SECOND / 45).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_are_answered_in_time_behind_a_backlog_of_fifty_megabytes() {
    let server = TestServer::start_with(|config| config.messaging.sender_share_percent = 100).await;
    let (alice, bob) = (server.account().await, server.account().await);
    fill(&alice, &bob, 26).await;
    let mut socket = bob.connect().await;
    let mut received = 0;
    for number in 0..8 {
        let payload = format!("ping {number}");
        socket.ping(payload.as_bytes()).await;
        let answered = async {
            loop {
                match socket.read().await {
                    Event::Pong(answer) if answer == payload => return,
                    Event::Mail(envelopes) => received += envelopes.len(),
                    other => panic!("{other:?}"),
                }
            }
        };
        within_time(SECOND * 5, "the pong", answered).await;
    }
    while received < 26 {
        received += socket.mail().await.len();
    }
}

/// As when a container is frozen or a virtual machine is moved: nothing was asked meanwhile, so silence said nothing.
#[tokio::test(flavor = "multi_thread")]
async fn sockets_outlive_a_pause_of_the_server_that_is_longer_than_their_patience() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--ws-ping-interval-secs=1", "--ws-ping-timeout-secs=1"];
    let server = Binary::start(folder.path(), &options).await;
    let bob = Device::register(&server.client()).await;
    let mut talking = bob.connect().await;
    let mut quiet = RawSocket::open(server.address(), &bob.ticket().await).await;
    talking.until_pong().await;
    assert_eq!(quiet.receive().await, Some((opcode::PING, Vec::new())));
    quiet.send(opcode::PONG, b"").await.unwrap();
    server.signal("STOP");
    // The length is the point here: four times as long as a client may be silent for beside its ping.
    tokio::time::sleep(SECOND * 8).await;
    talking.ping(b"while it was away").await;
    server.signal("CONT");
    // The quiet one is asked again, and has its time to answer.
    for _ in 0..2 {
        while quiet.receive().await != Some((opcode::PING, Vec::new())) {}
        quiet.send(opcode::PONG, b"").await.unwrap();
    }
    assert_eq!(talking.until_pong().await.into_iter().filter(|event| *event == Event::End).count(), 0);
}
