//! Takes sends and acks from everybody, stores them in groups, then wakes who must know.
//!
//! One task owns the writing. While one group is being committed the next one gathers, so the wait for the disk is
//! shared by everybody who waits, and nobody waits for company longer than until a group ends. Where the database can take
//! several groups at once, no two of them queue mail for the same account. Cancelling a request makes no difference: what it
//! handed over is stored and its readers are woken all the same.

mod group;
mod turns;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, error};

use crate::bus::{Bus, Signal};
use crate::clock::Clock;
use crate::config::Grouping;
use crate::mailroom::group::{Acks, Group, Letter, Slip, Waiting};
use crate::mailroom::turns::Turns;
use crate::model::ids::{Address, DeviceNo, Position, UserId};
use crate::model::mail::{Outgoing, Sent};
use crate::push::Push;
use crate::store::{self, GroupResult, Store};
use crate::tasks::Tasks;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::{Content, GroupFailure, Metrics};
use crate::telemetry::throttle::Throttle;
use crate::telemetry::traces::{Span, Traces};

/// Letters that may wait in the channel. Those that are gathered, or wait for their turn, come on top.
const WAITING: usize = 4096;
/// Bytes of sealed messages that may wait or be in a group, in KiB.
const WAITING_KIB: usize = 64 << 10;

/// Letters with which a group begins beside another one. A smaller one would cost more for each letter, and so waits for the
/// other one's end.
const ENOUGH: usize = 24;

/// The pause before what was left for later is tried again, when nothing else comes.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// A send that could not be stored with the others is refused after this time. Nothing of it is stored then.
const LONGEST_LEFT: Duration = Duration::from_secs(10);
/// Accounts that are remembered to be told later. The slow look of their sessions finds the mail of the others.
const MOST_UNSURE: usize = 10_000;

/// Why a letter was not stored, or why nobody can tell whether it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MailroomError {
    /// The disk is full. Nothing was stored.
    #[error("the disk is full")]
    Full,
    /// The database can't be used, or the server is shutting down. It may have been stored, if a commit was not answered.
    #[error("the database can't be used")]
    Unavailable,
}

/// The way into the mailroom. Cloning gives another door to the same room.
#[derive(Clone)]
pub struct Mailroom {
    letters: mpsc::Sender<Letter>,
    room: Arc<Semaphore>,
}

impl Mailroom {
    /// Opens the mailroom. Its task runs until `tasks` are stopped and everything handed over has been stored.
    pub fn open(
        grouping: Grouping,
        store: Store,
        waking: Waking,
        clock: Clock,
        telemetry: &Telemetry,
        tasks: &Tasks,
    ) -> Self {
        let (letters, incoming) = mpsc::channel(WAITING);
        let (metrics, traces) = (telemetry.metrics.clone(), telemetry.traces.clone());
        let worker = Worker {
            grouping,
            store,
            waking,
            clock,
            metrics,
            traces,
            left: Vec::new(),
            turns: Turns::default(),
            gathered: Group::default(),
            unsure: HashSet::new(),
            unsure_since: Instant::now(),
        };
        let stopping = tasks.clone();
        tasks.spawn("mailroom", async move { worker.run(incoming, stopping).await });
        Self { letters, room: Arc::new(Semaphore::new(WAITING_KIB)) }
    }

    /// Queues a send. Durable when it returns, and the receivers are being woken.
    pub async fn send(&self, mail: Outgoing) -> Result<Sent, MailroomError> {
        let kib = u32::try_from(mail.size() / 1024 + 1).unwrap_or(u32::MAX).min(WAITING_KIB as u32);
        let span = Span::within("mailroom.send");
        let room = self.room.clone().acquire_many_owned(kib).await.map_err(|_| MailroomError::Unavailable)?;
        let (reply, answer) = oneshot::channel();
        self.hand_over(Letter::Send(Waiting { mail, slip: Slip { _room: room, reply, left_since: None, span } }))
            .await?;
        answer.await.unwrap_or(Err(MailroomError::Unavailable))
    }

    /// Deletes acknowledged messages for good. Durable when it returns.
    pub async fn acknowledge(&self, device: DeviceNo, positions: Vec<Position>) -> Result<(), MailroomError> {
        let (reply, answer) = oneshot::channel();
        self.hand_over(Letter::Ack(Acks { device, positions, reply, span: Span::within("mailroom.ack") })).await?;
        answer.await.unwrap_or(Err(MailroomError::Unavailable))
    }

    async fn hand_over(&self, letter: Letter) -> Result<(), MailroomError> {
        self.letters.send(letter).await.map_err(|_| MailroomError::Unavailable)
    }
}

/// What tells of new mail.
pub struct Waking {
    /// For devices with an open socket.
    pub bus: Bus,
    /// For those without.
    pub push: Push,
}

impl Waking {
    fn mail(&self, addresses: &[Address]) {
        self.bus.wake(addresses, Signal::Mail);
        self.push.mail(addresses);
    }
}

