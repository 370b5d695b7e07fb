//! The worker: leases devices that are due, asks the store whether they are still to be woken, hands them to their
//! providers, and settles what came of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, info, warn};

use crate::clock::Clock;
use crate::config::Config;
use crate::model::ids::DeviceNo;
use crate::push::Push;
use crate::push::janitor::Janitor;
use crate::push::lane::{Blocked, Lanes};
use crate::push::outbox::Outbox;
use crate::push::providers::Pushed;
use crate::push::queue::{Fate, Job, Leased, Queue, QueueError, Reason};
use crate::store::{Sleeper, Store, StoreError};
use crate::tasks::{Tasks, jittered};
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;

/// Sessions that have ended and are looked at together.
const ENDED: usize = 500;
/// The longest time that one push may take, whatever it needs for that.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest pause between two attempts for one device.
const LONGEST_RETRY: Duration = Duration::from_hours(1);
/// After so many attempts a device is left alone until there is newer mail, or a day has passed.
const ATTEMPTS: u32 = 10;
/// Devices whose failed attempts are counted.
const COUNTED: usize = 10_000;
/// A second reason to wake a device that is just being woken waits for so long.
const BEHIND_ANOTHER: Duration = Duration::from_secs(2);
/// A device whose provider has no slot free waits for so many looks, so that those behind it get their turn.
const WHILE_FULL: u32 = 3;
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
    sleeper: Sleeper,
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
    /// Failed attempts in a row, since this node started.
    attempts: HashMap<Job, u32>,
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
            config: config.clone(),
            attempts: HashMap::new(),
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
        let limit = self.config.notifications.worker_concurrency;
        loop {
            let leased = self.queue.lease(limit, self.config.notifications.visibility_timeout).await?;
            let is_full = leased.len() >= limit;
            self.judge(leased, tasks).await?;
            if !is_full || tasks.is_stopping() {
                return Ok(());
            }
            while let Ok(tried) = self.tried.1.try_recv() {
                self.settle(tried).await?;
            }
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
            match self.store.forget_pushes(&ended).await {
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

    /// Decides for each device whether it is to be woken, and starts that.
    async fn judge(&mut self, leased: Vec<Leased>, tasks: &Tasks) -> Result<(), Trouble> {
        if leased.is_empty() {
            return Ok(());
        }
        let now = self.clock.latest();
        let sleepers = self.sleepers(leased.iter().map(|leased| leased.job)).await?;
        let (mut settled, mut woken) = (Vec::new(), HashSet::new());
        for leased in leased {
            let job = leased.job;
            let Some(sleeper) = sleepers.get(&job.device) else {
                settled.push((leased, Fate::Done));
                continue;
            };
            let wait = match job.reason {
                Reason::Mail => sleeper.waiting_since.map(|since| self.wait(since, now)),
                Reason::Keys => self.has_few_keys(sleeper).await?.then_some(Duration::ZERO),
            };
            let fate = match wait {
                None => Fate::Done,
                Some(wait) if !wait.is_zero() => Fate::Later(wait),
                Some(_) if !woken.insert(job.device) => Fate::Later(BEHIND_ANOTHER),
                Some(_) => match self.start(leased, sleeper.clone(), tasks) {
                    Ok(()) => continue,
                    Err(Blocked::Paused(pause)) => Fate::Later(pause + jittered(Duration::from_secs(1))),
                    Err(Blocked::Full) => Fate::Later(jittered(WHILE_FULL * self.config.notifications.worker_interval)),
                },
            };
            settled.push((leased, fate));
        }
        self.end(settled).await
    }

    /// How long mail that came at `since` still has to be fetched. A clock that was wrong then makes nobody wait longer.
    fn wait(&self, since: crate::clock::Timestamp, now: crate::clock::Timestamp) -> Duration {
        let grace = self.config.notifications.push_delay;
        (since + grace).since_epoch().saturating_sub(now.since_epoch()).min(grace)
    }

    async fn has_few_keys(&self, sleeper: &Sleeper) -> Result<bool, StoreError> {
        if !sleeper.may_hear_of_keys {
            return Ok(false);
        }
        let counts = self.store.prekey_counts(sleeper.device).await?;
        Ok(counts.is_some_and(|counts| counts.is_below(self.config.prekeys.refill_threshold)))
    }

    fn start(&self, leased: Leased, sleeper: Sleeper, tasks: &Tasks) -> Result<(), Blocked> {
        let lane = self.lanes.of(&sleeper.target).clone();
        let slot = lane.enter(&sleeper.target)?;
        // Over before the lease is, so that nobody else begins with the same push.
        let patience = PATIENCE.min(self.config.notifications.visibility_timeout.mul_f64(0.8));
        let (tried, stopping, metrics) = (self.tried.0.clone(), tasks.clone(), self.metrics.clone());
        let span = self.traces.begin_call("push.send");
        span.set("obscura.push.provider", lane.name.text());
        tasks.attend(async move {
            let last_words = async {
                stopping.stopping().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            let start = Instant::now();
            let pushed = tokio::select! {
                pushed = span.run(lane.provider.push(&sleeper.target, patience)) => pushed,
                () = last_words => return,
            };
            metrics.push_time.time(lane.name, start.elapsed());
            span.set("obscura.push.outcome", pushed.name());
            drop(span);
            // Fails only when the worker has ended.
            let _ = tried.send(Tried { leased, sleeper, pushed }).await;
            drop(slot);
        });
        Ok(())
    }

    /// Settles this push, and all that have come to an end with it.
    async fn settle(&mut self, first: Tried) -> Result<(), Trouble> {
        let mut all = vec![first];
        while let Ok(tried) = self.tried.1.try_recv() {
            all.push(tried);
        }
        let now = self.clock.now();
        let (mut settled, mut sent) = (Vec::new(), Vec::new());
        let mut unheard = 0;
        for Tried { leased, sleeper, pushed } in all {
            let lane = self.lanes.of(&sleeper.target).clone();
            match &pushed {
                Pushed::Unavailable { cause, retry_after } => {
                    lane.has_failed(*cause, *retry_after, self.config.notifications.visibility_timeout);
                }
                // Or a single made-up token would end the pause of a provider that is away.
                Pushed::Unfit => {}
                Pushed::Accepted | Pushed::TokenGone | Pushed::Refused { .. } => lane.is_well(),
            }
            let fate = self.fate(leased.job, &pushed);
            self.metrics.pushes.one((lane.name, pushed.outcome(lane.is_real(), fate == Fate::Done)));
            let fate = match fate {
                Fate::Done if pushed == Pushed::TokenGone => {
                    match self.janitor.take(sleeper.device, sleeper.target.token()) {
                        true => Fate::Done,
                        false => Fate::Later(self.config.notifications.visibility_timeout),
                    }
                }
                Fate::Done => {
                    unheard += u32::from(!lane.is_real());
                    sent.push((sleeper.device, sleeper.newest));
                    if leased.job.reason == Reason::Keys {
                        self.store.remember_keys_push(sleeper.device, now).await?;
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
            self.store.remember_pushes(&sent, now).await?;
        }
        self.end(settled).await
    }

    /// What becomes of a job after an attempt.
    fn fate(&mut self, job: Job, pushed: &Pushed) -> Fate {
        let visibility = self.config.notifications.visibility_timeout;
        match pushed {
            Pushed::Accepted | Pushed::TokenGone => {
                self.attempts.remove(&job);
                Fate::Done
            }
            // It says nothing about the device, so it isn't counted.
            Pushed::Unavailable { .. } => Fate::Later(jittered(visibility).max(pushed.asked_to_wait())),
            Pushed::Refused { .. } | Pushed::Unfit => {
                if self.attempts.len() >= COUNTED {
                    self.attempts.clear();
                }
                let attempts = self.attempts.entry(job).or_default();
                *attempts += 1;
                let failed = *attempts;
                if failed >= ATTEMPTS {
                    self.attempts.remove(&job);
                    debug!("a device could not be woken, and is left alone for now");
                    return Fate::Done;
                }
                let pause = visibility.saturating_mul(1 << (failed - 1).min(16)).min(LONGEST_RETRY);
                Fate::Later(jittered(pause).max(pushed.asked_to_wait()))
            }
        }
    }

    /// Ends leases. Mail that came while a job was leased found it in the queue, so whoever is done is looked at once
    /// more after it has left.
    async fn end(&mut self, settled: Vec<(Leased, Fate)>) -> Result<(), Trouble> {
        self.queue.settle(&settled).await?;
        let done = settled.iter().filter(|(leased, fate)| *fate == Fate::Done && leased.job.reason == Reason::Mail);
        let sleepers = self.sleepers(done.map(|(leased, _)| leased.job)).await?;
        let now = self.clock.latest();
        for sleeper in sleepers.into_values() {
            if let Some(since) = sleeper.waiting_since {
                let job = Job { device: sleeper.device, reason: Reason::Mail };
                self.outbox.add([job], Instant::now() + self.wait(since, now));
            }
        }
        Ok(())
    }

    async fn sleepers(&self, jobs: impl Iterator<Item = Job>) -> Result<HashMap<DeviceNo, Sleeper>, StoreError> {
        let mut devices: Vec<_> = jobs.map(|job| job.device).collect();
        devices.sort_unstable();
        devices.dedup();
        if devices.is_empty() {
            return Ok(HashMap::new());
        }
        let sleepers = self.store.sleepers(&devices, self.clock.now()).await?;
        Ok(sleepers.into_iter().map(|sleeper| (sleeper.device, sleeper)).collect())
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
