//! Clients that don't read what they are sent, and clients that say nothing: what they cost.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Binary, Device, Event, RawSocket, Socket, TestServer, eventually, opcode, within};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Queues `mebibytes` of mail, in messages of nearly 2 MiB.
async fn fill(sender: &Device, receiver: &Device, mebibytes: u64) {
    for number in 0..mebibytes / 2 {
        sender.send_to(receiver, vec![number as u8; 2 * MIB as usize - 200]).await;
    }
}

#[tokio::test]
async fn a_client_that_takes_no_byte_is_closed_at_the_write_deadline() {
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(1)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    fill(&alice, &bob, 16).await;
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    let app = server.server().app().clone();
    eventually("the session to begin", async || app.bus.device_count() == 1).await;
    eventually("the session to end", async || app.bus.device_count() == 0).await;
    // What the kernel had taken can still be read, and then the stream ends in the middle of a frame.
    let mut rest = Vec::new();
    let _ = within("the end of the stream", socket.stream.read_to_end(&mut rest)).await;
    assert!(rest.len() < 8 * MIB as usize);
    assert_eq!(server.database().await.queued(&bob).await, 8, "nothing is lost");
}

/// Pings are signs of life, but they don't buy the right to be served by hand-feeding.
#[tokio::test]
async fn a_client_that_pings_all_the_time_and_never_reads_is_closed_as_well() {
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(1)).await;
    let (alice, bob) = (server.account().await, server.account().await);
    fill(&alice, &bob, 16).await;
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    let app = server.server().app().clone();
    let ended = async {
        eventually("the session to begin", async || app.bus.device_count() == 1).await;
        eventually("the session to end", async || app.bus.device_count() == 0).await;
    };
    let pinging = async {
        while socket.send(opcode::PING, &[7; 125]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = ended => {}
        () = pinging => {}
    }
}

#[tokio::test]
async fn answers_to_pings_are_not_collected_for_a_client_that_never_reads() {
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(3)).await;
    let bob = server.account().await;
    let mut socket = RawSocket::open(server.address(), &bob.ticket().await).await;
    let ping = [0x89, 0xfd, 0, 0, 0, 0].into_iter().chain([7; 125]).collect::<Vec<u8>>().repeat(1000);
    let mut sent = 0;
    // In the end it closes, or reads so slowly that no more goes out for a while.
    let pause = Duration::from_secs(5);
    while tokio::time::timeout(pause, socket.stream.write_all(&ping)).await.is_ok_and(|sent| sent.is_ok()) {
        sent += ping.len() as u64;
        // More than the buffers of both kernels hold: somebody must have stored the rest.
        assert!(sent < 24 * MIB, "the server goes on reading");
    }
}

#[tokio::test]
async fn the_last_of_many_pings_at_once_is_answered() {
    let server = TestServer::start().await;
    let bob = server.account().await;
    let mut socket = bob.connect().await;
    for number in 0..500 {
        socket.ping(number.to_string().as_bytes()).await;
    }
    loop {
        match socket.next().await {
            Event::Pong(payload) if payload == "499" => break,
            Event::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(socket.until_pong().await, []);
}

#[tokio::test]
async fn a_client_that_does_not_read_delays_no_other_client() {
    let server = TestServer::start().await;
    let (alice, bob, carol) = (server.account().await, server.account().await, server.account().await);
    fill(&alice, &bob, 16).await;
    let _stuck = [
        RawSocket::open(server.address(), &bob.ticket().await).await,
        RawSocket::open(server.address(), &bob.ticket().await).await,
    ];
    let (mut carols, mut bobs) = (carol.connect().await, bob.connect().await);
    bobs.messages(8).await;
    for number in 0..20 {
        alice.send(&[(&carol, number.to_string().as_bytes()), (&bob, b"too")]).await;
        carols.expect_message(number.to_string()).await;
        bobs.expect_message("too").await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_can_be_dismissed_and_its_device_removed() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let tablet = alice.link().await;
    fill(&alice, &tablet, 16).await;
    let _stuck = RawSocket::open(server.address(), &tablet.ticket().await).await;
    let app = server.server().app().clone();
    eventually("the session to begin", async || app.bus.device_count() == 1).await;
    alice.remove(&tablet).await;
    eventually("the session to end", async || app.bus.device_count() == 0).await;
}

/// Each of these sockets could have 16 MiB under way. What they hold is bounded by the frame that each is writing.
#[tokio::test(flavor = "multi_thread")]
async fn many_clients_that_do_not_read_hold_a_bounded_amount_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--ws-max-connections-per-device=1000", "--ws-max-batch-bytes=1048576"];
    let server = Binary::start(folder.path(), &options).await;
    let (alice, bob) = (Device::register(&server.client()).await, Device::register(&server.client()).await);
    for number in 0..64 {
        alice.send_to(&bob, vec![number; 256 * KIB as usize]).await;
    }
    let before = server.resident_bytes();
    let mut stuck = Vec::new();
    for _ in 0..60 {
        stuck.push(RawSocket::open(server.address(), &bob.ticket().await).await);
    }
    // A socket that reads gets through all of it, so the others have had their turn.
    let mut reader = bob.connect().await;
    assert_eq!(reader.messages(64).await.len(), 64);
    reader.until_pong().await;
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 60 * 3 * MIB, "{} MiB for 60 sockets that don't read", grown / MIB);
}

/// A coarse bound in a debug build; the benchmark has the real figure.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_socket_costs_little_memory() {
    const SOCKETS: u64 = 300;
    let folder = tempfile::tempdir().unwrap();
    let server = Binary::start(folder.path(), &["--ws-max-connections-per-device=1000"]).await;
    let bob = Device::register(&server.client()).await;
    let mut sockets = Vec::new();
    for _ in 0..20 {
        sockets.push(bob.connect().await); // what is made once is made now
    }
    let before = server.resident_bytes();
    for _ in 0..SOCKETS {
        sockets.push(bob.connect().await);
    }
    for socket in &mut sockets {
        socket.until_pong().await;
    }
    let each = server.resident_bytes().saturating_sub(before) / SOCKETS;
    assert!(each < 24 * KIB, "{each} bytes for each idle socket");
}