struct Worker {
    grouping: Grouping,
    store: Store,
    waking: Waking,
    clock: Clock,
    metrics: Metrics,
    traces: Traces,
    /// Sends that come again with the next group.
    left: Vec<Waiting>,
    turns: Turns,
    /// What goes into the next group.
    gathered: Group,
    /// Accounts that may have got mail of which nobody was told, because a commit was not answered.
    unsure: HashSet<UserId>,
    /// When that was last found out.
    unsure_since: Instant,
}

/// A group after the attempt to store it.
struct Attempt {
    group: Group,
    outcome: store::Result<GroupResult>,
    began: Instant,
    time: Duration,
}

/// Accounts that may have got mail, and the devices that are to be told.
struct Told {
    users: Vec<UserId>,
    addresses: store::Result<Vec<Address>>,
}

/// The next letter, if there is one, or if one comes before `until`.
async fn next(letters: &mut mpsc::Receiver<Letter>, until: Option<Instant>) -> Option<Letter> {
    match (letters.try_recv(), until) {
        (Ok(letter), _) => Some(letter),
        (Err(_), Some(until)) => tokio::time::timeout_at(until, letters.recv()).await.ok().flatten(),
        (Err(_), None) => None,
    }
}

impl Worker {
    async fn run(mut self, mut letters: mpsc::Receiver<Letter>, tasks: Tasks) {
        let at_once = self.store.max_concurrent_groups();
        let (mut under_way, mut telling) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut is_drained = false;
        // What waited for its turn comes into `gathered` when the group before it ends, also behind the last letter.
        while !is_drained || !under_way.is_empty() || !self.gathered.is_empty() || !telling.is_empty() {
            if under_way.len() < at_once && self.is_ready(under_way.is_empty()) {
                under_way.extend(self.begin());
            }
            let takes_more = self.has_room() && under_way.len() < at_once && !is_drained;
            let is_untold = !self.unsure.is_empty() && telling.is_empty();
            tokio::select! {
                biased;
                Some(attempt) = under_way.next() => {
                    if self.answer(attempt, &mut letters) && is_untold {
                        telling.push(self.tell());
                    }
                }
                Some(told) = telling.next() => self.told(told),
                letter = letters.recv(), if takes_more => match letter {
                    Some(letter) => self.gather(letter, &mut letters).await,
                    None => {
                        is_drained = true;
                        under_way.extend(self.begin());
                    }
                },
                () = tasks.stopping(), if !letters.is_closed() => letters.close(),
                // What was left tries again by itself, and not in a loop.
                () = tokio::time::sleep(TRY_AGAIN), if under_way.is_empty() && (is_untold || !self.left.is_empty()) => {
                    if is_untold {
                        telling.push(self.tell());
                    }
                    under_way.extend(self.begin());
                }
            }
        }
        // Nothing more comes, and what is left now has had its chance.
        self.left.drain(..).for_each(|waiting| waiting.slip.refuse(MailroomError::Unavailable));
    }

    fn has_room(&self) -> bool {
        let most = self.grouping.most;
        !self.gathered.is_full(most) && self.turns.waiting() < most
    }

    fn is_ready(&self, is_only_one: bool) -> bool {
        let most = self.grouping.most;
        let enough = if is_only_one { 1 } else { ENOUGH.min(most) };
        self.gathered.letters() >= enough || self.gathered.is_full(most)
    }

    /// Gathers this letter and whatever comes with it.
    async fn gather(&mut self, letter: Letter, letters: &mut mpsc::Receiver<Letter>) {
        let until = self.grouping.linger.map(|linger| Instant::now() + linger);
        let mut next_one = Some(letter);
        while let Some(letter) = next_one {
            match letter {
                Letter::Send(waiting) => self.turns.let_in(waiting, &mut self.gathered),
                Letter::Ack(acks) => self.gathered.add_acks(acks),
            }
            next_one = if self.has_room() { next(letters, until).await } else { None };
        }
    }

    /// Begins to store what was left before, and what was gathered.
    fn begin(&mut self) -> Option<impl Future<Output = Attempt> + use<>> {
        let most = self.grouping.most;
        let mut group = Group::default();
        // First, because the store spares the first ones; and not so many that there is no room for others.
        let again = most.div_ceil(4).saturating_sub(self.turns.waiting()).min(self.left.len());
        self.left.drain(..again).for_each(|waiting| self.turns.let_in(waiting, &mut group));
        group.append(std::mem::take(&mut self.gathered));
        self.turns.begin(&group);
        // Before those who come now.
        self.turns.let_in_who_waited(&mut self.gathered, most);
        (!group.is_empty()).then(|| self.attempt(group))
    }

