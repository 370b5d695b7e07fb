//! The worker: leases devices that are due, asks the store whether they are still to be woken, hands them to their
//! providers, and settles what came of it.

mod starting;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, info, warn};

use crate::clock::{Clock, Timestamp};
use crate::config::Config;
use crate::model::ids::DeviceNo;
use crate::push::Push;
use crate::push::attempts::Attempts;
use crate::push::janitor::Janitor;
use crate::push::lane::Lanes;
use crate::push::outbox::Outbox;
use crate::push::providers::Pushed;
use crate::push::queue::{Fate, Job, Leased, Queue, QueueError, Reason};
use crate::push::refusals::Refusals;
use crate::push::waiting::Waiting;
use crate::store::{PushCandidate, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::{Metrics, PushStatus};
use crate::telemetry::traces::Traces;

/// Sessions that have ended and are looked at together.
const ENDED: usize = 500;
/// A subscription is deleted when its service has not known it for this time.
const MISSING_FOR: Duration = Duration::from_hours(12);
/// How often the length of the queue is looked at.
const MEASURING: Duration = Duration::from_secs(5);
/// At shutdown, so much time for the pushes under way. What is not settled then is found in the inboxes again.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What can go wrong in a round.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A push that was tried.
struct Tried {
    leased: Leased,
    candidate: PushCandidate,
    pushed: Pushed,
}

pub(super) struct Worker {
    queue: Queue,
    outbox: Arc<Outbox>,
    lanes: Arc<Lanes>,
    janitor: Janitor,
    store: Store,
    clock: Clock,
    traces: Traces,
    config: Arc<Config>,
    metrics: Metrics,
    /// When the length of the queue is looked at next.
    measure_at: Instant,
    attempts: Attempts,
    refusals: Refusals,
    /// Leased, and without a slot yet.
    waiting: Waiting,
    tried: (mpsc::Sender<Tried>, mpsc::Receiver<Tried>),
    is_outage_told: bool,
}

impl Worker {
    pub(super) fn new(
        queue: Queue,
        push: &Push,
        janitor: Janitor,
        config: &Arc<Config>,
        (store, clock, telemetry): (&Store, &Clock, &Telemetry),
    ) -> Self {
        Self {
            queue,
            outbox: push.outbox.clone(),
            lanes: push.lanes.clone(),
            janitor,
            store: store.clone(),
            clock: clock.clone(),
            metrics: telemetry.metrics.clone(),
            measure_at: Instant::now(),
            traces: telemetry.traces.clone(),
            // Each push under way keeps its slot until its outcome is in here.
            tried: mpsc::channel(config.notifications.worker_concurrency),
            attempts: Attempts::default(),
            refusals: Refusals::new(config.web_push.contact.is_some()),
            waiting: Waiting::new(config.notifications.worker_concurrency, config.notifications.visibility_timeout),
            config: config.clone(),
            is_outage_told: false,
        }
    }

    pub(super) async fn run(mut self, tasks: Tasks) {
        let mut ticks = interval(self.config.notifications.worker_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => break,
                Some(tried) = self.tried.1.recv() => {
                    let settled = self.settle(tried).await;
                    self.tell(settled);
                    // Their slots are free now.
                    let admitted = self.admit(&tasks).await;
                    self.tell(admitted);
                }
                _ = ticks.tick() => {
                    let looked = self.look(&tasks).await;
                    self.tell(looked);
                }
            }
        }
        if timeout(LAST_WORDS, self.wind_up()).await.is_err() {
            debug!("some pushes were not settled before the end");
        }
    }

    /// Who is connected elsewhere when the server stops comes back, and who doesn't is woken.
    async fn wind_up(&mut self) {
        let ended = self.look_after_the_ended().await;
        self.tell(ended);
        let flushed = self.flush().await;
        self.tell(flushed.map_err(Trouble::from));
        let given_up = self.waiting.give_up().into_iter().map(|leased| (leased, Fate::Later(Duration::ZERO))).collect();
        let given_back = self.end(given_up).await;
        self.tell(given_back);
        let (closed, _) = mpsc::channel(1);
        // Ends when all that are under way have said what came of them.
        self.tried.0 = closed;
        while let Some(tried) = self.tried.1.recv().await {
            let settled = self.settle(tried).await;
            self.tell(settled);
        }
    }

    /// Takes in what is new, and starts what is due.
    async fn look(&mut self, tasks: &Tasks) -> Result<(), Trouble> {
        self.look_after_the_ended().await?;
        self.flush().await?;
        if self.measure_at <= Instant::now() {
            self.measure_at = Instant::now() + MEASURING;
            self.metrics.push_queue.set((), self.queue.length().await?);
        }
        self.admit(tasks).await?;
        let limit = self.config.notifications.worker_concurrency;
        loop {
            let since = Instant::now();
            let leased = self.queue.lease(limit, self.config.notifications.visibility_timeout).await?;
            let is_full = leased.len() >= limit;
            self.judge(leased, since, tasks).await?;
            if !is_full || tasks.is_stopping() {
                return Ok(());
            }
            while let Ok(tried) = self.tried.1.try_recv() {
                self.settle(tried).await?;
            }
            self.admit(tasks).await?;
        }
    }

    async fn flush(&mut self) -> Result<(), QueueError> {
        let jobs = self.outbox.take_jobs();
        if jobs.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let due: Vec<_> = jobs.iter().map(|(job, due)| (*job, due.saturating_duration_since(now))).collect();
        self.queue.schedule(&due).await.inspect_err(|_| self.outbox.put_back(jobs))
    }

    /// A device whose socket has died with mail left is to be woken again, though it was woken for that mail before.
    async fn look_after_the_ended(&mut self) -> Result<(), Trouble> {
        loop {
            let ended = self.outbox.take_ended(ENDED);
            if ended.is_empty() {
                return Ok(());
            }
            match self.store.reset_pushes(&ended).await {
                Ok(left) => {
                    let jobs = left.into_iter().map(|device| Job { device, reason: Reason::Mail });
                    self.outbox.add(jobs, Instant::now() + self.config.notifications.push_delay);
                }
                Err(error) => {
                    ended.into_iter().for_each(|device| self.outbox.ended(device));
                    return Err(error.into());
                }
            }
        }
    }

    /// Settles this push, and all that have come to an end with it.
    async fn settle(&mut self, first: Tried) -> Result<(), Trouble> {
        let mut all = vec![first];
        while let Ok(tried) = self.tried.1.try_recv() {
            all.push(tried);
        }
        let now = self.clock.now();
        let (mut settled, mut sent) = (Vec::new(), Vec::new());
        let (mut unheard, mut missing, mut known) = (0, Vec::new(), Vec::new());
        for Tried { leased, candidate, pushed } in all {
            let lane = self.lanes.of(&candidate.target).clone();
            if let Some(status) = pushed.refused_with() {
                self.metrics.push_refusals.increment((lane.name, PushStatus::of(status)));
                self.refusals.tell(&candidate.target, status);
            }
            let pushed = judged(pushed, &candidate, now, &mut missing, &mut known);
            match &pushed {
                Pushed::Unavailable { cause, retry_after } => {
                    lane.has_failed(*cause, *retry_after, self.config.notifications.visibility_timeout);
                }
                // Or a single made-up token would end the pause of a provider that is away.
                Pushed::Unfit => {}
                Pushed::Accepted | Pushed::TokenGone | Pushed::Missing | Pushed::Refused { .. } => lane.is_well(),
            }
            let fate = self.attempts.fate(leased.job, &pushed, self.config.notifications.visibility_timeout);
            self.metrics.pushes.increment((lane.name, pushed.outcome(lane.is_real(), fate == Fate::Done)));
            let fate = match fate {
                Fate::Done if pushed == Pushed::TokenGone => {
                    match self.janitor.take(candidate.device, candidate.target.token()) {
                        true => Fate::Done,
                        false => Fate::Later(self.config.notifications.visibility_timeout),
                    }
                }
                Fate::Done => {
                    unheard += u32::from(!lane.is_real());
                    sent.push((candidate.device, candidate.target.token().to_owned(), candidate.newest));
                    if leased.job.reason == Reason::Keys {
                        self.store.record_prekeys_push(candidate.device, now).await?;
                    }
                    Fate::Done
                }
                later => later,
            };
            settled.push((leased, fate));
        }
        if unheard > 0 {
            info!(count = unheard, "devices were to be woken, and there is no provider for them");
        }
        if !sent.is_empty() {
            self.store.record_pushes(&sent, now).await?;
        }
        self.store.mark_push_targets(&missing, Some(now)).await?;
        self.store.mark_push_targets(&known, None).await?;
        self.end(settled).await
    }

    /// Ends leases. Mail that came while a job was leased found it in the queue, so whoever is done is looked at once
    /// more after it has left.
    async fn end(&mut self, settled: Vec<(Leased, Fate)>) -> Result<(), Trouble> {
        self.queue.settle(&settled).await?;
        let done = settled.iter().filter(|(leased, fate)| *fate == Fate::Done && leased.job.reason == Reason::Mail);
        let push_candidates = self.push_candidates(done.map(|(leased, _)| leased.job)).await?;
        let now = self.clock.latest();
        for candidate in push_candidates.into_values() {
            if let Some(since) = candidate.waiting_since {
                let job = Job { device: candidate.device, reason: Reason::Mail };
                self.outbox.add([job], Instant::now() + self.wait(since, now));
            }
        }
        Ok(())
    }

    async fn push_candidates(
        &self,
        jobs: impl Iterator<Item = Job>,
    ) -> Result<HashMap<DeviceNo, PushCandidate>, StoreError> {
        let mut devices: Vec<_> = jobs.map(|job| job.device).collect();
        devices.sort_unstable();
        devices.dedup();
        if devices.is_empty() {
            return Ok(HashMap::new());
        }
        let push_candidates = self.store.push_candidates(&devices, self.clock.now()).await?;
        Ok(push_candidates.into_iter().map(|candidate| (candidate.device, candidate)).collect())
    }

    /// Says once that something is away, and once that it is back.
    fn tell(&mut self, round: Result<(), Trouble>) {
        self.metrics.push_queue_connected.set((), i64::from(round.is_ok()));
        match round {
            Ok(()) if self.is_outage_told => {
                self.is_outage_told = false;
                info!("pushes go on");
            }
            Ok(()) => {}
            Err(error) if self.is_outage_told => debug!(%error, "pushes still wait"),
            Err(error) => {
                self.is_outage_told = true;
                warn!(%error, "pushes wait until it is back");
            }
        }
    }
}

/// What the answer comes to, given how long the target has been unknown to its provider. Targets that are unknown for the first
/// time, or known again, are added to the lists.
fn judged(
    pushed: Pushed,
    candidate: &PushCandidate,
    now: Timestamp,
    missing: &mut Vec<(DeviceNo, String)>,
    known: &mut Vec<(DeviceNo, String)>,
) -> Pushed {
    let target = || (candidate.device, candidate.target.token().to_owned());
    match (&pushed, candidate.missing_since) {
        (Pushed::Missing, Some(since)) if since + MISSING_FOR <= now => return Pushed::TokenGone,
        (Pushed::Missing, None) => missing.push(target()),
        (Pushed::Accepted, Some(_)) => known.push(target()),
        _ => {}
    }
    pushed
}
