//! Takes sends and acks from everybody, stores them in groups, then wakes who must know.
//!
//! One task owns the writing. While one group is being committed the next one gathers, so the wait for the disk is
//! shared by everybody who waits, and nobody waits longer for company. Cancelling a request makes no difference: what it
//! handed over is stored and its readers are woken all the same.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::error;

use crate::bus::{Bus, Signal};
use crate::clock::Clock;
use crate::model::ids::{DeviceNo, Position};
use crate::model::mail::{Outgoing, Sent};
use crate::store::Store;
use crate::tasks::Tasks;

/// Letters that may wait to be taken into a group.
const WAITING: usize = 4096;
/// Bytes of sealed messages that may wait or be in a group, in KiB.
const WAITING_KIB: usize = 64 << 10;
/// Letters in one group.
const GROUP: usize = 512;
/// Bytes of sealed messages in one group. A single larger send is a group of its own.
const GROUP_BYTES: usize = 4 << 20;

/// Why a letter could not be stored. Nothing of it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MailroomError {
    /// The disk is full.
    #[error("the disk is full")]
    Full,
    /// The database can't be used, or the server is shutting down.
    #[error("the database can't be used")]
    Unavailable,
}

type Reply<T> = oneshot::Sender<Result<T, MailroomError>>;

enum Letter {
    Send { mail: Outgoing, room: OwnedSemaphorePermit, reply: Reply<Sent> },
    Ack { device: DeviceNo, positions: Vec<Position>, reply: Reply<()> },
}

impl Letter {
    fn refuse(self, error: MailroomError) {
        match self {
            Self::Send { reply, .. } => drop(reply.send(Err(error))),
            Self::Ack { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

/// The way into the mailroom. Cloning gives another door to the same room.
#[derive(Clone)]
pub struct Mailroom {
    letters: mpsc::Sender<Letter>,
    room: Arc<Semaphore>,
}

impl Mailroom {
    /// Opens the mailroom. Its task runs until `tasks` are stopped and everything handed over has been stored.
    pub fn open(store: Store, bus: Bus, clock: Clock, tasks: &Tasks) -> Self {
        let (letters, incoming) = mpsc::channel(WAITING);
        let worker = Worker { store, bus, clock };
        let stopping = tasks.clone();
        tasks.spawn("mailroom", async move { worker.run(incoming, stopping).await });
        Self { letters, room: Arc::new(Semaphore::new(WAITING_KIB)) }
    }

    /// Queues a send. Durable when it returns, and the receivers are being woken.
    pub async fn send(&self, mail: Outgoing) -> Result<Sent, MailroomError> {
        let kib = u32::try_from(mail.size() / 1024 + 1).unwrap_or(u32::MAX).min(WAITING_KIB as u32);
        let room = self.room.clone().acquire_many_owned(kib).await.map_err(|_| MailroomError::Unavailable)?;
        let (reply, answer) = oneshot::channel();
        self.hand_over(Letter::Send { mail, room, reply }).await?;
        answer.await.unwrap_or(Err(MailroomError::Unavailable))
    }

    /// Deletes acknowledged messages for good. Durable when it returns.
    pub async fn acknowledge(&self, device: DeviceNo, positions: Vec<Position>) -> Result<(), MailroomError> {
        let (reply, answer) = oneshot::channel();
        self.hand_over(Letter::Ack { device, positions, reply }).await?;
        answer.await.unwrap_or(Err(MailroomError::Unavailable))
    }

    async fn hand_over(&self, letter: Letter) -> Result<(), MailroomError> {
        self.letters.send(letter).await.map_err(|_| MailroomError::Unavailable)
    }
}

struct Worker {
    store: Store,
    bus: Bus,
    clock: Clock,
}

#[derive(Default)]
struct Group {
    sends: Vec<Outgoing>,
    acks: Vec<(DeviceNo, Position)>,
    bytes: usize,
    letters: usize,
    /// Kept until the group is stored, as a bound on what is in memory.
    room: Vec<OwnedSemaphorePermit>,
    send_replies: Vec<Reply<Sent>>,
    ack_replies: Vec<Reply<()>>,
}

impl Group {
    fn add(&mut self, letter: Letter) {
        self.letters += 1;
        match letter {
            Letter::Send { mail, room, reply } => {
                self.bytes += mail.size();
                self.sends.push(mail);
                self.room.push(room);
                self.send_replies.push(reply);
            }
            Letter::Ack { device, positions, reply } => {
                self.acks.extend(positions.into_iter().map(|position| (device, position)));
                self.ack_replies.push(reply);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.letters >= GROUP || self.bytes >= GROUP_BYTES
    }
}

impl Worker {
    async fn run(self, mut letters: mpsc::Receiver<Letter>, tasks: Tasks) {
        loop {
            let first = tokio::select! {
                biased;
                letter = letters.recv() => letter,
                () = tasks.stopping(), if !letters.is_closed() => {
                    letters.close();
                    continue;
                }
            };
            let Some(first) = first else { return };
            let mut group = Group::default();
            group.add(first);
            while !group.is_full() {
                let Ok(letter) = letters.try_recv() else { break };
                group.add(letter);
            }
            if self.store(group).await == Err(MailroomError::Unavailable) {
                // Whoever waits would wait for the same.
                while let Ok(letter) = letters.try_recv() {
                    letter.refuse(MailroomError::Unavailable);
                }
            }
        }
    }

    async fn store(&self, group: Group) -> Result<(), MailroomError> {
        let now = self.clock.now();
        match self.store.settle(&group.sends, &group.acks, now).await {
            Ok(sent) => {
                let woken: Vec<_> = sent.iter().flat_map(|sent| sent.woken.iter().copied()).collect();
                self.bus.wake(&woken, Signal::Mail);
                // A reply fails only when its request is gone; its mail is stored all the same.
                for (reply, sent) in group.send_replies.into_iter().zip(sent) {
                    let _ = reply.send(Ok(sent));
                }
                for reply in group.ack_replies {
                    let _ = reply.send(Ok(()));
                }
                Ok(())
            }
            Err(cause) => {
                error!(%cause, sends = group.sends.len(), acks = group.acks.len(), "a group could not be stored");
                let error = if cause.is_full() { MailroomError::Full } else { MailroomError::Unavailable };
                for reply in group.send_replies {
                    let _ = reply.send(Err(error));
                }
                for reply in group.ack_replies {
                    let _ = reply.send(Err(error));
                }
                Err(error)
            }
        }
    }
}
