//! What is handed over, and what is stored together.

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::delivery::WriteError;
use crate::model::ids::{DeviceNo, Position};
use crate::model::message::{SendRequest, SendResult};
use crate::telemetry::traces::{Span, Traces};

/// Bytes of sealed messages in one group. A single larger send is a group of its own.
const GROUP_BYTES: usize = 4 << 20;

pub(super) type Reply<T> = oneshot::Sender<Result<T, WriteError>>;

pub(super) enum WriteRequest {
    Send(QueuedSend),
    Ack(QueuedAcks),
}

impl WriteRequest {
    pub fn fail(self, error: WriteError) {
        match self {
            Self::Send(waiting) => waiting.pending.fail(error),
            Self::Ack(acks) => fail(acks.reply, &acks.span, error),
        }
    }
}

/// A send that a request waits for.
pub(super) struct QueuedSend {
    pub send: SendRequest,
    pub pending: PendingSend,
}

/// What is needed of a send to answer it.
pub(super) struct PendingSend {
    /// Kept until the send is stored, as a bound on what is in memory.
    pub _memory: OwnedSemaphorePermit,
    pub reply: Reply<SendResult>,
    /// When it was first left for a later group.
    pub deferred_since: Option<Instant>,
    /// Of the wait for the group, and its commit.
    pub span: Span,
}

impl PendingSend {
    pub fn fail(self, error: WriteError) {
        fail(self.reply, &self.span, error);
    }
}

fn fail<T>(reply: Reply<T>, span: &Span, error: WriteError) {
    span.set_failed();
    // A reply fails only when its request is gone.
    let _ = reply.send(Err(error));
}

/// Acks of one device that a session waits for.
pub(super) struct QueuedAcks {
    pub device: DeviceNo,
    pub positions: Vec<Position>,
    pub reply: Reply<()>,
    pub span: Span,
}

/// What is needed of acks to answer them.
pub(super) struct PendingAcks {
    pub device: DeviceNo,
    pub reply: Reply<()>,
    pub span: Span,
}

impl PendingAcks {
    pub fn fail(self, error: WriteError) {
        fail(self.reply, &self.span, error);
    }
}

/// What is stored in one transaction.
#[derive(Default)]
pub(super) struct Group {
    pub sends: Vec<SendRequest>,
    /// One for each of them, in the same order.
    pub pending_sends: Vec<PendingSend>,
    pub acks: Vec<(DeviceNo, Position)>,
    pub pending_acks: Vec<PendingAcks>,
    bytes: usize,
    requests: usize,
}

impl Group {
    pub fn add_send(&mut self, QueuedSend { send, pending }: QueuedSend) {
        self.requests += 1;
        self.bytes += send.size();
        self.sends.push(send);
        self.pending_sends.push(pending);
    }

    pub fn add_acks(&mut self, QueuedAcks { device, positions, reply, span }: QueuedAcks) {
        self.requests += 1;
        self.acks.extend(positions.into_iter().map(|position| (device, position)));
        self.pending_acks.push(PendingAcks { device, reply, span });
    }

    /// Puts what is in another group behind what is in this one.
    pub fn append(&mut self, mut other: Group) {
        self.sends.append(&mut other.sends);
        self.pending_sends.append(&mut other.pending_sends);
        self.acks.append(&mut other.acks);
        self.pending_acks.append(&mut other.pending_acks);
        self.bytes += other.bytes;
        self.requests += other.requests;
    }

    pub fn requests(&self) -> usize {
        self.requests
    }

    /// Ends all requests that wait for it with this error: nothing of it was stored, or it is unknown whether it was.
    pub fn fail(self, error: WriteError) {
        self.pending_sends.into_iter().for_each(|pending| pending.fail(error));
        self.pending_acks.into_iter().for_each(|pending| pending.fail(error));
    }

    pub fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// A trace of the group, if one of its write requests is traced.
    pub fn traced(&mut self, traces: &Traces) -> Span {
        let sends = self.pending_sends.iter_mut().map(|pending| &mut pending.span);
        let all = traces
            .begin_linked("store.settle", sends.chain(self.pending_acks.iter_mut().map(|pending| &mut pending.span)));
        all.set("obscura.group.sends", self.sends.len() as i64);
        all.set("obscura.group.acks", self.acks.len() as i64);
        all
    }

    pub fn is_full(&self, max_requests: usize) -> bool {
        self.requests >= max_requests || self.bytes >= GROUP_BYTES
    }
}
