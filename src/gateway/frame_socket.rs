//! A WebSocket that is read while it is being written, with one frame of ours under way at most.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, Sleep};
use tungstenite::error::{Error as WebSocketError, ProtocolError};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Message};

use crate::gateway::progress::ConnectionProgress;
use crate::gateway::socket::{Connection, Socket};

/// Pings that are read while earlier answers wait to be taken. A client that only writes is then read no further.
const UNANSWERED_PINGS: u32 = 16;
/// Bytes without a whole frame after which there is an [`Event::PartialFrame`].
const MAX_PARTIAL_BYTES: u32 = 16 << 10;
/// How long a client may take to take notice of our goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// If a timer fires later than this, the process, the virtual machine or the node was paused. What the client sent meanwhile
/// still waits in the kernel, so its time begins anew.
pub const SUSPENDED_AFTER: Duration = Duration::from_secs(1);

/// What happened on a socket.
#[derive(Debug)]
pub(super) enum Event {
    /// The client sent a frame with bytes.
    Binary(Bytes),
    /// The client sent something that only shows that it is alive.
    Alive,
    /// The client has sent this many bytes that have not made a frame yet.
    PartialFrame(u32),
    /// Memory is kept for a large message of the client from now on (true), or no longer.
    Large(bool),
    /// The frame under way has been handed to the kernel.
    Written,
    /// The connection has ended.
    Closed,
    /// The client has broken the protocol, for which the socket is closed with this code.
    ProtocolViolation(CloseCode),
}

/// The socket of one session.
pub(super) struct FrameSocket {
    socket: Socket,
    progress: Arc<ConnectionProgress>,
    writing: bool,
    /// Pings whose answers may still wait in the socket.
    unanswered: u32,
    taken_before: u64,
    /// How many of the read bytes were part of an event.
    accounted: u64,
    /// The last [`Event::Large`].
    is_large: bool,
    /// Since when a large message of the client is under way, …
    large_since: Option<Instant>,
    /// … and how long it may be, more or less: it is looked at with each event.
    longest_message: Duration,
    /// Set when writing has failed. Until it ends, what has arrived (acks, say) is still read.
    broken: Option<Pin<Box<Sleep>>>,
}

impl FrameSocket {
    /// The client may take `longest_message` to send a large message.
    pub(super) fn new(
        connection: Box<dyn Connection>,
        progress: Arc<ConnectionProgress>,
        longest_message: Duration,
    ) -> Self {
        let accounted = progress.read();
        Self {
            socket: Socket::new(connection),
            progress,
            writing: false,
            unanswered: 0,
            accounted,
            taken_before: 0,
            is_large: false,
            large_since: None,
            longest_message,
            broken: None,
        }
    }

    /// True while a frame of ours is under way. Another one may be started only when it is not.
    pub(super) fn is_writing(&self) -> bool {
        self.writing || self.broken.is_some()
    }

    /// How many bytes the client has taken since the last call.
    pub(super) fn taken(&mut self) -> u64 {
        let taken = self.progress.taken();
        taken - std::mem::replace(&mut self.taken_before, taken)
    }

    /// True when the connection was ended because its client took no bytes.
    pub(super) fn is_stalled(&self) -> bool {
        self.progress.is_stalled()
    }

    /// Starts to write a frame; [`FrameSocket::next`] goes on with it.
    pub(super) fn start(&mut self, message: Message) {
        debug_assert!(!self.is_writing(), "one frame at a time");
        match self.socket.start(message) {
            Ok(()) => self.writing = true,
            Err(_) => self.give_up_writing(),
        }
    }

    fn give_up_writing(&mut self) {
        self.writing = false;
        self.broken = Some(Box::pin(tokio::time::sleep(CLOSE_TIMEOUT)));
    }

