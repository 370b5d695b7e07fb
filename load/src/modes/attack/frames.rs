//! Frames on sockets that are open already.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::attacker::{Attacker, elsewhere};
use crate::http::Connection;
use crate::origin::Origin;
use crate::people::Device;
use crate::sender::random_bytes;
use crate::wire::{AckMessage, Payload, WebSocketFrame};

/// Sockets of the attacker.
const SOCKETS: usize = 8;
/// Frames that are written at a time.
const AT_ONCE: usize = 256;
/// Ids in one ack.
const IDS: usize = 50;
/// Bytes of a ping, the most that a control frame can have.
const PING: usize = 125;

const BINARY: u8 = 0x80 | 2;
const PING_CODE: u8 = 0x80 | 9;

pub async fn empty(attacker: Attacker) -> Result<()> {
    flood(attacker, || frame(BINARY, &[])).await
}

pub async fn pings(attacker: Attacker) -> Result<()> {
    flood(attacker, || frame(PING_CODE, &[7; PING])).await
}

pub async fn acks(attacker: Attacker) -> Result<()> {
    flood(attacker, || {
        let message_ids = (0..IDS).map(|_| Bytes::from(random_bytes(16))).collect();
        let ack = WebSocketFrame { payload: Some(Payload::Ack(AckMessage { message_ids })) };
        frame(BINARY, &ack.encode_to_vec())
    })
    .await
}

async fn flood(attacker: Attacker, frame: fn() -> Vec<u8>) -> Result<()> {
    let devices = attacker.sign_up(2).await?;
    let frames: Bytes = (0..AT_ONCE).flat_map(|_| frame()).collect();
    attacker.begin().await;
    attacker
        .many(SOCKETS, move |attacker, n| {
            let (device, frames) = (devices[n % devices.len()].clone(), frames.clone());
            async move {
                let mut stream = socket(&attacker, &elsewhere(41_000 + n), &device, None).await?;
                let (mut reading, mut writing) = stream.split();
                let asking = async {
                    loop {
                        writing.write_all(&frames).await?;
                        attacker.attempts(AT_ONCE as u64);
                    }
                };
                let hearing = async {
                    let mut buffer = vec![0; 64 << 10];
                    while reading.read(&mut buffer).await? > 0 {}
                    anyhow::bail!("closed")
                };
                tokio::select! {
                    asked = asking => asked,
                    heard = hearing => heard,
                }
            }
        })
        .await
}

/// A frame as a client sends it. A mask of zeros is one too.
fn frame(code: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![code];
    match u8::try_from(payload.len()) {
        Ok(length) if length < 126 => frame.push(0x80 | length),
        _ => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        }
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// A socket whose bytes are written and read by hand, or not at all.
pub async fn socket(
    attacker: &Attacker,
    origin: &Origin,
    device: &Device,
    receive_buffer: Option<u32>,
) -> Result<TcpStream> {
    let mut connection = Connection::open_from(attacker.api(), origin).await?;
    let answer = connection.post("/v1/gateway/ticket", &device.token).await?.json(201)?;
    let ticket = answer["ticket"].as_str().context("no ticket")?;
    let mut stream = origin.connect(attacker.api(), receive_buffer).await?;
    let request = format!(
        "GET /v1/gateway?ticket={ticket} HTTP/1.1\r\nhost: {}\r\n{}connection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        attacker.api(),
        origin.fields(),
    );
    stream.write_all(request.as_bytes()).await?;
    let status = super::bodies::first_status(&mut stream).await;
    attacker.answer(status);
    ensure!(status == Some(101), "no socket");
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_written_as_the_protocol_wants_them() {
        assert_eq!(frame(BINARY, &[]), [0x82, 0x80, 0, 0, 0, 0]);
        assert_eq!(frame(PING_CODE, &[1; 125])[..2], [0x89, 0x80 | 125]);
        assert_eq!(frame(BINARY, &[1; 900])[..4], [0x82, 0x80 | 126, 3, 0x84]);
    }
}
