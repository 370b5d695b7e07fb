//! What is handed over, and what is stored together.

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::mailroom::MailroomError;
use crate::model::ids::{DeviceNo, Position};
use crate::model::mail::{Outgoing, Sent};
use crate::telemetry::traces::{Span, Traces};

/// Bytes of sealed messages in one group. A single larger send is a group of its own.
const GROUP_BYTES: usize = 4 << 20;

pub(super) type Reply<T> = oneshot::Sender<Result<T, MailroomError>>;

pub(super) enum Letter {
    Send(Waiting),
    Ack(Acks),
}

impl Letter {
    pub fn refuse(self, error: MailroomError) {
        match self {
            Self::Send(waiting) => waiting.refuse(error),
            // A reply fails only when nobody waits for it any more.
            Self::Ack(acks) => drop(acks.reply.send(Err(error))),
        }
    }
}

/// A send that somebody waits for.
pub(super) struct Waiting {
    pub mail: Outgoing,
    /// Kept until the send is stored, as a bound on what is in memory.
    pub room: OwnedSemaphorePermit,
    pub reply: Reply<Sent>,
    /// When it was first left for a later group.
    pub left_since: Option<Instant>,
    /// Of the wait for the group, and its commit.
    pub span: Span,
}

impl Waiting {
    pub fn refuse(self, error: MailroomError) {
        let _ = self.reply.send(Err(error));
    }
}

/// Acks of one device that somebody waits for.
pub(super) struct Acks {
    pub device: DeviceNo,
    pub positions: Vec<Position>,
    pub reply: Reply<()>,
    pub span: Span,
}

/// What is stored in one transaction.
#[derive(Default)]
pub(super) struct Group {
    pub sends: Vec<Outgoing>,
    pub rest: Vec<(OwnedSemaphorePermit, Reply<Sent>, Option<Instant>, Span)>,
    pub acks: Vec<(DeviceNo, Position)>,
    pub ack_replies: Vec<(Reply<()>, Span)>,
    bytes: usize,
    letters: usize,
}

impl Group {
    pub fn add_send(&mut self, Waiting { mail, room, reply, left_since, span }: Waiting) {
        self.letters += 1;
        self.bytes += mail.size();
        self.sends.push(mail);
        self.rest.push((room, reply, left_since, span));
    }

    pub fn add_acks(&mut self, Acks { device, positions, reply, span }: Acks) {
        self.letters += 1;
        self.acks.extend(positions.into_iter().map(|position| (device, position)));
        self.ack_replies.push((reply, span));
    }

    pub fn letters(&self) -> usize {
        self.letters
    }

    /// Tells everybody who waits for it that nothing of it was stored, or that nobody can tell.
    pub fn refuse(self, error: MailroomError) {
        for (_, reply, _, span) in self.rest {
            span.has_failed();
            // A reply fails only when its request is gone.
            let _ = reply.send(Err(error));
        }
        for (reply, span) in self.ack_replies {
            span.has_failed();
            let _ = reply.send(Err(error));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.letters == 0
    }

    /// A trace of the group, if one of its letters is traced.
    pub fn traced(&mut self, traces: &Traces) -> Span {
        let sends = self.rest.iter_mut().map(|(.., span)| span);
        let all = traces.together("store.settle", sends.chain(self.ack_replies.iter_mut().map(|(_, span)| span)));
        all.set("obscura.group.sends", self.sends.len() as i64);
        all.set("obscura.group.acks", self.acks.len() as i64);
        all
    }

    pub fn is_full(&self, most: usize) -> bool {
        self.letters >= most || self.bytes >= GROUP_BYTES
    }
}
