//! Accounts that are not used any more: counts service days, records uses, and removes unused accounts.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tracing::{info, warn};

use crate::app::App;
use crate::bus::Signal;
use crate::model::ids::{Address, DeviceNo};
use crate::store::{IdleCutoffs, StoreError};
use crate::sweeps::{STEP, every, shared};
use crate::tasks::Round;
use crate::telemetry::metrics::Job;

/// How often the uses of accounts are written down.
const USES: Duration = Duration::from_secs(10);
/// How often unused accounts are looked for.
const UNUSED: Duration = Duration::from_hours(1);
/// Accounts that one step removes. Each is a transaction of its own.
const ACCOUNTS: u32 = 20;
const SECONDS_OF_A_DAY: i64 = 86_400;

/// Finds out which day it is before the first sign-up, then starts the jobs.
pub(super) async fn start(app: &App) {
    if let Err(error) = service_day(app).await {
        warn!(%error, "the database can't say yet which day it is for the use of accounts");
    }
    let hour = Arc::new(AtomicI64::new(0));
    every(app, Job::AccountUse, USES, move |app| account_use(app, hour.clone()));
    let accounts = &app.config.accounts;
    if !(accounts.idle.is_zero() && accounts.unused.is_zero()) {
        shared(app, Job::UnusedAccounts, UNUSED, unused_accounts);
    }
}

async fn service_day(app: &App) -> Result<i64, StoreError> {
    app.store.service_day(app.clock.now().seconds().div_euclid(SECONDS_OF_A_DAY)).await
}

/// Each node records the uses that it has seen itself. Open sockets count once an hour, and when the clock is set.
async fn account_use(app: App, last_hour: Arc<AtomicI64>) -> Result<Round, StoreError> {
    let hour = app.clock.now().seconds() / 3600;
    if last_hour.load(Ordering::Relaxed) != hour {
        service_day(&app).await?;
        app.store.record_device_uses(&app.bus.devices()).await?;
        last_hour.store(hour, Ordering::Relaxed);
    }
    app.store.flush_uses().await?;
    Ok(Round::Done)
}

async fn unused_accounts(app: App) -> Result<Round, StoreError> {
    let today = service_day(&app).await?;
    if app.store.date_unknown_uses(STEP).await? >= u64::from(STEP) {
        return Ok(Round::More);
    }
    // A use early on a day and one late on it look the same, so up to a day more passes than the option says.
    let before = |days: Duration| {
        let days = i64::try_from(days.as_secs()).unwrap_or(i64::MAX) / SECONDS_OF_A_DAY;
        (days > 0).then(|| today.saturating_sub(days))
    };
    let disuse = IdleCutoffs {
        used_before: before(app.config.accounts.idle),
        signed_up_before: before(app.config.accounts.unused),
    };
    let found = app.store.idle_accounts(disuse, ACCOUNTS).await?;
    let mut count = 0;
    for user in &found {
        if let Some(removed) = app.store.remove_idle_account(*user, disuse).await? {
            count += 1;
            dismiss(&app, &removed).await?;
        }
    }
    if count > 0 {
        info!(count, "removed accounts that were not used");
    }
    // Accounts that were used meanwhile are found again until their use is written, so they are no reason to go on at once.
    Ok(if count > 0 { round_of(found.len()) } else { Round::Done })
}

/// Ends sockets that may have been opened in the last moment, and deletes mail that did not fit into the transaction.
async fn dismiss(app: &App, removed: &[Address]) -> Result<(), StoreError> {
    app.bus.notify(removed, Signal::AuthChanged);
    let gone: Vec<DeviceNo> = removed.iter().map(|address| address.device).collect();
    while !app.tasks.is_stopping() && app.store.clear_inboxes(&gone).await? {}
    Ok(())
}

fn round_of(found: usize) -> Round {
    if found >= ACCOUNTS as usize { Round::More } else { Round::Done }
}
