//! Repeated jobs: cleaning, and figures that have to be looked at. Each works in bounded steps, so that a long clean-up never
//! holds the database for long.

mod accounts;
mod attachments;
mod clock;
mod files;
mod stats;

use std::fmt::Display;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::app::App;
use crate::clock::Moment;
use crate::disk::{DiskSpace, reserve};
use crate::model::ids::DeviceNo;
use crate::store::{Leftovers, REPEAT_WINDOW, StoreError};
use crate::sweeps::attachments::SweepCursor;
use crate::tasks::Round;
use crate::telemetry::metrics::Job;

pub use crate::sweeps::files::check_files;

/// Rows that one step deletes.
const STEP: u32 = 500;
/// Pages that one step gives back to the file system: 4 MiB.
const RECLAIM_PAGES: u32 = 1000;
/// How often secrets that live for minutes at most are cleaned up.
const SHORT_LIVED: Duration = Duration::from_mins(1);
/// How often the seconds in which access tokens have expired are cleared. One round looks at every device.
const REVOCATION_CLEANUP_INTERVAL: Duration = Duration::from_hours(12);
/// How often rows of devices and accounts that are gone are looked for. Each removal deletes its own, so there are few.
const LEFTOVERS: Duration = Duration::from_hours(1);
/// How often it is looked whether there is room to grow.
const DISK_SPACE_INTERVAL: Duration = Duration::from_secs(10);
/// How often idle connections to the database are looked through.
const CONNECTIONS: Duration = Duration::from_secs(15);
/// Uploads that came to nothing count in their account's quota until they are cleaned up, so that is done often.
const STALE_UPLOADS: Duration = Duration::from_mins(5);

/// Removes what the last run of the server left unfinished, then starts the repeated jobs. Call it before the first
/// request comes in: it takes every upload that is under way for an interrupted one.
pub async fn start(app: &App) {
    attachments::remove_interrupted(app).await;

    let config = &app.config;
    let messages = config.messaging.cleanup_interval;
    shared(app, Job::ExpiredMessages, messages, expired_messages);
    shared(app, Job::SendOutcomes, messages, outcomes_of_sends);
    shared(app, Job::UnusedSpace, messages, unused_space);

    let attachments = config.attachments.cleanup_interval;
    let cursor = Arc::new(SweepCursor::default());
    shared(app, Job::ExpiredAttachments, attachments, move |app| attachments::remove_expired(app, cursor.clone()));
    let cursor = Arc::new(SweepCursor::default());
    shared(app, Job::StaleUploads, attachments.min(STALE_UPLOADS), move |app| {
        attachments::remove_stale(app, cursor.clone())
    });

    shared(app, Job::UploadDebts, attachments, upload_debts);

    accounts::start(app).await;
    shared(app, Job::ExpiredSessions, config.auth.refresh_token_cleanup_interval, expired_sessions);
    shared(app, Job::ExpiredTickets, SHORT_LIVED, expired_tickets);
    shared(app, Job::UsedRefreshTokens, SHORT_LIVED, used_refresh_tokens);
    let after = Arc::new(AtomicI64::new(0));
    shared(app, Job::PastSeconds, REVOCATION_CLEANUP_INTERVAL, move |app| expired_revocations(app, after.clone()));
    shared(app, Job::ExpiredLinks, SHORT_LIVED, expired_links);
    let from = Arc::new(Mutex::new(Leftovers::START));
    shared(app, Job::Leftovers, LEFTOVERS, move |app| leftovers(app, from.clone()));
    // Before the first request as well, or a full database would grow at every start.
    if let Err(error) = check_disk_space(app.clone()).await {
        warn!(%error, "the size of the database can't be found out yet");
    }
    every(app, Job::Room, DISK_SPACE_INTERVAL, check_disk_space);
    every(app, Job::Connections, CONNECTIONS, database_connections);
    files::start(app).await;
    let watch = Arc::new(clock::begin(app).await);
    every(app, Job::Clock, clock::PERIOD, move |app| {
        let watch = watch.clone();
        async move { clock::compare(&app, &watch).await }
    });
    stats::start(app).await;
}

