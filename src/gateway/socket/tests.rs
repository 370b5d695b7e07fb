use std::future::poll_fn;

use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::unconstrained;

use super::*;

const LARGE: usize = 300_000;

/// A socket, and its client's end, between which fit so many bytes.
fn pair(bytes: usize) -> (Socket, DuplexStream) {
    let (server, client) = duplex(bytes);
    (Socket::new(Box::new(server)), client)
}

fn large() -> Bytes {
    (0..LARGE).map(|number| number as u8).collect::<Vec<_>>().into()
}

/// A masked frame with a mask of zeros. Its first byte is given.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    let header = FrameHeader { mask: Some([0; 4]), ..FrameHeader::default() };
    header.format(payload.len() as u64, &mut head).unwrap();
    head[0] = first;
    [&head, payload].concat()
}

async fn flush(socket: &mut Socket) {
    poll_fn(|context| socket.poll_flush(context)).await.unwrap();
}

async fn next(socket: &mut Socket) -> Message {
    poll_fn(|context| socket.poll_next(context)).await.expect("an open socket").unwrap()
}

/// Reads one frame as a client: its first byte and its payload.
async fn receive(client: &mut DuplexStream) -> (u8, Vec<u8>) {
    let first = client.read_u8().await.unwrap();
    let length = match client.read_u8().await.unwrap() {
        126 => u64::from(client.read_u16().await.unwrap()),
        127 => client.read_u64().await.unwrap(),
        length => u64::from(length),
    };
    let mut payload = vec![0; length as usize];
    client.read_exact(&mut payload).await.unwrap();
    (first, payload)
}

#[tokio::test]
async fn frames_of_all_sizes_arrive_whole() {
    let (mut socket, mut client) = pair(1000);
    for size in [0, 125, 126, COPIED_BYTES, COPIED_BYTES + 1, 65_535, 65_536, LARGE] {
        let payload = large().slice(..size);
        socket.start(Message::Binary(payload.clone())).unwrap();
        let ((), received) = tokio::join!(flush(&mut socket), receive(&mut client));
        assert!(received == (0x82, payload.to_vec()), "{size}");
    }
}

#[tokio::test]
async fn nothing_is_written_into_a_large_frame() {
    let (mut socket, mut client) = pair(1000);
    socket.start(Message::Binary(large())).unwrap();
    assert!(flush(&mut socket).now_or_never().is_none());
    client.write_all(&masked(0x89, b"now")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Ping("now".into()));
    // The library tries to answer here.
    assert!(next(&mut socket).now_or_never().is_none());
    // A close frame waits as well.
    socket.start(Message::Close(None)).unwrap();
    let received = async { [receive(&mut client).await, receive(&mut client).await, receive(&mut client).await] };
    let ((), [frame, pong, close]) = tokio::join!(flush(&mut socket), received);
    assert!(frame == (0x82, large().to_vec()));
    assert_eq!([pong, close], [(0x8a, b"now".to_vec()), (0x88, Vec::new())]);
}

#[tokio::test]
async fn after_a_large_frame_nothing_of_it_is_kept() {
    let (mut socket, mut client) = pair(1 << 20);
    let payload = large();
    socket.start(Message::Binary(payload.clone())).unwrap();
    assert!(!payload.is_unique(), "it is written from where it lies");
    tokio::join!(flush(&mut socket), receive(&mut client));
    assert!(payload.is_unique() && socket.large.is_none());
}

#[tokio::test]
async fn a_large_frame_is_not_begun_once_the_client_has_said_goodbye() {
    let (mut socket, mut client) = pair(1 << 20);
    client.write_all(&masked(0x88, b"")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Close(None));
    assert!(socket.start(Message::Binary(large())).is_err());
    assert!(poll_fn(|context| socket.poll_next(context)).await.is_none());
    assert_eq!(receive(&mut client).await, (0x88, Vec::new()));
}

/// What a client sends is the same whether or not the library is replaced in between, and in whatever pieces it comes.
#[tokio::test]
async fn giving_the_read_buffer_back_loses_nothing() {
    for piece in [7, 1000, 30_011, 200_000] {
        let sizes = [3, MAX_INBOUND_BYTES, 0, 40_000, 1];
        let messages: Vec<Bytes> = sizes.iter().map(|size| large().slice(..*size)).collect();
        let mut bytes = Vec::new();
        for message in &messages {
            let (one, two) = message.split_at(message.len() / 2);
            bytes.extend([masked(0x02, one), masked(0x89, b"between"), masked(0x80, two)].concat());
            bytes.extend(masked(0x82, message));
        }
        let (mut socket, mut client) = pair(1 << 20);
        let (mut received, mut replaced) = (Vec::new(), 0);
        for part in bytes.chunks(piece) {
            client.write_all(part).await.unwrap();
            // With tokio's budget a read could end before everything was read.
            while let Some(message) = unconstrained(next(&mut socket)).now_or_never() {
                flush(&mut socket).await;
                received.push(message);
            }
            let was_large = socket.framing.largest() > MODEST_INBOUND_BYTES;
            socket.tidy_up();
            replaced += usize::from(was_large && socket.framing.largest() == 0);
        }
        let expected = messages.iter().flat_map(|message| {
            [Message::Ping("between".into()), Message::Binary(message.clone()), Message::Binary(message.clone())]
        });
        assert!(received == expected.collect::<Vec<_>>(), "{piece} bytes at a time");
        assert!(replaced > 0, "{piece} bytes at a time");
    }
}
