//! The worker: leases devices that are due, asks the store whether they are still to be woken, hands them to their
//! providers, and settles what came of it.

mod dispatch;

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
use crate::push::pending_pushes::PendingPushes;
use crate::push::provider_client::ProviderClients;
use crate::push::providers::PushResult;
use crate::push::queue::{Job, JobOutcome, Leased, Queue, QueueError, Reason};
use crate::push::refusals::Refusals;
use crate::push::waiting_jobs::WaitingJobs;
use crate::store::{PushCandidate, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::{Metrics, PushStatus};
use crate::telemetry::traces::Traces;

/// Sessions that have ended and are looked at together.
const ENDED_BATCH: usize = 500;
/// A subscription is deleted when its service has not known it for this time.
const MISSING_GRACE: Duration = Duration::from_hours(12);
/// How often the length of the queue is looked at.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);
/// At shutdown, so much time for the pushes under way. What is not settled then is found in the inboxes again.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// What can go wrong in a round.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A push that was tried.
struct FinishedPush {
    leased: Leased,
    candidate: PushCandidate,
    pushed: PushResult,
}

pub(super) struct Worker {
    queue: Queue,
    pending: Arc<PendingPushes>,
    clients: Arc<ProviderClients>,
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
    waiting: WaitingJobs,
    finished: (mpsc::Sender<FinishedPush>, mpsc::Receiver<FinishedPush>),
    is_outage_logged: bool,
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
            pending: push.pending.clone(),
            clients: push.clients.clone(),
            janitor,
            store: store.clone(),
            clock: clock.clone(),
            metrics: telemetry.metrics.clone(),
            measure_at: Instant::now(),
            traces: telemetry.traces.clone(),
            // Each push under way keeps its slot until its outcome is in here.
            finished: mpsc::channel(config.notifications.worker_concurrency),
            attempts: Attempts::default(),
            refusals: Refusals::new(config.web_push.contact.is_some()),
            waiting: WaitingJobs::new(config.notifications.worker_concurrency, config.notifications.visibility_timeout),
            config: config.clone(),
            is_outage_logged: false,
        }
    }

    pub(super) async fn run(mut self, tasks: Tasks) {
        let mut ticks = interval(self.config.notifications.worker_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = tasks.stopping() => break,
                Some(finished) = self.finished.1.recv() => {
                    let recorded = self.record_results(finished).await;
                    self.log_outage(recorded);
                    // Their slots are free now.
                    let admitted = self.start_waiting(&tasks).await;
                    self.log_outage(admitted);
                }
                _ = ticks.tick() => {
                    let round = self.run_round(&tasks).await;
                    self.log_outage(round);
                }
            }
        }
        if timeout(SHUTDOWN_GRACE, self.shut_down()).await.is_err() {
            debug!("some pushes were not settled before the end");
        }
    }

    /// Who is connected elsewhere when the server stops comes back, and who doesn't is woken.
    async fn shut_down(&mut self) {
        let ended = self.requeue_ended_sessions().await;
        self.log_outage(ended);
        let flushed = self.flush().await;
        self.log_outage(flushed.map_err(RoundError::from));
        let given_up = self
            .waiting
            .take_all()
            .into_iter()
            .map(|leased| (leased, JobOutcome::RetryAfter(Duration::ZERO)))
            .collect();
        let given_back = self.end_leases(given_up).await;
        self.log_outage(given_back);
        let (closed, _) = mpsc::channel(1);
        // Ends when all that are under way have said what came of them.
        self.finished.0 = closed;
        while let Some(finished) = self.finished.1.recv().await {
            let recorded = self.record_results(finished).await;
            self.log_outage(recorded);
        }
    }

    /// Takes in what is new, and starts what is due.
    async fn run_round(&mut self, tasks: &Tasks) -> Result<(), RoundError> {
        self.requeue_ended_sessions().await?;
        self.flush().await?;
        if self.measure_at <= Instant::now() {
            self.measure_at = Instant::now() + MEASURE_INTERVAL;
            self.metrics.push_queue.set((), self.queue.length().await?);
        }
        self.start_waiting(tasks).await?;
        let limit = self.config.notifications.worker_concurrency;
        loop {
            let since = Instant::now();
            let leased = self.queue.lease(limit, self.config.notifications.visibility_timeout).await?;
            let is_full = leased.len() >= limit;
            self.dispatch(leased, since, tasks).await?;
            if !is_full || tasks.is_stopping() {
                return Ok(());
            }
            while let Ok(finished) = self.finished.1.try_recv() {
                self.record_results(finished).await?;
            }
            self.start_waiting(tasks).await?;
        }
    }

    async fn flush(&mut self) -> Result<(), QueueError> {
        let jobs = self.pending.take_jobs();
        if jobs.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let due: Vec<_> = jobs.iter().map(|(job, due)| (*job, due.saturating_duration_since(now))).collect();
        self.queue.schedule(&due).await.inspect_err(|_| self.pending.requeue(jobs))
    }

    /// A device whose socket has died with mail left is to be woken again, though it was woken for that mail before.
    async fn requeue_ended_sessions(&mut self) -> Result<(), RoundError> {
        loop {
            let ended = self.pending.take_ended(ENDED_BATCH);
            if ended.is_empty() {
                return Ok(());
            }
            match self.store.reset_pushes(&ended).await {
                Ok(left) => {
                    let jobs = left.into_iter().map(|device| Job { device, reason: Reason::NewMessages });
                    self.pending.add(jobs, Instant::now() + self.config.notifications.push_delay);
                }
                Err(error) => {
                    ended.into_iter().for_each(|device| self.pending.ended(device));
                    return Err(error.into());
                }
            }
        }
    }

    /// Settles this push, and all that have come to an end with it.
    async fn record_results(&mut self, first: FinishedPush) -> Result<(), RoundError> {
        let mut all = vec![first];
        while let Ok(finished) = self.finished.1.try_recv() {
            all.push(finished);
        }
        let now = self.clock.now();
        let (mut finished_leases, mut sent) = (Vec::new(), Vec::new());
        let (mut unsent, mut missing, mut known) = (0, Vec::new(), Vec::new());
        for FinishedPush { leased, candidate, pushed } in all {
            let client = self.clients.of(&candidate.target).clone();
            if let Some(status) = pushed.refused_with() {
                self.metrics.push_refusals.increment((client.name, PushStatus::of(status)));
                self.refusals.log(&candidate.target, status);
            }
            let pushed = classified(pushed, &candidate, now, &mut missing, &mut known);
            match &pushed {
                PushResult::Unavailable { cause, retry_after } => {
                    client.record_failure(*cause, *retry_after, self.config.notifications.visibility_timeout);
                }
                // Or a single made-up token would end the pause of a provider that is away.
                PushResult::InvalidTarget => {}
                PushResult::Accepted | PushResult::TokenGone | PushResult::Missing | PushResult::Refused { .. } => {
                    client.record_success()
                }
            }
            let outcome = self.attempts.outcome(leased.job, &pushed, self.config.notifications.visibility_timeout);
            self.metrics
                .pushes
                .increment((client.name, pushed.outcome(client.is_configured(), outcome == JobOutcome::Done)));
            let outcome = match outcome {
                JobOutcome::Done if pushed == PushResult::TokenGone => {
                    match self.janitor.submit(candidate.device, candidate.target.token()) {
                        true => JobOutcome::Done,
                        false => JobOutcome::RetryAfter(self.config.notifications.visibility_timeout),
                    }
                }
                JobOutcome::Done => {
                    unsent += u32::from(!client.is_configured());
                    sent.push((candidate.device, candidate.target.token().to_owned(), candidate.newest));
                    if leased.job.reason == Reason::Keys {
                        self.store.record_prekeys_push(candidate.device, now).await?;
                    }
                    JobOutcome::Done
                }
                later => later,
            };
            finished_leases.push((leased, outcome));
        }
        if unsent > 0 {
            info!(count = unsent, "devices were to be woken, and there is no provider for them");
        }
        if !sent.is_empty() {
            self.store.record_pushes(&sent, now).await?;
        }
        self.store.mark_push_targets(&missing, Some(now)).await?;
        self.store.mark_push_targets(&known, None).await?;
        self.end_leases(finished_leases).await
    }

    /// Ends leases. Mail that came while a job was leased found it in the queue, so a device that is done is looked at once
    /// more after it has left.
    async fn end_leases(&mut self, finished_leases: Vec<(Leased, JobOutcome)>) -> Result<(), RoundError> {
        self.queue.finish(&finished_leases).await?;
        let done = finished_leases
            .iter()
            .filter(|(leased, outcome)| *outcome == JobOutcome::Done && leased.job.reason == Reason::NewMessages);
        let push_candidates = self.push_candidates(done.map(|(leased, _)| leased.job)).await?;
        let now = self.clock.latest();
        for candidate in push_candidates.into_values() {
            if let Some(since) = candidate.waiting_since {
                let job = Job { device: candidate.device, reason: Reason::NewMessages };
                self.pending.add([job], Instant::now() + self.wait(since, now));
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
    fn log_outage(&mut self, round: Result<(), RoundError>) {
        self.metrics.push_queue_connected.set((), i64::from(round.is_ok()));
        match round {
            Ok(()) if self.is_outage_logged => {
                self.is_outage_logged = false;
                info!("pushes go on");
            }
            Ok(()) => {}
            Err(error) if self.is_outage_logged => debug!(%error, "pushes still wait"),
            Err(error) => {
                self.is_outage_logged = true;
                warn!(%error, "pushes wait until it is back");
            }
        }
    }
}

/// What the answer comes to, given how long the target has been unknown to its provider. Targets that are unknown for the first
/// time, or known again, are added to the lists.
fn classified(
    pushed: PushResult,
    candidate: &PushCandidate,
    now: Timestamp,
    missing: &mut Vec<(DeviceNo, String)>,
    known: &mut Vec<(DeviceNo, String)>,
) -> PushResult {
    let target = || (candidate.device, candidate.target.token().to_owned());
    match (&pushed, candidate.missing_since) {
        (PushResult::Missing, Some(since)) if since + MISSING_GRACE <= now => return PushResult::TokenGone,
        (PushResult::Missing, None) => missing.push(target()),
        (PushResult::Accepted, Some(_)) => known.push(target()),
        _ => {}
    }
    pushed
}
