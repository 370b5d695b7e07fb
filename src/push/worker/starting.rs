//! Which of the leased devices are woken now, and the start of their pushes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::model::ids::DeviceNo;
use crate::push::lane::{Blocked, Slot};
use crate::push::queue::{Fate, Job, Leased, Reason};
use crate::push::waiting::{Admitted, Waits};
use crate::push::worker::{LAST_WORDS, Tried, Trouble, Worker};
use crate::store::{PushCandidate, StoreError};
use crate::tasks::{Tasks, jittered};

/// The longest time that one push may take in all.
const PATIENCE: Duration = Duration::from_secs(15);
/// A second reason to wake a device that is just being woken waits for this time.
const BEHIND_ANOTHER: Duration = Duration::from_secs(2);
/// A device for which there is neither a slot nor a place to wait for one is due again after this many looks, so that others
/// get their turn.
const WHILE_FULL: u32 = 3;

impl Worker {
    /// Decides for each device whether it is to be woken, and starts that. They were leased at `since` or later.
    pub(super) async fn judge(&mut self, leased: Vec<Leased>, since: Instant, tasks: &Tasks) -> Result<(), Trouble> {
        if leased.is_empty() {
            return Ok(());
        }
        let push_candidates = self.push_candidates(leased.iter().map(|leased| leased.job)).await?;
        let (mut settled, mut woken) = (Vec::new(), HashSet::new());
        for leased in leased {
            if let Some(fate) = self.early_fate(leased.job, &push_candidates, &mut woken).await? {
                settled.push((leased, fate));
                continue;
            }
            let candidate = push_candidates[&leased.job.device].clone();
            let lane = self.lanes.of(&candidate.target).clone();
            let fate = match lane.enter(&candidate.target) {
                Ok(slot) => {
                    self.start(leased, since, candidate, slot, tasks);
                    continue;
                }
                Err(Blocked::Paused(pause)) => (leased, paused(pause)),
                Err(Blocked::Full) => match self.waiting.add(Waits { leased, since, target: candidate.target }) {
                    Ok(()) => continue,
                    Err(leased) => (leased, self.put_off()),
                },
            };
            settled.push(fate);
        }
        self.end(settled).await
    }

    /// Starts those that have waited for a slot and have one now. They are looked at again: their mail may have been fetched.
    pub(super) async fn admit(&mut self, tasks: &Tasks) -> Result<(), Trouble> {
        let Admitted { started, late, paused: alone } = self.waiting.admit(&self.lanes);
        let mut settled: Vec<_> = late.into_iter().map(|leased| (leased, self.put_off())).collect();
        settled.extend(alone.into_iter().map(|(leased, pause)| (leased, paused(pause))));
        let push_candidates = self.push_candidates(started.iter().map(|(waits, _)| waits.leased.job)).await?;
        let mut woken = HashSet::new();
        for (Waits { leased, since, target }, slot) in started {
            match self.early_fate(leased.job, &push_candidates, &mut woken).await? {
                Some(fate) => settled.push((leased, fate)),
                // Another target needs another slot.
                None if push_candidates[&leased.job.device].target != target => {
                    settled.push((leased, Fate::Later(Duration::ZERO)));
                }
                None => self.start(leased, since, push_candidates[&leased.job.device].clone(), slot, tasks),
            }
        }
        if settled.is_empty() { Ok(()) } else { self.end(settled).await }
    }

    /// What happens to a job that is not to be pushed now; `None` when it is. `woken` are the devices that are being woken.
    async fn early_fate(
        &self,
        job: Job,
        push_candidates: &HashMap<DeviceNo, PushCandidate>,
        woken: &mut HashSet<DeviceNo>,
    ) -> Result<Option<Fate>, StoreError> {
        let Some(candidate) = push_candidates.get(&job.device) else { return Ok(Some(Fate::Done)) };
        let wait = match job.reason {
            Reason::Mail => candidate.waiting_since.map(|since| self.wait(since, self.clock.latest())),
            Reason::Keys => self.has_few_keys(candidate).await?.then_some(Duration::ZERO),
        };
        Ok(match wait {
            None => Some(Fate::Done),
            Some(wait) if !wait.is_zero() => Some(Fate::Later(wait)),
            Some(_) if !woken.insert(job.device) => Some(Fate::Later(BEHIND_ANOTHER)),
            Some(_) => None,
        })
    }

    fn put_off(&self) -> Fate {
        Fate::Later(jittered(WHILE_FULL * self.config.notifications.worker_interval))
    }

    /// How long mail that came at `since` may still be fetched before a push. A wrong time doesn't make that longer.
    pub(super) fn wait(&self, since: Timestamp, now: Timestamp) -> Duration {
        let grace = self.config.notifications.push_delay;
        (since + grace).since_epoch().saturating_sub(now.since_epoch()).min(grace)
    }

    async fn has_few_keys(&self, candidate: &PushCandidate) -> Result<bool, StoreError> {
        if !candidate.may_push_prekeys_low {
            return Ok(false);
        }
        let counts = self.store.prekey_counts(candidate.device).await?;
        Ok(counts.is_some_and(|counts| counts.is_below(self.config.prekeys.refill_threshold)))
    }

    fn start(&self, leased: Leased, since: Instant, candidate: PushCandidate, slot: Slot, tasks: &Tasks) {
        let lane = self.lanes.of(&candidate.target).clone();
        // Over before the lease is, so that no other node begins with the same push.
        let lease = self.config.notifications.visibility_timeout.mul_f64(0.8);
        let patience = PATIENCE.min(lease.saturating_sub(since.elapsed()));
        let (tried, stopping, metrics) = (self.tried.0.clone(), tasks.clone(), self.metrics.clone());
        let span = self.traces.begin_client("push.send");
        span.set("obscura.push.provider", lane.name.text());
        tasks.attend(async move {
            let last_words = async {
                stopping.stopping().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            let start = Instant::now();
            let pushed = tokio::select! {
                pushed = span.run(lane.provider.push(&candidate.target, patience)) => pushed,
                () = last_words => return,
            };
            metrics.push_time.time(lane.name, start.elapsed());
            slot.took(start.elapsed());
            span.set("obscura.push.outcome", pushed.name());
            drop(span);
            // Fails only when the worker has ended.
            let _ = tried.send(Tried { leased, candidate, pushed }).await;
            drop(slot);
        });
    }
}

/// What happens to a job whose provider is paused for this long.
fn paused(pause: Duration) -> Fate {
    Fate::Later(pause + jittered(Duration::from_secs(1)))
}
