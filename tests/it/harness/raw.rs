//! Bytes on a TCP connection, for clients that misbehave.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::within;

/// Sends these bytes and reads until the server closes. The request should ask for that.
pub async fn raw_request(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request).await.expect("the request is sent");
    let mut answer = Vec::new();
    let read = within("the server to close", stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok() || !answer.is_empty(), "{read:?}");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Sends these bytes and reads one whole answer, whether or not the server closes after it.
pub async fn raw_answer(stream: &mut TcpStream, request: &[u8]) -> String {
    stream.write_all(request).await.expect("the request is sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(within("an answer", stream.read_u8()).await.expect("an answer"));
    }
    let head = String::from_utf8_lossy(&answer).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
    let mut body = vec![0; length.parse().expect("a length")];
    within("the body of an answer", stream.read_exact(&mut body)).await.expect("a body");
    String::from_utf8_lossy(&[answer, body].concat()).into_owned()
}

/// A gateway socket whose client does everything by hand, or nothing.
pub struct RawSocket {
    pub stream: TcpStream,
}

/// Frame opcodes.
pub mod opcode {
    pub const CONTINUATION: u8 = 0x0;
    pub const TEXT: u8 = 0x1;
    pub const BINARY: u8 = 0x2;
    pub const CLOSE: u8 = 0x8;
    pub const PING: u8 = 0x9;
    pub const PONG: u8 = 0xa;
}

impl RawSocket {
    /// Shakes hands, with a receive buffer as small as the system allows, so that what isn't read soon blocks the server.
    pub async fn open(address: SocketAddr, ticket: &str) -> Self {
        Self::open_with_buffer(address, ticket, 2048).await
    }

    /// Shakes hands, with a receive buffer of this size.
    pub async fn open_with_buffer(address: SocketAddr, ticket: &str, bytes: u32) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(bytes).expect("a buffer");
        let mut stream = socket.connect(address).await.expect("a connection");
        let request = format!(
            "GET /v1/gateway?ticket={ticket} HTTP/1.1\r\nhost: {address}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("the handshake is sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within("the handshake to be answered", stream.read_u8()).await.expect("an answer"));
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Self { stream }
    }

    /// Sends a whole masked frame.
    pub async fn send(&mut self, opcode: u8, payload: &[u8]) -> std::io::Result<()> {
        self.send_part(0x80 | opcode, payload).await
    }

    /// Sends a masked frame whose first byte is given.
    pub async fn send_part(&mut self, first: u8, payload: &[u8]) -> std::io::Result<()> {
        let mut frame = vec![first];
        match payload.len() {
            length @ 0..=125 => frame.push(0x80 | length as u8),
            length @ 126..=0xffff => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            length => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]); // a mask of zeros changes nothing
        frame.extend(payload);
        self.stream.write_all(&frame).await
    }

    /// The next frame: opcode and payload. `None` at the end of the stream.
    pub async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        within("a frame", self.read_frame()).await.ok()
    }

    async fn read_frame(&mut self) -> std::io::Result<(u8, Vec<u8>)> {
        let first = self.stream.read_u8().await?;
        assert_eq!(first & 0x70, 0, "reserved bits are set");
        let length = match self.stream.read_u8().await? {
            126 => u64::from(self.stream.read_u16().await?),
            127 => self.stream.read_u64().await?,
            length => u64::from(length),
        };
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        Ok((first & 0x0f, payload))
    }

    /// Reads and forgets everything until the server closes or breaks the connection.
    pub async fn drain(&mut self) {
        let mut buffer = vec![0; 65_536];
        within("the server to close", async {
            while !matches!(self.stream.read(&mut buffer).await, Ok(0) | Err(_)) {}
        })
        .await;
    }
}
