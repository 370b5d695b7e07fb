//! What is looked at now and then for the metrics: the process, the pools, and what the database holds.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::app::App;
use crate::store::{Inventory, Store, StoreError};
use crate::sweeps::every;
use crate::tasks::Round;
use crate::telemetry::metrics::process::Used;
use crate::telemetry::metrics::{Job, Use};

/// How often the process and the pools are looked at.
const STATS_INTERVAL: Duration = Duration::from_secs(5);
/// How often the database is asked what it holds.
const INVENTORY_INTERVAL: Duration = Duration::from_mins(1);

/// Looks at once, and then again and again.
pub(super) async fn start(app: &App) {
    let since = Instant::now();
    app.metrics.start_time.set((), app.clock.wall().seconds());
    let _ = collect_stats(app.clone(), since).await;
    every(app, Job::Figures, STATS_INTERVAL, move |app| collect_stats(app, since));
    every(app, Job::Inventory, INVENTORY_INTERVAL, inventory);
}

async fn collect_stats(app: App, since: Instant) -> Result<Round, StoreError> {
    let (metrics, store) = (&app.metrics, app.store.clone());
    metrics.uptime.set((), since.elapsed().as_secs());
    let runtime = Handle::current().metrics();
    metrics.runtime_workers.set((), runtime.num_workers());
    metrics.runtime_tasks.set((), runtime.num_alive_tasks());
    metrics.runtime_queue.set((), runtime.global_queue_depth());
    // It asks the system for files.
    let looked = tokio::task::spawn_blocking(move || (Used::now(), store.stats())).await;
    let Ok((used, database)) = looked else { return Ok(Round::Done) };
    if let Some(used) = used {
        metrics.process(&used);
    }
    for (pool, used, idle) in database.connections {
        metrics.pool.set((pool, Use::Used), used);
        metrics.pool.set((pool, Use::Idle), idle);
    }
    if let Some((file, wal)) = database.files {
        metrics.sqlite_file.set((), file);
        metrics.sqlite_wal.set((), wal);
    }
    Ok(Round::Done)
}

/// Each node would count the same, so one does it, and the others show nothing: a node doesn't know who counts.
async fn inventory(app: App) -> Result<Round, StoreError> {
    let (metrics, now) = (&app.metrics, app.clock.now());
    let is_ours = app.store.claim_job(Job::Inventory.text(), INVENTORY_INTERVAL.mul_f64(0.8), now).await?;
    if !is_ours {
        for gauge in metrics.inventory() {
            gauge.unset(());
        }
        return Ok(Round::Done);
    }
    let (held, size) = match counted(&app.store).await {
        Ok(counted) => counted,
        Err(error) => {
            // The next node that tries may do it.
            let _ = app.store.release_job(Job::Inventory.text(), now).await;
            return Err(error);
        }
    };
    let age = if held.messages > 0 { (now.millis() - held.oldest).max(0) / 1000 } else { 0 };
    metrics.users.set((), held.users);
    metrics.devices.set((), held.devices);
    metrics.queued.set((), held.messages);
    metrics.queued_bytes.set((), held.messages.saturating_mul(held.message_bytes));
    metrics.oldest.set((), age);
    metrics.attachments.set((), held.attachments);
    metrics.attachment_bytes.set((), held.attachment_bytes);
    metrics.push_tokens.set((), held.push_tokens);
    metrics.database_size.set((), size);
    Ok(Round::Done)
}

async fn counted(store: &Store) -> Result<(Inventory, u64), StoreError> {
    Ok((store.inventory().await?, store.size().await?))
}
