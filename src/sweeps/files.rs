//! Compares the files of an embedded server with their paths every two seconds, and marks the database every minute.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, error, warn};

use crate::app::App;
use crate::files::FilesLost;
use crate::store::StoreError;

/// Pause between two comparisons.
const PERIOD: Duration = Duration::from_secs(2);
/// How often the database gets a new mark. One mark is one small commit.
const GENERATION_INTERVAL: Duration = Duration::from_mins(1);
/// Longest wait for the comparison at the end, when the disk may be what is wrong.
const AT_THE_END: Duration = Duration::from_secs(2);

/// Starts the comparisons, with a first mark. Does nothing without files.
pub(super) async fn start(app: &App) {
    if !app.files.are_watched() {
        return;
    }
    if let Err(error) = advance_generation(app).await {
        warn!(%error, "the database can't be marked yet");
    }
    app.tasks.spawn("files", run(app.clone()));
}

async fn run(app: App) {
    let mut mark_at = Instant::now() + GENERATION_INTERVAL;
    loop {
        tokio::select! {
            () = app.tasks.stopping() => return,
            () = sleep(PERIOD) => {}
        }
        // Waits for the disk without a limit, and never with two comparisons at a time.
        tokio::select! {
            () = app.tasks.stopping() => return,
            found = check(&app) => if found {
                // The server answers for a little while, and then stops: `Server::failed`.
                return app.tasks.stopping().await;
            },
        }
        if mark_at <= Instant::now() {
            mark_at = Instant::now() + GENERATION_INTERVAL;
            if let Err(error) = advance_generation(&app).await {
                debug!(%error, "the database can't be marked");
            }
        }
    }
}

/// The last comparison before the database is closed. A server whose files are lost must not end well.
pub async fn check_files(app: &App) {
    if tokio::time::timeout(AT_THE_END, check(app)).await.is_err() {
        warn!("the disk didn't answer when the files of the server were looked at");
    }
}

/// Returns true if something is lost. Nothing is stored from then on.
async fn check(app: &App) -> bool {
    if !app.files.are_watched() || app.files.are_lost() {
        return app.files.are_lost();
    }
    match compare(app).await {
        Ok(()) => false,
        Err(lost) => {
            app.store.stop_writes();
            error!("{lost}");
            true
        }
    }
}

async fn compare(app: &App) -> Result<(), FilesLost> {
    let files = app.files.clone();
    let looked = tokio::task::spawn_blocking(move || files.check()).await;
    looked.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))?;
    match app.store.file_generation().await {
        Ok(Some(generation)) => app.files.check_generation(generation),
        // The code that needs the database reports that it can't be read.
        Ok(None) | Err(_) => Ok(()),
    }
}

async fn advance_generation(app: &App) -> Result<(), StoreError> {
    let Some(generation) = app.files.next_generation() else { return Ok(()) };
    app.store.set_file_generation(generation).await?;
    app.files.confirm_generation();
    Ok(())
}
