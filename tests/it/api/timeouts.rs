//! Nobody can make the server wait for ever. And what is no HTTP at all.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::{Device, TestServer, raw_answer, raw_request};
use crate::metrics::page::{came_and_went, connections};

fn stalled(path: &str, device: &Device) -> Vec<u8> {
    let key = Uuid::new_v4();
    let token = &device.token;
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {token}\r\nidempotency-key: {key}\r\n\
         content-type: application/json\r\ncontent-length: 100\r\n\r\n{{\"username\":"
    )
    .into_bytes()
}

#[tokio::test]
async fn an_upload_that_stalls_gets_408() {
    let server = TestServer::start_with(|config| {
        config.server.request_timeout = Duration::from_secs(1);
        config.attachments.timeout = Duration::from_secs(3);
    })
    .await;
    let alice = server.account().await;
    for (path, seconds) in [("/v1/users", 1), ("/v1/messages", 1), ("/v1/attachments", 3)] {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let answer = raw_answer(&mut stream, &stalled(path, &alice)).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{path}: {answer}");
        assert!(answer.to_lowercase().contains("x-request-id: "), "{path}: {answer}");
        let took = begun.elapsed();
        let limit = Duration::from_secs(seconds);
        assert!(took >= limit && took < limit + Duration::from_secs(5), "{path}: {took:?}");
    }
}

#[tokio::test]
async fn the_timeout_on_top_of_all_others_holds_for_attachments_too() {
    let server = TestServer::start_with(|config| config.server.global_timeout = Duration::from_secs(3)).await;
    let alice = server.account().await;
    for path in ["/v1/users", "/v1/attachments"] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let answer = raw_answer(&mut stream, &stalled(path, &alice)).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_connection_whose_request_head_does_not_come_is_closed() {
    let server = TestServer::start_with(|config| config.server.header_timeout = Duration::from_secs(1)).await;
    let (nothing, half) = tokio::join!(
        raw_request(server.address(), b""),
        raw_request(server.address(), b"GET /openapi.yaml HTTP/1.1\r\nhost: ")
    );
    assert!(!nothing.contains("200") && !half.contains("200"));
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_one_after_another() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = b"GET /v1/nowhere HTTP/1.1\r\nhost: x\r\n\r\n";
    for _ in 0..3 {
        let answer = raw_answer(&mut stream, request).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }
}

#[tokio::test]
async fn what_is_no_http_does_no_harm() {
    let server = TestServer::start().await;
    let requests: [&[u8]; 7] = [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: \0\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ];
    for request in requests {
        let answer = raw_request(server.address(), request).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let endless = [b"GET / HTTP/1.1\r\nhost: x\r\nx: ".to_vec(), vec![b'x'; 1_000_000]].concat();
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &endless).await;
    server.client().get("/openapi.yaml").send().await.expect(200);
}

/// Sends the head of an upload of so many pieces, and the pieces with this pause behind each, until it is answered.
async fn paced(server: &TestServer, device: &Device, pieces: usize, piece: usize, pause: Duration) -> String {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        device.token,
        pieces * piece
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..pieces {
        if stream.write_all(&vec![7; piece]).await.is_err() {
            break;
        }
        tokio::time::sleep(pause).await; // the pace is the point
    }
    raw_answer(&mut stream, b"").await
}

#[tokio::test]
async fn an_upload_may_take_longer_than_its_time_while_it_comes_in_steadily() {
    let server = TestServer::start_with(|config| config.attachments.timeout = Duration::from_secs(1)).await;
    let alice = server.account().await;
    let answer = paced(&server, &alice, 12, 8 << 10, Duration::from_millis(300)).await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
}

/// Its place among the uploads under way is not held for the whole time limit, which is two minutes.
#[tokio::test]
async fn an_upload_of_which_nothing_comes_ends_soon() {
    let server = TestServer::start().await;
    let alice = server.account().await;
    let begun = Instant::now();
    let mut stream = alice.begin_upload(100, 0).await;
    let answer = raw_answer(&mut stream, b"").await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_upload_that_trickles_in_ends() {
    let server = TestServer::start_with(|config| config.attachments.timeout = Duration::from_secs(1)).await;
    let alice = server.account().await;
    let begun = Instant::now();
    let answer = paced(&server, &alice, 200, 1, Duration::from_millis(100)).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

/// The head of a download, on a connection with this receive buffer.
async fn begin_download(device: &Device, id: &str, buffer: u32) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(buffer).unwrap();
    let mut stream = socket.connect(device.client.address()).await.unwrap();
    let token = &device.token;
    let head = format!(
        "GET /v1/attachments/{id} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_download_that_is_taken_byte_by_byte_ends() {
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(1)).await;
    let alice = server.account().await;
    let answer = alice.request("POST", "/v1/attachments").body(vec![5; 8 << 20]).send().await.expect(201).json();
    let before = connections(&server).await;
    let mut stream = begin_download(&alice, answer["id"].as_str().unwrap(), 2048).await;
    let taking = async {
        while stream.read_u8().await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await; // the pace is the point
        }
    };
    tokio::select! {
        () = came_and_went(&server, 1, before) => {}
        () = taking => {}
    }
    came_and_went(&server, 1, before).await;
}

/// With a receive buffer of 64 KiB, and pauses in which it takes nothing for longer than `--ws-write-timeout-secs`.
#[tokio::test]
async fn a_download_that_is_taken_steadily_is_not_cut() {
    const LENGTH: usize = 8 << 20;
    let server = TestServer::start_with(|config| config.gateway.write_timeout = Duration::from_secs(1)).await;
    let alice = server.account().await;
    let answer = alice.request("POST", "/v1/attachments").body(vec![5; LENGTH]).send().await.expect(201).json();
    let mut stream = begin_download(&alice, answer["id"].as_str().unwrap(), 64 << 10).await;
    let (mut received, mut piece) = (0, vec![0; 1 << 20]);
    while let Ok(length) = stream.read_exact(&mut piece).await {
        received += length;
        tokio::time::sleep(Duration::from_millis(1300)).await; // the pace is the point
    }
    assert_eq!(received, LENGTH);
}