    /// Stores a group. It borrows nothing, so that another one can be gathered meanwhile.
    fn attempt(&self, mut group: Group) -> impl Future<Output = Attempt> + use<> {
        self.metrics.group_size.number(Content::Sends, group.sends.len());
        self.metrics.group_size.number(Content::Acks, group.acks.len());
        let (store, traces, now, began) =
            (self.store.clone(), self.traces.clone(), self.clock.moment(), Instant::now());
        async move {
            let span = group.traced(&traces);
            let outcome = span.attempt(store.commit_group(&group.sends, &group.acks, now)).await;
            drop(span);
            Attempt { group, outcome, began, time: began.elapsed() }
        }
    }

    /// Tells everybody who waits for a group what became of it, and wakes who has mail now. Answers whether it showed that
    /// the database can be asked again about those of whom nobody knows.
    fn answer(&mut self, attempt: Attempt, letters: &mut mpsc::Receiver<Letter>) -> bool {
        self.turns.end(&attempt.group);
        self.turns.let_in_who_waited(&mut self.gathered, self.grouping.most);
        let shows_it = attempt.began >= self.unsure_since;
        match self.conclude(attempt) {
            // Whoever waits would wait for the same.
            Err(MailroomError::Unavailable) => {
                std::mem::take(&mut self.gathered).refuse(MailroomError::Unavailable);
                self.turns.give_up().for_each(|waiting| waiting.slip.refuse(MailroomError::Unavailable));
                while let Ok(letter) = letters.try_recv() {
                    letter.refuse(MailroomError::Unavailable);
                }
                false
            }
            Err(MailroomError::Full) => false,
            Ok(()) => shows_it,
        }
    }

    fn conclude(&mut self, Attempt { group, outcome, time, .. }: Attempt) -> Result<(), MailroomError> {
        match outcome {
            Ok(GroupResult { sent: results, locked_devices }) => {
                self.metrics.group_time.time((), time);
                self.lay_trails(&results, &group);
                let woken: Vec<_> = results.iter().flatten().flat_map(|sent| sent.woken.iter().copied()).collect();
                self.waking.mail(&woken);
                let letters = group.sends.into_iter().zip(group.slips);
                for (sent, (mail, slip)) in results.into_iter().zip(letters) {
                    match sent {
                        // A reply fails only when its request is gone; its mail is stored all the same.
                        Some(sent) => drop(slip.reply.send(Ok(sent))),
                        None => self.leave(Waiting { mail, slip }),
                    }
                }
                for slip in group.ack_slips {
                    if locked_devices.contains(&slip.device) {
                        // Its session tries again.
                        slip.refuse(MailroomError::Unavailable);
                    } else {
                        let _ = slip.reply.send(Ok(()));
                    }
                }
                Ok(())
            }
            Err(cause) => {
                static TOLD: Throttle = Throttle::new();
                let (sends, acks) = (group.sends.len(), group.acks.len());
                if TOLD.lets_through() {
                    error!(%cause, sends, acks, "a group could not be stored");
                } else {
                    debug!(%cause, sends, acks, "another group could not be stored");
                }
                let (error, reason) = match cause.is_full() {
                    true => (MailroomError::Full, GroupFailure::Full),
                    false => (MailroomError::Unavailable, GroupFailure::Unavailable),
                };
                self.metrics.group_failures.one(reason);
                if error == MailroomError::Unavailable {
                    let users = group.sends.iter().flat_map(Outgoing::accounts);
                    self.unsure.extend(users.take(MOST_UNSURE.saturating_sub(self.unsure.len())));
                    self.unsure_since = Instant::now();
                }
                group.refuse(error);
                Err(error)
            }
        }
    }

    /// Lets deliveries be parts of the traces of their sends. Best effort, as all signals are.
    fn lay_trails(&self, results: &[Option<Sent>], group: &Group) {
        if !self.traces.are_kept() {
            return;
        }
        for (sent, slip) in results.iter().zip(&group.slips) {
            if let (Some(sent), Some(trail)) = (sent, slip.span.trail()) {
                self.waking.bus.lay_trail(&sent.woken, trail);
            }
        }
    }

    /// Keeps a send for the next group, unless it has been kept for too long.
    fn leave(&mut self, mut waiting: Waiting) {
        self.metrics.sends_left.one(());
        let left_since = *waiting.slip.left_since.get_or_insert_with(Instant::now);
        if left_since.elapsed() >= LONGEST_LEFT {
            waiting.slip.refuse(MailroomError::Unavailable);
        } else {
            waiting.slip.span.note("left for a later group");
            self.left.push(waiting);
        }
    }

    /// Looks up the devices of accounts for which a commit was not answered: it may have happened.
    fn tell(&self) -> impl Future<Output = Told> + use<> {
        let (store, users) = (self.store.clone(), self.unsure.iter().copied().collect::<Vec<UserId>>());
        async move { Told { addresses: store.addresses(&users).await, users } }
    }

    /// Wakes them. When they could not be looked up, they are still unsure.
    fn told(&mut self, Told { users, addresses }: Told) {
        if let Ok(addresses) = addresses {
            self.waking.mail(&addresses);
            for user in &users {
                self.unsure.remove(user);
            }
        }
    }
}
