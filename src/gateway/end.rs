//! Why a session ends, and how that is counted.

use axum::extract::ws::CloseCode;

use crate::gateway::pipe::Pipe;
use crate::telemetry::metrics::Closed;

/// Why a session ends.
pub(super) enum End {
    /// The client is gone.
    Gone,
    /// The client has not been heard of for too long.
    Silent,
    /// The device was removed or logged out, or has opened newer sockets instead.
    Dismissed(Closed),
    /// The client has broken the WebSocket protocol.
    Offended(CloseCode),
    /// The server stops.
    Stopping,
}

impl End {
    /// Its label in the metrics.
    pub(super) fn reason(&self, pipe: &Pipe) -> Closed {
        match self {
            Self::Gone if pipe.is_stalled() => Closed::Slow,
            Self::Gone | Self::Offended(_) => Closed::Gone,
            Self::Silent => Closed::Silent,
            Self::Dismissed(reason) => *reason,
            Self::Stopping => Closed::Stopping,
        }
    }
}