#[tokio::test]
async fn sockets_that_ended_leave_nothing_behind() {
    let server = TestServer::start().await;
    let bob = server.account().await;
    let app = server.server().app().clone();
    for _ in 0..5 {
        let sockets: [Socket; 3] = [bob.connect().await, bob.connect().await, bob.connect().await];
        for socket in sockets {
            drop(socket);
        }
    }
    eventually("all sessions to end", async || app.bus.device_count() == 0).await;
}

/// The size of the next frame, and its bytes read at this pace: a piece, then a pause.
async fn frame_read_slowly(socket: &mut RawSocket, piece: usize, pause: Duration) -> u64 {
    let header = within("a frame", socket.stream.read_u8()).await.unwrap();
    let length = match socket.stream.read_u8().await.unwrap() {
        126 => u64::from(socket.stream.read_u16().await.unwrap()),
        127 => socket.stream.read_u64().await.unwrap(),
        length => u64::from(length),
    };
    let mut left = length as usize;
    let mut buffer = vec![0; piece];
    while left > 0 {
        let part = left.min(piece);
        within("more of the frame", socket.stream.read_exact(&mut buffer[..part])).await.expect("an open connection");
        left -= part;
        tokio::time::sleep(pause).await; // the pace is the point
    }
    if header & 0xf == opcode::BINARY { length } else { 0 }
}

/// It never answers a ping meanwhile, since it has not come as far as to read it.
#[tokio::test]
async fn a_client_that_takes_its_frames_steadily_gets_all_of_them_however_slowly() {
    const MESSAGES: u64 = 12;
    let second = Duration::from_secs(1);
    let server = TestServer::start_with(|config| {
        config.gateway.write_timeout = second;
        (config.gateway.ping_interval, config.gateway.ping_timeout) = (second, second);
    })
    .await;
    let (alice, bob) = (server.account().await, server.account().await);
    for number in 0..MESSAGES {
        alice.send_to(&bob, vec![number as u8; 128 * KIB as usize]).await;
    }
    let mut socket = RawSocket::open_with_buffer(server.address(), &bob.ticket().await, 64 << 10).await;
    let mut received = 0;
    while received < MESSAGES * 128 * KIB {
        // 160 kB/s, in pieces between which more time passes than a client may take nothing for that has taken nothing.
        received += frame_read_slowly(&mut socket, 192 << 10, second * 6 / 5).await;
    }
}

#[tokio::test]
async fn the_first_frame_of_a_backlog_is_modest_and_a_quick_client_gets_larger_ones() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.account().await, server.account().await);
    for number in 0..60 {
        alice.send_to(&bob, vec![number; 100 * KIB as usize]).await;
    }
    let mut socket = RawSocket::open_with_buffer(server.address(), &bob.ticket().await, 4 << 20).await;
    let (mut sizes, mut received) = (Vec::new(), 0);
    while received < 60 * 100 * KIB {
        if let Some((opcode::BINARY, frame)) = socket.receive().await {
            sizes.push(frame.len() as u64);
            received += frame.len() as u64;
        }
    }
    assert!(sizes[0] <= 257 * KIB, "{sizes:?}");
    assert!(sizes.iter().any(|size| *size > 900 * KIB), "{sizes:?}");
}
