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
            Self::Send(waiting) => waiting.slip.refuse(error),
            Self::Ack(acks) => refuse(acks.reply, &acks.span, error),
        }
    }
}

/// A send that somebody waits for.
pub(super) struct Waiting {
    pub mail: Outgoing,
    pub slip: Slip,
}

/// What is needed of a send to answer it.
pub(super) struct Slip {
    /// Kept until the send is stored, as a bound on what is in memory.
    pub _room: OwnedSemaphorePermit,
    pub reply: Reply<Sent>,
    /// When it was first left for a later group.
    pub left_since: Option<Instant>,
    /// Of the wait for the group, and its commit.
    pub span: Span,
}

impl Slip {
    pub fn refuse(self, error: MailroomError) {
        refuse(self.reply, &self.span, error);
    }
}

fn refuse<T>(reply: Reply<T>, span: &Span, error: MailroomError) {
    span.has_failed();
    // A reply fails only when nobody waits for it any more.
    let _ = reply.send(Err(error));
}

/// Acks of one device that somebody waits for.
pub(super) struct Acks {
    pub device: DeviceNo,
    pub positions: Vec<Position>,
    pub reply: Reply<()>,
    pub span: Span,
}

/// What is needed of acks to answer them.
pub(super) struct AckSlip {
    pub device: DeviceNo,
    pub reply: Reply<()>,
    pub span: Span,
}

impl AckSlip {
    pub fn refuse(self, error: MailroomError) {
        refuse(self.reply, &self.span, error);
    }
}

/// What is stored in one transaction.
#[derive(Default)]
pub(super) struct Group {
    pub sends: Vec<Outgoing>,
    /// One for each of them, in the same order.
    pub slips: Vec<Slip>,
    pub acks: Vec<(DeviceNo, Position)>,
    pub ack_slips: Vec<AckSlip>,
    bytes: usize,
    letters: usize,
}

impl Group {
    pub fn add_send(&mut self, Waiting { mail, slip }: Waiting) {
        self.letters += 1;
        self.bytes += mail.size();
        self.sends.push(mail);
        self.slips.push(slip);
    }

    pub fn add_acks(&mut self, Acks { device, positions, reply, span }: Acks) {
        self.letters += 1;
        self.acks.extend(positions.into_iter().map(|position| (device, position)));
        self.ack_slips.push(AckSlip { device, reply, span });
    }

    /// Puts what is in another group behind what is in this one.
    pub fn append(&mut self, mut other: Group) {
        self.sends.append(&mut other.sends);
        self.slips.append(&mut other.slips);
        self.acks.append(&mut other.acks);
        self.ack_slips.append(&mut other.ack_slips);
        self.bytes += other.bytes;
        self.letters += other.letters;
    }

    pub fn letters(&self) -> usize {
        self.letters
    }

    /// Tells everybody who waits for it that nothing of it was stored, or that nobody can tell.
    pub fn refuse(self, error: MailroomError) {
        self.slips.into_iter().for_each(|slip| slip.refuse(error));
        self.ack_slips.into_iter().for_each(|slip| slip.refuse(error));
    }

    pub fn is_empty(&self) -> bool {
        self.letters == 0
    }

    /// A trace of the group, if one of its letters is traced.
    pub fn traced(&mut self, traces: &Traces) -> Span {
        let sends = self.slips.iter_mut().map(|slip| &mut slip.span);
        let all = traces.together("store.settle", sends.chain(self.ack_slips.iter_mut().map(|slip| &mut slip.span)));
        all.set("obscura.group.sends", self.sends.len() as i64);
        all.set("obscura.group.acks", self.acks.len() as i64);
        all
    }

    pub fn is_full(&self, most: usize) -> bool {
        self.letters >= most || self.bytes >= GROUP_BYTES
    }
}
