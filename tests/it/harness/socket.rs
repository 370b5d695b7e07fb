//! A gateway socket as a good client holds it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::proto::{AckMessage, DeviceList, Envelope, InboxNotice, Payload, PreKeyStatus, WebSocketFrame};
use super::{PATIENCE, record, within_time};
use crate::openapi::{Answer, assert_documented};

/// What a socket has to say.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// One frame with messages.
    Mail(Vec<Envelope>),
    /// One-time prekeys run out.
    PreKeys(PreKeyStatus),
    /// Mail expired or was refused.
    Notice(InboxNotice),
    /// The account has these devices.
    Devices(DeviceList),
    /// The server asks whether anybody is there. It has been answered.
    Ping,
    /// The answer to a ping of ours.
    Pong(Bytes),
    /// A close frame: code and reason, or nothing.
    Close(Option<(u16, String)>),
    /// The end of the stream after a close frame.
    End,
    /// The end of the stream without one.
    Broken(String),
}

/// An open gateway socket.
pub struct Socket {
    stream: WebSocketStream<TcpStream>,
}

impl Socket {
    /// Uses up a ticket. Answers the status when the server refuses.
    pub async fn open(address: SocketAddr, ticket: &str) -> Result<Self, u16> {
        Self::open_path(address, &format!("/v1/gateway?ticket={ticket}")).await
    }

    /// A handshake on any path.
    pub async fn open_path(address: SocketAddr, path: &str) -> Result<Self, u16> {
        match Self::handshake(address, path).await {
            Ok(socket) => Ok(socket),
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("the handshake failed: {error}"),
        }
    }

    /// Uses up a ticket, if somebody is there to take it.
    pub async fn try_open(address: SocketAddr, ticket: &str) -> Option<Self> {
        Self::handshake(address, &format!("/v1/gateway?ticket={ticket}")).await.ok()
    }

    async fn handshake(address: SocketAddr, path: &str) -> Result<Self, Error> {
        let request = format!("ws://{address}{path}").into_client_request()?;
        let config = WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(0);
        let handshake = async {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            tokio_tungstenite::client_async_with_config(request, tcp, Some(config)).await
        };
        let answer = within_time(PATIENCE, "the handshake", handshake).await;
        match &answer {
            Ok((_, response)) => {
                assert!(response.headers().contains_key("x-request-id"), "a 101 without x-request-id");
                assert_documented("GET", path, &Answer { status: 101, headers: response.headers(), body: None });
            }
            Err(Error::Http(response)) => {
                let status = response.status().as_u16();
                assert_documented("GET", path, &Answer { status, headers: response.headers(), body: None });
            }
            Err(_) => {}
        }
        answer.map(|(stream, _)| Self { stream })
    }

    /// What comes next.
    pub async fn next(&mut self) -> Event {
        self.next_within(PATIENCE).await
    }

    /// What comes within this time.
    pub async fn next_within(&mut self, patience: Duration) -> Event {
        within_time(patience, "something on the socket", self.read()).await
    }

    /// What comes next, however long that takes. Losing this future loses nothing.
    pub async fn read(&mut self) -> Event {
        match self.stream.next().await {
            None => Event::End,
            Some(Ok(Message::Binary(bytes))) => match WebSocketFrame::decode(bytes).expect("a frame").payload {
                Some(Payload::EnvelopeBatch(batch)) => {
                    batch.envelopes.iter().for_each(|envelope| record::message(&envelope.id));
                    Event::Mail(batch.envelopes)
                }
                Some(Payload::PreKeyStatus(status)) => Event::PreKeys(status),
                Some(Payload::InboxNotice(notice)) => Event::Notice(notice),
                Some(Payload::DeviceList(list)) => Event::Devices(list),
                other => panic!("the server sent {other:?}"),
            },
            Some(Ok(Message::Ping(_))) => Event::Ping,
            Some(Ok(Message::Pong(payload))) => Event::Pong(payload),
            Some(Ok(Message::Close(frame))) => {
                Event::Close(frame.map(|frame| (frame.code.into(), frame.reason.as_str().to_owned())))
            }
            Some(Ok(other)) => panic!("the server sent {other:?}"),
            Some(Err(Error::ConnectionClosed)) => Event::End,
            Some(Err(error)) => Event::Broken(error.to_string()),
        }
    }