/// A job that one node does for all, once in a period.
fn shared<F, E>(app: &App, name: Job, period: Duration, job: impl Fn(App) -> F + Send + Sync + 'static)
where
    F: Future<Output = Result<Round, E>> + Send,
    E: Display + From<StoreError> + Send,
{
    let (job, under_way) = (Arc::new(job), Arc::new(AtomicBool::new(false)));
    let span = format!("sweep.{}", name.text().replace(' ', "_"));
    every(app, name, period, move |app| {
        let (job, under_way, span) = (job.clone(), under_way.clone(), span.clone());
        async move {
            // Shorter than the shortest pause between two rounds, or we would find our own claim in the way.
            let claimed_for = period.mul_f64(0.8);
            let is_ours = under_way.load(Ordering::Relaxed)
                || app.store.claim_job(name.text(), claimed_for, app.clock.now()).await?;
            if !is_ours {
                return Ok(Round::Done);
            }
            let round = app.traces.begin(span).attempt(job(app.clone())).await;
            if round.is_err() {
                // The next node that tries may do it. If this fails too, the claim runs out.
                let _ = app.store.release_job(name.text(), app.clock.now()).await;
            }
            under_way.store(matches!(round, Ok(Round::More)), Ordering::Relaxed);
            round
        }
    });
}

fn every<F, E>(app: &App, name: Job, period: Duration, job: impl Fn(App) -> F + Send + 'static)
where
    F: Future<Output = Result<Round, E>> + Send,
    E: Display,
{
    let own = app.clone();
    app.tasks.every(name.text(), period, move || {
        let (app, round) = (own.clone(), job(own.clone()));
        async move {
            let ended = round.await;
            app.metrics.job_ended(name, ended.is_ok(), app.clock.wall().seconds());
            ended
        }
    });
}

async fn expired_messages(app: App) -> Result<Round, StoreError> {
    let expired = app.store.expire_messages(app.clock.earliest(), app.clock.latest(), STEP).await?;
    if expired.deleted > 0 {
        info!(count = expired.deleted, "expired messages");
    }
    Ok(if expired.more { Round::More } else { Round::Done })
}

async fn outcomes_of_sends(app: App) -> Result<Round, StoreError> {
    let now = app.clock.moment();
    let outcomes = app.store.expire_sends(now, STEP).await?;
    let debts = app.store.expire_send_debts(now, STEP).await?;
    Ok(round(outcomes.max(debts)))
}

async fn unused_space(app: App) -> Result<Round, StoreError> {
    Ok(if app.store.reclaim(RECLAIM_PAGES).await? { Round::More } else { Round::Done })
}

async fn check_disk_space(app: App) -> Result<Round, StoreError> {
    if app.disk.bounds_database() {
        app.disk.database_has(app.store.size().await?);
    }
    app.disk.log_space();
    app.metrics.room.set((), app.disk.space() as i64);
    if let Some(free) = app.disk.free_bytes() {
        app.metrics.disk_free.set((), free);
    }
    if let Some(free) = app.disk.free_inodes() {
        app.metrics.disk_free_inodes.set((), free);
    }
    hold_reserve(&app).await;
    Ok(Round::Done)
}

/// Makes the reserve for the next start, while there is room for it.
async fn hold_reserve(app: &App) {
    let keep_free = app.config.disk_reserve_bytes;
    let Some(file) = app.config.database.file().map(Path::to_owned) else { return };
    if keep_free == 0 || app.disk.space() != DiskSpace::Enough {
        return;
    }
    // Usually only a few looks at the file system.
    let held = tokio::task::spawn_blocking(move || reserve::create(&file, keep_free)).await;
    if let Ok(Err(error)) = held {
        debug!(%error, "nothing could be held back on the disk for the next start");
    }
}

async fn database_connections(app: App) -> Result<Round, StoreError> {
    app.store.maintain_connections().await?;
    Ok(Round::Done)
}

async fn upload_debts(app: App) -> Result<Round, StoreError> {
    let now = Moment { earliest: app.clock.now(), latest: app.clock.latest() };
    app.store.expire_upload_debts(now, STEP).await.map(round)
}

async fn expired_sessions(app: App) -> Result<Round, StoreError> {
    let longest = app.tokens.refresh_expiry(app.clock.latest());
    app.store.expire_sessions(app.clock.earliest(), longest, STEP).await.map(round)
}

async fn expired_tickets(app: App) -> Result<Round, StoreError> {
    app.store.expire_tickets(app.clock.now(), STEP).await.map(round)
}

async fn used_refresh_tokens(app: App) -> Result<Round, StoreError> {
    app.store.expire_refresh_uses(app.clock.now() - REPEAT_WINDOW, STEP).await.map(round)
}

async fn expired_revocations(app: App, after: Arc<AtomicI64>) -> Result<Round, StoreError> {
    let from = DeviceNo(after.load(Ordering::Relaxed));
    let last = app.store.clear_expired_revocations(from, app.clock.earliest(), STEP).await?;
    after.store(last.map_or(0, |device| device.0), Ordering::Relaxed);
    Ok(last.map_or(Round::Done, |_| Round::More))
}

async fn expired_links(app: App) -> Result<Round, StoreError> {
    app.store.expire_links(app.clock.now(), STEP).await.map(round)
}

async fn leftovers(app: App, cursor: Arc<Mutex<Leftovers>>) -> Result<Round, StoreError> {
    let from = *cursor.lock().unwrap_or_else(PoisonError::into_inner);
    let next = app.store.forget_leftovers(from, STEP).await?;
    *cursor.lock().unwrap_or_else(PoisonError::into_inner) = next.unwrap_or(Leftovers::START);
    Ok(next.map_or(Round::Done, |_| Round::More))
}

/// A full step may have left something.
fn round(rows: u64) -> Round {
    if rows >= u64::from(STEP) { Round::More } else { Round::Done }
}
