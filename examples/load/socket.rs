//! A gateway socket.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use obscura_server::wire::{AckMessage, Payload, WebSocketFrame};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::http::Connection;
use crate::people::Device;

/// An open socket of one device.
pub struct Socket {
    stream: WebSocketStream<TcpStream>,
}

/// A message that arrived.
pub struct Mail {
    pub id: Bytes,
    pub message: Bytes,
}

impl Socket {
    /// Gets a ticket over `connection` and opens a socket with it. The socket reads `buffer` bytes at a time.
    pub async fn open(connection: &mut Connection, api: SocketAddr, device: &Device, buffer: usize) -> Result<Self> {
        let answer = connection.post("/v1/gateway/ticket", &device.token).await?.json(201)?;
        let ticket = answer["ticket"].as_str().context("no ticket")?;
        let request = format!("ws://{api}/v1/gateway?ticket={ticket}").into_client_request()?;
        let config = WebSocketConfig::default().read_buffer_size(buffer).write_buffer_size(0);
        let tcp = TcpStream::connect(api).await?;
        tcp.set_nodelay(true)?;
        let (stream, _) = tokio_tungstenite::client_async_with_config(request, tcp, Some(config)).await?;
        Ok(Self { stream })
    }

    /// The next messages. Pings are answered on the way.
    pub async fn mail(&mut self) -> Result<Vec<Mail>> {
        while let Some(message) = self.stream.next().await {
            let Message::Binary(bytes) = message? else { continue };
            if let Some(Payload::EnvelopeBatch(batch)) = WebSocketFrame::decode(bytes)?.payload {
                let envelopes = batch.envelopes.into_iter();
                return Ok(envelopes.map(|envelope| Mail { id: envelope.id, message: envelope.message }).collect());
            }
        }
        bail!("the server closed a socket")
    }

    pub async fn ack(&mut self, mail: &[Mail]) -> Result<()> {
        let message_ids = mail.iter().map(|mail| mail.id.clone()).collect();
        let frame = WebSocketFrame { payload: Some(Payload::Ack(AckMessage { message_ids })) };
        self.stream.send(Message::Binary(frame.encode_to_vec().into())).await?;
        Ok(())
    }
}