    /// The next frame with messages. Pings are passed over; anything else fails the test.
    pub async fn mail(&mut self) -> Vec<Envelope> {
        loop {
            match self.next().await {
                Event::Mail(envelopes) => return envelopes,
                Event::Ping => {}
                other => panic!("expected mail, not {other:?}"),
            }
        }
    }

    /// Exactly this many messages, in however many frames.
    pub async fn messages(&mut self, count: usize) -> Vec<Envelope> {
        let mut envelopes = Vec::new();
        while envelopes.len() < count {
            envelopes.extend(self.mail().await);
        }
        assert_eq!(envelopes.len(), count, "more messages than expected");
        envelopes
    }

    /// The one message that comes next, and that it says this.
    pub async fn expect_message(&mut self, message: impl AsRef<[u8]>) -> Envelope {
        let envelope = self.messages(1).await.remove(0);
        assert_eq!(envelope.message, message.as_ref(), "another message than expected");
        envelope
    }

    /// The next notice about prekeys. Pings are passed over; anything else fails the test.
    pub async fn pre_keys(&mut self) -> PreKeyStatus {
        loop {
            match self.next().await {
                Event::PreKeys(status) => return status,
                Event::Ping => {}
                other => panic!("expected a notice about prekeys, not {other:?}"),
            }
        }
    }

    /// Everything that comes before the answer to a ping sent now.
    pub async fn until_pong(&mut self) -> Vec<Event> {
        self.ping(b"fence").await;
        let mut events = Vec::new();
        loop {
            match self.next().await {
                Event::Pong(payload) if payload == "fence" => return events,
                end @ (Event::End | Event::Broken(_)) => panic!("{end:?} instead of a pong"),
                event => events.push(event),
            }
        }
    }

    /// The rest, up to and with the end of the stream. Mail, pings and pongs are left out.
    pub async fn until_end(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            match self.next().await {
                Event::Mail(_) | Event::Ping | Event::Pong(_) => {}
                end @ (Event::End | Event::Broken(_)) => {
                    events.push(end);
                    return events;
                }
                event => events.push(event),
            }
        }
    }

    /// Acknowledges these ids.
    pub async fn ack_ids(&mut self, message_ids: Vec<Bytes>) {
        assert!(self.try_ack_ids(message_ids).await, "the socket is closed");
    }

    /// Acknowledges these ids, if the socket is still open.
    pub async fn try_ack_ids(&mut self, message_ids: Vec<Bytes>) -> bool {
        let frame = WebSocketFrame { payload: Some(Payload::Ack(AckMessage { message_ids })) };
        let sending = self.stream.send(Message::Binary(frame.encode_to_vec().into()));
        within_time(PATIENCE, "an ack to be sent", sending).await.is_ok()
    }

    /// Acknowledges these messages.
    pub async fn ack(&mut self, envelopes: &[Envelope]) {
        self.ack_ids(envelopes.iter().map(|envelope| envelope.id.clone()).collect()).await;
    }

    /// Sends a ping.
    pub async fn ping(&mut self, payload: &[u8]) {
        self.send(Message::Ping(Bytes::copy_from_slice(payload))).await;
    }

    /// Sends anything.
    pub async fn send(&mut self, message: Message) {
        within_time(PATIENCE, "a frame to be sent", self.stream.send(message)).await.expect("an open socket");
    }

    /// Says goodbye with this code and reason, and gives the rest of what the server had to say.
    pub async fn close_with(&mut self, code: u16, reason: &str) -> Vec<Event> {
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        let closing = self.stream.close(Some(frame));
        within_time(PATIENCE, "a close frame to be sent", closing).await.expect("an open socket");
        self.until_end().await
    }

    /// Says goodbye politely.
    pub async fn close(mut self) {
        self.close_with(1000, "").await;
    }
}

/// The ids of these messages, to look for repeats.
pub fn distinct_ids(envelopes: &[Envelope]) -> BTreeSet<Bytes> {
    envelopes.iter().map(|envelope| envelope.id.clone()).collect()
}
