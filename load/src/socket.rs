//! A gateway socket.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::http::Connection;
use crate::people::Device;
use crate::wire::{AckMessage, Payload, WebSocketFrame};

/// For sockets that get much mail, and for such that get none.
pub const LARGE_BUFFER: usize = 64 << 10;
pub const SMALL_BUFFER: usize = 1024;
/// How long opening and closing may take, and the writing of an ack.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// Gets a ticket over `connection` and opens a socket with it, from the same origin. The socket reads `buffer` bytes at
    /// a time.
    pub async fn open(connection: &mut Connection, api: SocketAddr, device: &Device, buffer: usize) -> Result<Self> {
        let answer = connection.post("/v1/gateway/ticket", &device.token).await?.json(201)?;
        let ticket = answer["ticket"].as_str().context("no ticket")?;
        let mut request = format!("ws://{api}/v1/gateway?ticket={ticket}").into_client_request()?;
        let origin = connection.origin().clone();
        if let Some(address) = origin.forwarded() {
            request.headers_mut().insert("x-forwarded-for", address.parse()?);
        }
        let config = WebSocketConfig::default().read_buffer_size(buffer).write_buffer_size(0);
        let opening = timeout(PATIENCE, async {
            let tcp = origin.connect(api, None).await?;
            anyhow::Ok(tokio_tungstenite::client_async_with_config(request, tcp, Some(config)).await?)
        });
        let (stream, _) = opening.await.context("a socket did not open in time")??;
        Ok(Self { stream })
    }

    /// The next messages. Pings are answered on the way. Losing the race in a `select!` loses nothing.
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

    /// Says that these may be deleted.
    pub async fn ack(&mut self, mail: Vec<Mail>) -> Result<()> {
        let message_ids = mail.into_iter().map(|mail| mail.id).collect();
        let frame = WebSocketFrame { payload: Some(Payload::Ack(AckMessage { message_ids })) };
        let sending = self.stream.send(Message::Binary(frame.encode_to_vec().into()));
        timeout(PATIENCE, sending).await.context("an ack could not be written in time")??;
        Ok(())
    }

    /// Says goodbye and waits until the server has done so too. What still comes in between is not taken: it was not
    /// acknowledged, so it comes again.
    pub async fn close(mut self) -> Result<()> {
        let closing = async {
            self.stream.close(None).await?;
            while self.stream.next().await.is_some_and(|message| message.is_ok()) {}
            anyhow::Ok(())
        };
        timeout(PATIENCE, closing).await.context("a socket did not close in time")?
    }
}
