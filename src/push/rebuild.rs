//! Rebuilds the push queue from the inboxes: whatever was lost, be it Valkey, a node or a full list of pending pushes, costs time and
//! never a push. One node does it for all.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::time::Instant;
use tracing::debug;

use crate::clock::Clock;
use crate::config::Notifications;
use crate::model::ids::DeviceNo;
use crate::push::pending_pushes::PendingPushes;
use crate::push::queue::{Job, Reason};
use crate::store::{Result, Store};
use crate::tasks::{Round, Tasks};
use crate::telemetry::metrics::{Job as JobName, Metrics};

/// Devices that one step looks at.
const STEP: u32 = 500;
const START: i64 = 0;

pub(super) fn start(
    pending: Arc<PendingPushes>,
    config: &Notifications,
    store: Store,
    (clock, metrics): (Clock, Metrics),
    tasks: &Tasks,
) {
    let (period, grace) = (config.gc_interval, config.push_delay);
    let cursor = Arc::new(AtomicI64::new(START));
    let name = JobName::PushQueue;
    tasks.every(name.text(), period, move || {
        let (pending, store, clock, cursor) = (pending.clone(), store.clone(), clock.clone(), cursor.clone());
        let (now, latest, metrics) = (clock.now(), clock.latest(), metrics.clone());
        let round = async move {
            let from = cursor.load(Ordering::Relaxed);
            // Shorter than the shortest pause between two rounds, or we would find our own claim in the way.
            let is_ours = from != START || store.claim_job(name.text(), period.mul_f64(0.8), now).await?;
            if !is_ours {
                return Result::Ok(Round::Done);
            }
            let found = store.overdue_for_push(DeviceNo(from), latest - grace, now, STEP).await?;
            if !found.devices.is_empty() {
                debug!(count = found.devices.len(), "devices that should have been pushed to");
            }
            let jobs = found.devices.into_iter().map(|device| Job { device, reason: Reason::NewMessages });
            pending.add(jobs, Instant::now());
            cursor.store(found.next.map_or(START, |next| next.0), Ordering::Relaxed);
            Ok(if found.next.is_some() { Round::More } else { Round::Done })
        };
        async move {
            let ended = round.await;
            metrics.job_ended(name, ended.is_ok(), now.seconds());
            ended
        }
    });
}
