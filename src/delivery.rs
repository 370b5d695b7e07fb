//! Takes sends and acks of all requests and sessions, stores them in groups, then notifies the receivers.
//!
//! One task owns the writing. While one group is being committed the next one gathers, so the wait for the disk is
//! shared by all that wait, and none waits for company longer than until a group ends. Where the database can take
//! several groups at once, no two of them queue mail for the same account. Cancelling a request makes no difference: what it
//! handed over is stored and its readers are woken all the same.

mod account_schedule;
mod group;

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
use crate::delivery::account_schedule::AccountSchedule;
use crate::delivery::group::{Group, PendingSend, QueuedAcks, QueuedSend, WriteRequest};
use crate::model::ids::{Address, DeviceNo, Position, UserId};
use crate::model::message::{SendRequest, SendResult};
use crate::push::Push;
use crate::store::{self, GroupResult, Store};
use crate::tasks::Tasks;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::{Content, GroupFailure, Metrics};
use crate::telemetry::throttle::LogThrottle;
use crate::telemetry::traces::{Span, Traces};

/// Write requests that may wait in the channel. Those that are gathered, or wait for their turn, come on top.
const MAX_QUEUED_REQUESTS: usize = 4096;
/// Bytes of sealed messages that may wait or be in a group, in KiB.
const MAX_QUEUED_KIB: usize = 64 << 10;

/// Write requests with which a group begins beside another one. A smaller one would cost more for each write request, and so waits for the
/// other one's end.
const MIN_CONCURRENT_GROUP: usize = 24;

/// The pause before what was left for later is tried again, when nothing else comes.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// A send that could not be stored with the others is refused after this time. Nothing of it is stored then.
const MAX_DEFERRAL: Duration = Duration::from_secs(10);
/// Accounts that are remembered to be told later. The slow look of their sessions finds the mail of the others.
const MAX_UNCERTAIN_ACCOUNTS: usize = 10_000;

/// Why a write request was not stored, or why it is not known whether it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The disk is full. Nothing was stored.
    #[error("the disk is full")]
    Full,
    /// The database can't be used, or the server is shutting down. It may have been stored, if a commit was not answered.
    #[error("the database can't be used")]
    Unavailable,
}

/// A handle to the message writer. Cloning gives another one to the same.
#[derive(Clone)]
pub struct MessageWriter {
    requests: mpsc::Sender<WriteRequest>,
    memory: Arc<Semaphore>,
}

impl MessageWriter {
    /// Opens the message writer. Its task runs until `tasks` are stopped and everything handed over has been stored.
    pub fn open(
        grouping: Grouping,
        store: Store,
        notifier: Notifier,
        clock: Clock,
        telemetry: &Telemetry,
        tasks: &Tasks,
    ) -> Self {
        let (requests, incoming) = mpsc::channel(MAX_QUEUED_REQUESTS);
        let (metrics, traces) = (telemetry.metrics.clone(), telemetry.traces.clone());
        let worker = Worker {
            grouping,
            store,
            notifier,
            clock,
            metrics,
            traces,
            deferred: Vec::new(),
            schedule: AccountSchedule::default(),
            next_group: Group::default(),
            uncertain: HashSet::new(),
            uncertain_since: Instant::now(),
        };
        let stopping = tasks.clone();
        tasks.spawn("mailroom", async move { worker.run(incoming, stopping).await });
        Self { requests, memory: Arc::new(Semaphore::new(MAX_QUEUED_KIB)) }
    }

    /// Queues a send. Durable when it returns, and the receivers are being woken.
    pub async fn send(&self, send: SendRequest) -> Result<SendResult, WriteError> {
        let kib = u32::try_from(send.size() / 1024 + 1).unwrap_or(u32::MAX).min(MAX_QUEUED_KIB as u32);
        let span = Span::within("mailroom.send");
        let permit = self.memory.clone().acquire_many_owned(kib).await.map_err(|_| WriteError::Unavailable)?;
        let (reply, answer) = oneshot::channel();
        self.enqueue(WriteRequest::Send(QueuedSend {
            send,
            pending: PendingSend { _memory: permit, reply, deferred_since: None, span },
        }))
        .await?;
        answer.await.unwrap_or(Err(WriteError::Unavailable))
    }

    /// Deletes acknowledged messages for good. Durable when it returns.
    pub async fn acknowledge(&self, device: DeviceNo, positions: Vec<Position>) -> Result<(), WriteError> {
        let (reply, answer) = oneshot::channel();
        self.enqueue(WriteRequest::Ack(QueuedAcks { device, positions, reply, span: Span::within("mailroom.ack") }))
            .await?;
        answer.await.unwrap_or(Err(WriteError::Unavailable))
    }

    async fn enqueue(&self, request: WriteRequest) -> Result<(), WriteError> {
        self.requests.send(request).await.map_err(|_| WriteError::Unavailable)
    }
}

/// What tells of new mail.
pub struct Notifier {
    /// For devices with an open socket.
    pub bus: Bus,
    /// For those without.
    pub push: Push,
}