    /// Waits for the next event while writing what is under way. Reads only if `reading`. Dropping the future loses
    /// nothing. Pongs and the answer to a client's close are sent on the way.
    pub(super) async fn next(&mut self, reading: bool) -> Event {
        poll_fn(|context| self.poll_next(context, reading)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>, reading: bool) -> Poll<Event> {
        if self.writing {
            match self.socket.poll_flush(context) {
                Poll::Ready(Ok(())) => {
                    (self.writing, self.unanswered) = (false, 0);
                    return Poll::Ready(Event::Written);
                }
                Poll::Ready(Err(_)) => self.give_up_writing(),
                Poll::Pending => {}
            }
        }
        if let Some(end) = &mut self.broken
            && end.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Event::Closed);
        }
        if !reading || self.unanswered >= UNANSWERED_PINGS {
            return self.large().map_or(Poll::Pending, Poll::Ready);
        }
        loop {
            let Poll::Ready(message) = self.socket.poll_next(context) else {
                if !self.is_writing() {
                    self.socket.tidy_up();
                }
                let event = self.overdue().or_else(|| self.large()).or_else(|| self.partial_frame());
                return event.map_or(Poll::Pending, Poll::Ready);
            };
            self.accounted = self.progress.read();
            return match message {
                Some(Ok(Message::Binary(bytes))) => {
                    self.large_since = None;
                    Poll::Ready(Event::Binary(bytes))
                }
                // After a close nothing but the end of the stream follows; reading on sends our answer to it.
                Some(Ok(Message::Close(_))) => continue,
                Some(Ok(Message::Ping(_))) => {
                    // The answer is in the socket's buffer now, and under way like a frame of ours.
                    (self.writing, self.unanswered) = (true, self.unanswered + 1);
                    Poll::Ready(Event::Alive)
                }
                Some(Ok(Message::Text(_) | Message::Pong(_) | Message::Frame(_))) => Poll::Ready(Event::Alive),
                Some(Err(error)) => Poll::Ready(match violation_code(error) {
                    Some(code) => {
                        // What follows is not read as frames any more. It must not keep the close code from the client.
                        self.progress.set_left_unread();
                        Event::ProtocolViolation(code)
                    }
                    None => Event::Closed,
                }),
                None => Poll::Ready(Event::Closed),
            };
        }
    }

    /// The end of a client whose large message is under way for too long. Everything that has come was read.
    fn overdue(&mut self) -> Option<Event> {
        let is_under_way = self.socket.is_large() && self.socket.is_in_message();
        self.large_since = is_under_way.then(|| self.large_since.unwrap_or_else(Instant::now));
        let is_overdue = self.large_since.is_some_and(|since| since.elapsed() > self.longest_message);
        is_overdue.then(|| {
            self.progress.set_left_unread();
            Event::ProtocolViolation(CloseCode::Policy)
        })
    }

    /// Whether memory is kept for a large message of the client, if that has changed.
    fn large(&mut self) -> Option<Event> {
        let is_large = self.socket.is_large();
        (std::mem::replace(&mut self.is_large, is_large) != is_large).then_some(Event::Large(is_large))
    }

    /// Bytes since the last event, if they are many.
    fn partial_frame(&mut self) -> Option<Event> {
        let read = self.progress.read();
        let bytes = u32::try_from(read - self.accounted).unwrap_or(u32::MAX);
        if bytes < MAX_PARTIAL_BYTES {
            return None;
        }
        self.accounted = read;
        Some(Event::PartialFrame(bytes))
    }

    /// Says goodbye and waits a moment for the client to take notice.
    pub(super) async fn close(mut self, frame: Option<CloseFrame>) {
        let goodbye = async {
            if self.socket.start(Message::Close(frame)).is_ok()
                && poll_fn(|context| self.socket.poll_flush(context)).await.is_ok()
            {
                while let Some(Ok(_)) = poll_fn(|context| self.socket.poll_next(context)).await {}
            }
        };
        // A client that doesn't read isn't waited for.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await;
    }
}

/// The close code for a fault of the client; `None` when the connection failed.
fn violation_code(error: WebSocketError) -> Option<CloseCode> {
    match error {
        WebSocketError::Capacity(_) => Some(CloseCode::Size),
        WebSocketError::Utf8(_) => Some(CloseCode::Invalid),
        WebSocketError::Protocol(
            ProtocolError::ResetWithoutClosingHandshake
            | ProtocolError::SendAfterClosing
            | ProtocolError::ReceivedAfterClosing,
        ) => None,
        WebSocketError::Protocol(_) => Some(CloseCode::Protocol),
        _ => None,
    }
}
