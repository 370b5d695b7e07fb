//! Sends, and the filling of inboxes with them.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use prost::Message as _;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::http::{Connection, bearer};
use crate::people::Device;
use crate::wire::{DeviceMessage, LABEL, Label, SendMessageRequest, SendMessageResponse, put_request, request_length};

/// The pause before a refused send is repeated, and how often it is.
const PAUSE: Duration = Duration::from_millis(200);
const ATTEMPTS: usize = 50;
/// Recipients of one send while inboxes are filled, what servers allow.
const MOST_RECIPIENTS: usize = 100;

/// A device with a connection to send over.
pub struct Sender {
    connection: Connection,
    /// The request under construction. What comes before the key is the same for all.
    request: Vec<u8>,
    before_key: usize,
    /// Behind the label of each message.
    filling: Vec<u8>,
    /// Answers other than 200, after each of which the same request was sent again.
    pub refused: u64,
}

impl Sender {
    /// Its messages will have `size` bytes, or those of a label if that is more.
    pub async fn open(api: SocketAddr, device: &Device, size: usize) -> Result<Self> {
        let connection = Connection::open(api).await?;
        let head = format!("POST /v1/messages HTTP/1.1\r\nhost: {api}\r\n{}idempotency-key: ", bearer(&device.token));
        let filling = random_bytes(size.saturating_sub(LABEL));
        Ok(Self { connection, before_key: head.len(), request: head.into_bytes(), filling, refused: 0 })
    }

    /// Sends these, and makes sure that all of it was queued. A send that the server has no room for at the moment is
    /// repeated under its key, so it counts once whatever became of the first attempt.
    pub async fn send(&mut self, device_messages: &[DeviceMessage<'_>]) -> Result<()> {
        self.request.truncate(self.before_key);
        let mut key = Uuid::encode_buffer();
        self.request.extend_from_slice(Uuid::from_bytes(rand::random()).hyphenated().encode_lower(&mut key).as_bytes());
        write!(self.request, "\r\ncontent-length: {}\r\n\r\n", request_length(device_messages, &self.filling))?;
        let body = self.request.len();
        put_request(&mut self.request, device_messages, &self.filling);
        debug_assert!(SendMessageRequest::decode(&self.request[body..]).is_ok());
        for _ in 0..ATTEMPTS {
            let answer = self.connection.call(&self.request, &[]).await?;
            match answer.status {
                200 if answer.body.is_empty() => return Ok(()),
                200 => {
                    let said = SendMessageResponse::decode(answer.body)?;
                    let (unknown, incomplete) = (said.invalid_device_ids.len(), said.device_mismatches.len());
                    bail!("of a send {unknown} devices are unknown, and {incomplete} accounts have others");
                }
                429 | 503 | 507 => {
                    self.refused += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                _ => answer.expect(200)?,
            }
        }
        bail!("a send was refused {ATTEMPTS} times; the limits of a server under load have to be raised")
    }
}

/// Fills the inboxes of these devices with `messages` of `size` bytes each.
pub async fn fill(api: SocketAddr, senders: &[Device], devices: &[Device], messages: usize, size: usize) -> Result<()> {
    let mut work = JoinSet::new();
    for (first, device) in senders.iter().enumerate() {
        let mut sender = Sender::open(api, device, size).await?;
        let (devices, step) = (devices.to_vec(), senders.len());
        work.spawn(async move {
            for _ in (first..messages).step_by(step) {
                for some in devices.chunks(MOST_RECIPIENTS) {
                    let device_message = |to| DeviceMessage::to(to, Label::default());
                    let device_messages: Vec<_> = some.iter().map(device_message).collect();
                    sender.send(&device_messages).await?;
                }
            }
            anyhow::Ok(())
        });
    }
    work.join_all().await.into_iter().collect()
}

/// Sealed messages look random.
pub fn random_bytes(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    rand::fill(&mut bytes[..]);
    bytes
}