impl Notifier {
    fn new_messages(&self, addresses: &[Address]) {
        self.bus.notify(addresses, Signal::NewMessages);
        self.push.new_messages(addresses);
    }
}

struct Worker {
    grouping: Grouping,
    store: Store,
    notifier: Notifier,
    clock: Clock,
    metrics: Metrics,
    traces: Traces,
    /// Sends that come again with the next group.
    deferred: Vec<QueuedSend>,
    schedule: AccountSchedule,
    /// What goes into the next group.
    next_group: Group,
    /// Accounts that may have got mail of which no session was notified, because a commit was not answered.
    uncertain: HashSet<UserId>,
    /// When that was last found out.
    uncertain_since: Instant,
}

/// A group after the attempt to store it.
struct Attempt {
    group: Group,
    outcome: store::Result<GroupResult>,
    began: Instant,
    time: Duration,
}

/// Accounts that may have got mail, and the devices that are to be told.
struct UncertainDevices {
    users: Vec<UserId>,
    addresses: store::Result<Vec<Address>>,
}

/// The next write request, if there is one, or if one comes before `until`.
async fn next(requests: &mut mpsc::Receiver<WriteRequest>, until: Option<Instant>) -> Option<WriteRequest> {
    match (requests.try_recv(), until) {
        (Ok(request), _) => Some(request),
        (Err(_), Some(until)) => tokio::time::timeout_at(until, requests.recv()).await.ok().flatten(),
        (Err(_), None) => None,
    }
}

impl Worker {
    async fn run(mut self, mut requests: mpsc::Receiver<WriteRequest>, tasks: Tasks) {
        let at_once = self.store.max_concurrent_groups();
        let (mut under_way, mut lookups) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut is_drained = false;
        // What waited for its turn comes into `next_group` when the group before it ends, also behind the last write request.
        while !is_drained || !under_way.is_empty() || !self.next_group.is_empty() || !lookups.is_empty() {
            if under_way.len() < at_once && self.is_ready(under_way.is_empty()) {
                under_way.extend(self.start_group());
            }
            let takes_more = self.has_capacity() && under_way.len() < at_once && !is_drained;
            let has_uncertain = !self.uncertain.is_empty() && lookups.is_empty();
            tokio::select! {
                biased;
                Some(attempt) = under_way.next() => {
                    if self.finish_group(attempt, &mut requests) && has_uncertain {
                        lookups.push(self.look_up_uncertain());
                    }
                }
                Some(found) = lookups.next() => self.notify_uncertain(found),
                request = requests.recv(), if takes_more => match request {
                    Some(request) => self.collect(request, &mut requests).await,
                    None => {
                        is_drained = true;
                        under_way.extend(self.start_group());
                    }
                },
                () = tasks.stopping(), if !requests.is_closed() => requests.close(),
                // What was left tries again by itself, and not in a loop.
                () = tokio::time::sleep(RETRY_INTERVAL), if under_way.is_empty() && (has_uncertain || !self.deferred.is_empty()) => {
                    if has_uncertain {
                        lookups.push(self.look_up_uncertain());
                    }
                    under_way.extend(self.start_group());
                }
            }
        }
        // Nothing more comes, and what is left now has had its chance.
        self.deferred.drain(..).for_each(|waiting| waiting.pending.fail(WriteError::Unavailable));
    }

    fn has_capacity(&self) -> bool {
        let max_requests = self.grouping.max_requests;
        !self.next_group.is_full(max_requests) && self.schedule.waiting() < max_requests
    }

    fn is_ready(&self, is_only_group: bool) -> bool {
        let max_requests = self.grouping.max_requests;
        let enough = if is_only_group { 1 } else { MIN_CONCURRENT_GROUP.min(max_requests) };
        self.next_group.requests() >= enough || self.next_group.is_full(max_requests)
    }

    /// Gathers this write request and whatever comes with it.
    async fn collect(&mut self, request: WriteRequest, requests: &mut mpsc::Receiver<WriteRequest>) {
        let until = self.grouping.linger.map(|linger| Instant::now() + linger);
        let mut next_one = Some(request);
        while let Some(request) = next_one {
            match request {
                WriteRequest::Send(waiting) => self.schedule.admit(waiting, &mut self.next_group),
                WriteRequest::Ack(acks) => self.next_group.add_acks(acks),
            }
            next_one = if self.has_capacity() { next(requests, until).await } else { None };
        }
    }

