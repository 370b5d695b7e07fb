//! A WebSocket on an upgraded connection, which needs no more memory after a large frame than before it.
//!
//! The library copies each frame into a buffer that never shrinks. So it gets only frames of up to [`COPIED_BYTES`]; larger
//! ones are written from where they lie, in one piece, while the library writes nothing. It also keeps the space of the
//! largest frame that the client has sent. After a large one it is replaced by a new instance as soon as it has nothing in it.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::buf::Chain;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_write_buf;
use tungstenite::error::Error;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Data, OpCode};
use tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::gateway::framing::Framing;

/// The largest frame, and the largest message of several frames, that a client may send.
pub(super) const MAX_INBOUND_BYTES: usize = 256 << 10;
/// Idle sockets keep their read buffer, so it is small. Frames of clients are small too.
const READ_BUFFER_BYTES: usize = 1024;
/// The largest payload that goes through the library's buffer.
const COPIED_BYTES: usize = 16 << 10;
/// A message of the client with more bytes than this is large.
const MODEST_INBOUND_BYTES: u64 = 16 << 10;

/// The bytes of a connection after its handshake.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// The server's end of a WebSocket.
pub(super) struct Socket {
    connection: Box<dyn Connection>,
    protocol: WebSocketContext,
    framing: Framing,
    /// What is left of a large frame: its head and its payload. Until it is written the library writes nothing.
    large: Option<Chain<Bytes, Bytes>>,
    has_ended: bool,
}

impl Socket {
    pub(super) fn new(connection: Box<dyn Connection>) -> Self {
        let (protocol, framing) = (new_protocol(), Framing::default());
        Self { connection, protocol, framing, large: None, has_ended: false }
    }

    /// Starts to write a message; [`Socket::poll_flush`] goes on with it. The message before it has to be written, unless
    /// this is a close frame.
    pub(super) fn start(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Binary(payload) if payload.len() > COPIED_BYTES => {
                if !self.protocol.can_write() {
                    return Err(Error::AlreadyClosed);
                }
                debug_assert!(self.large.is_none(), "one message at a time");
                self.large = Some(head_of(&payload).chain(payload));
                Ok(())
            }
            message => {
                // If the connection takes nothing now, `poll_flush` waits for it.
                let mut context = Context::from_waker(Waker::noop());
                let (protocol, mut bytes) = self.split(&mut context);
                match ready_or_pending(protocol.write(&mut bytes, message)) {
                    Poll::Ready(written) => written,
                    Poll::Pending => Ok(()),
                }
            }
        }
    }

    /// Writes what was started, and the library's answers to pings and to a close frame.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while let Some(rest) = &mut self.large {
            let written = ready!(poll_write_buf(Pin::new(&mut self.connection), context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(Error::Io(io::ErrorKind::ConnectionReset.into())));
            }
            if !rest.has_remaining() {
                self.large = None;
            }
        }
        let (protocol, mut bytes) = self.split(context);
        match protocol.flush(&mut bytes) {
            // Both close frames were exchanged.
            Err(Error::ConnectionClosed) => Poll::Ready(Ok(())),
            flushed => ready_or_pending(flushed),
        }
    }

    /// The next message of the client. `None` at the end, and always after an error.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let (protocol, mut bytes) = self.split(context);
        let message = ready!(ready_or_pending(protocol.read(&mut bytes)));
        self.has_ended = message.is_err();
        Poll::Ready(match message {
            Err(Error::AlreadyClosed | Error::ConnectionClosed) => None,
            message => Some(message),
        })
    }

    /// True while memory is kept for a large message of the client, under way or past.
    pub(super) fn is_large(&self) -> bool {
        self.framing.largest() > MODEST_INBOUND_BYTES
    }

    /// True if the client has begun a message, or a head, and not ended it.
    pub(super) fn is_in_message(&self) -> bool {
        !self.framing.is_between_messages()
    }

    /// Gives back the memory of a large message of the client. To be called when nothing is left to be written and everything
    /// that has come was read.
    pub(super) fn tidy_up(&mut self) {
        // Between messages the library's read buffer is empty, and an open socket is all that it remembers.
        if self.is_large() && !self.is_in_message() && self.protocol.can_write() && !self.has_ended {
            (self.protocol, self.framing) = (new_protocol(), Framing::default());
        }
    }

    /// The library, and what it reads from and writes to.
    fn split<'a, 'b>(&'a mut self, context: &'a mut Context<'b>) -> (&'a mut WebSocketContext, Bridge<'a, 'b>) {
        let Self { connection, protocol, framing, large, .. } = self;
        (protocol, Bridge { connection: &mut **connection, framing, context, may_write: large.is_none() })
    }
}

fn new_protocol() -> WebSocketContext {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_frame_size(Some(MAX_INBOUND_BYTES))
        .max_message_size(Some(MAX_INBOUND_BYTES));
    WebSocketContext::new(Role::Server, Some(config))
}

/// The head of a binary frame with this payload.
fn head_of(payload: &Bytes) -> Bytes {
    let header = FrameHeader { opcode: OpCode::Data(Data::Binary), ..FrameHeader::default() };
    let mut head = Vec::new();
    header.format(payload.len() as u64, &mut head).expect("a vector takes everything");
    head.into()
}

fn ready_or_pending<T>(done: Result<T, Error>) -> Poll<Result<T, Error>> {
    match done {
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        done => Poll::Ready(done),
    }
}

/// An asynchronous connection as the library wants it: what would have to wait is an error.
struct Bridge<'a, 'b> {
    connection: &'a mut dyn Connection,
    framing: &'a mut Framing,
    context: &'a mut Context<'b>,
    may_write: bool,
}

fn at_once<T>(done: Poll<io::Result<T>>) -> io::Result<T> {
    match done {
        Poll::Ready(done) => done,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl Read for Bridge<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        at_once(Pin::new(&mut *self.connection).poll_read(self.context, &mut buffer))?;
        self.framing.pass(buffer.filled());
        Ok(buffer.filled().len())
    }
}

impl Write for Bridge<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.may_write {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        at_once(Pin::new(&mut *self.connection).poll_write(self.context, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        at_once(Pin::new(&mut *self.connection).poll_flush(self.context))
    }
}

#[cfg(test)]
mod tests;
