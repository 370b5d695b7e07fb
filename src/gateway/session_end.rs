//! Why a session ends, and how that is counted.

use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::gateway::frame_socket::FrameSocket;
use crate::gateway::memory::FrameMemory;
use crate::telemetry::metrics::Closed;

/// Why a session ends.
pub(super) enum SessionEnd {
    /// The client is gone.
    Gone,
    /// The client has not been heard of for too long.
    Silent,
    /// The device was removed or logged out, or has opened newer sockets instead.
    Dismissed(Closed),
    /// The client has broken the WebSocket protocol.
    ProtocolViolation(CloseCode),
    /// There is no memory for a large message of the client.
    NoMemory,
    /// The server stops.
    Stopping,
}

impl SessionEnd {
    /// Its label in the metrics.
    pub(super) fn reason(&self, frame_socket: &FrameSocket) -> Closed {
        match self {
            Self::Gone if frame_socket.is_stalled() => Closed::Slow,
            Self::Gone | Self::ProtocolViolation(_) => Closed::Gone,
            Self::NoMemory => Closed::NoMemory,
            Self::Silent => Closed::Silent,
            Self::Dismissed(reason) => *reason,
            Self::Stopping => Closed::Stopping,
        }
    }

    /// Tells the client, if it is still there. The memory of its frames is kept until the socket is gone.
    pub(super) async fn close(self, frame_socket: FrameSocket, _memory: FrameMemory) {
        let frame = |code, reason: &'static str| Some(CloseFrame { code, reason: reason.into() });
        match self {
            Self::Gone => {}
            Self::Silent | Self::Dismissed(_) => frame_socket.close(None).await,
            Self::ProtocolViolation(code) => frame_socket.close(frame(code, "")).await,
            Self::NoMemory => frame_socket.close(frame(CloseCode::Again, "")).await,
            Self::Stopping => frame_socket.close(frame(CloseCode::Away, "Server shutting down")).await,
        }
    }
}