    /// Begins to store what was left before, and what was gathered.
    fn start_group(&mut self) -> Option<impl Future<Output = Attempt> + use<>> {
        let max_requests = self.grouping.max_requests;
        let mut group = Group::default();
        // First, because the store spares the first ones; and not so many that there is no room for others.
        let again = max_requests.div_ceil(4).saturating_sub(self.schedule.waiting()).min(self.deferred.len());
        self.deferred.drain(..again).for_each(|waiting| self.schedule.admit(waiting, &mut group));
        group.append(std::mem::take(&mut self.next_group));
        self.schedule.start(&group);
        // Before those who come now.
        self.schedule.admit_waiting(&mut self.next_group, max_requests);
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

    /// Answers the requests of a group, and notifies the devices that have mail now. Returns true if the result shows
    /// that the database can be asked again about uncertain commits.
    fn finish_group(&mut self, attempt: Attempt, requests: &mut mpsc::Receiver<WriteRequest>) -> bool {
        self.schedule.finish(&attempt.group);
        self.schedule.admit_waiting(&mut self.next_group, self.grouping.max_requests);
        let is_database_back = attempt.began >= self.uncertain_since;
        match self.report_outcome(attempt) {
            // Those that wait would wait for the same.
            Err(WriteError::Unavailable) => {
                std::mem::take(&mut self.next_group).fail(WriteError::Unavailable);
                self.schedule.take_waiting().for_each(|waiting| waiting.pending.fail(WriteError::Unavailable));
                while let Ok(request) = requests.try_recv() {
                    request.fail(WriteError::Unavailable);
                }
                false
            }
            Err(WriteError::Full) => false,
            Ok(()) => is_database_back,
        }
    }

    fn report_outcome(&mut self, Attempt { group, outcome, time, .. }: Attempt) -> Result<(), WriteError> {
        match outcome {
            Ok(GroupResult { sent: results, locked_devices }) => {
                self.metrics.group_time.time((), time);
                self.send_trace_links(&results, &group);
                let receivers: Vec<_> =
                    results.iter().flatten().flat_map(|sent| sent.receivers.iter().copied()).collect();
                self.notifier.new_messages(&receivers);
                let requests = group.sends.into_iter().zip(group.pending_sends);
                for (sent, (send, pending)) in results.into_iter().zip(requests) {
                    match sent {
                        // A reply fails only when its request is gone; its mail is stored all the same.
                        Some(sent) => drop(pending.reply.send(Ok(sent))),
                        None => self.defer(QueuedSend { send, pending }),
                    }
                }
                for pending in group.pending_acks {
                    if locked_devices.contains(&pending.device) {
                        // Its session tries again.
                        pending.fail(WriteError::Unavailable);
                    } else {
                        let _ = pending.reply.send(Ok(()));
                    }
                }
                Ok(())
            }
            Err(cause) => {
                static LOGGED: LogThrottle = LogThrottle::new();
                let (sends, acks) = (group.sends.len(), group.acks.len());
                if LOGGED.try_acquire() {
                    error!(%cause, sends, acks, "a group could not be stored");
                } else {
                    debug!(%cause, sends, acks, "another group could not be stored");
                }
                let (error, reason) = match cause.is_full() {
                    true => (WriteError::Full, GroupFailure::Full),
                    false => (WriteError::Unavailable, GroupFailure::Unavailable),
                };
                self.metrics.group_failures.increment(reason);
                if error == WriteError::Unavailable {
                    let users = group.sends.iter().flat_map(SendRequest::accounts);
                    self.uncertain.extend(users.take(MAX_UNCERTAIN_ACCOUNTS.saturating_sub(self.uncertain.len())));
                    self.uncertain_since = Instant::now();
                }
                group.fail(error);
                Err(error)
            }
        }
    }

    /// Lets deliveries be parts of the traces of their sends. Best effort, as all signals are.
    fn send_trace_links(&self, results: &[Option<SendResult>], group: &Group) {
        if !self.traces.are_recorded() {
            return;
        }
        for (sent, pending) in results.iter().zip(&group.pending_sends) {
            if let (Some(sent), Some(trace_link)) = (sent, pending.span.trace_link()) {
                self.notifier.bus.send_trace_link(&sent.receivers, trace_link);
            }
        }
    }

    /// Keeps a send for the next group, unless it has been kept for too long.
    fn defer(&mut self, mut waiting: QueuedSend) {
        self.metrics.sends_left.increment(());
        let deferred_since = *waiting.pending.deferred_since.get_or_insert_with(Instant::now);
        if deferred_since.elapsed() >= MAX_DEFERRAL {
            waiting.pending.fail(WriteError::Unavailable);
        } else {
            waiting.pending.span.note("left for a later group");
            self.deferred.push(waiting);
        }
    }

    /// Looks up the devices of accounts for which a commit was not answered: it may have happened.
    fn look_up_uncertain(&self) -> impl Future<Output = UncertainDevices> + use<> {
        let (store, users) = (self.store.clone(), self.uncertain.iter().copied().collect::<Vec<UserId>>());
        async move { UncertainDevices { addresses: store.addresses(&users).await, users } }
    }

    /// Wakes them. When they could not be looked up, they are still unsure.
    fn notify_uncertain(&mut self, UncertainDevices { users, addresses }: UncertainDevices) {
        if let Ok(addresses) = addresses {
            self.notifier.new_messages(&addresses);
            for user in &users {
                self.uncertain.remove(user);
            }
        }
    }
}
