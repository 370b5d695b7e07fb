//! Compares the clock with the time that the database remembers, and ends a doubt: when the wall clock is right again, when the
//! operator confirms it, or after a day in which no database server contradicts it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::app::App;
use crate::clock::Timestamp;
use crate::store::{StoreError, StoredTime};
use crate::tasks::Round;

/// Pause between two comparisons.
pub(super) const PERIOD: Duration = Duration::from_secs(10);
/// How often the time is remembered. Each time is a small commit.
const REMEMBERING: Duration = Duration::from_mins(1);
/// How often a doubt is logged.
const REMINDING: Duration = Duration::from_hours(1);
/// After this time a wall clock is believed unless the database server contradicts it.
const LONGEST_DOUBT: Duration = Duration::from_hours(24);
/// A remembered time this near to the wall clock confirms it: the operator has set it, or nodes whose clocks are not in doubt.
const CONFIRMED_WITHIN: Duration = Duration::from_mins(5);
/// A larger difference to the clock of the database server is logged.
const SERVER_DIFFERS: Duration = Duration::from_mins(5);
/// A database server whose clock differs by more contradicts the wall clock after a day of doubt.
const SERVER_OBJECTS: Duration = Duration::from_hours(1);

/// What is kept between two comparisons.
pub(super) struct ClockMonitor(Mutex<State>);

#[derive(Default)]
struct State {
    /// What the database said last.
    seen: Option<StoredTime>,
    remembered: Option<Instant>,
    doubted_since: Option<Instant>,
    reminded: Option<Instant>,
    is_server_logged: bool,
}

/// The result of a comparison while the clock is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Confirmed,
    Accepted,
    Doubtful,
}

/// Remembers which database answers now, for the first comparison. Call it before the server takes requests: if the database
/// were replaced between the first request and the first comparison, what was stored could be lost unnoticed.
pub(super) async fn begin(app: &App) -> ClockMonitor {
    let seen = app.store.stored_time().await;
    let seen = seen.inspect_err(|error| debug!(%error, "the database can't be asked for the time")).ok().flatten();
    ClockMonitor(Mutex::new(State { seen, ..State::default() }))
}

/// Compares once.
pub(super) async fn compare(app: &App, watch: &ClockMonitor) -> Result<Round, StoreError> {
    let Some(seen) = app.store.stored_time().await? else { return lose(app) };
    let is_other = watch.state().seen.as_ref().is_some_and(|last| last.database_id != seen.database_id);
    if is_other {
        return lose(app);
    }
    watch.notice_steps_back(&seen);
    let is_accepted = watch.evaluate(app, &seen);
    app.clock.track_wall_clock();
    let ahead = app.clock.doubt().unwrap_or_default();
    app.metrics.clock_ahead.set((), ahead / 1000);
    if is_accepted {
        app.store.set_time(app.clock.now()).await?;
    } else if watch.state().remembered.is_none_or(|last| last.elapsed() >= REMEMBERING) {
        app.store.store_time(app.clock.now()).await?;
        watch.state().remembered = Some(Instant::now());
    }
    Ok(Round::Done)
}

/// Stops the server because another database answers: what it has accepted is in the former one.
fn lose(app: &App) -> Result<Round, StoreError> {
    if !app.files.are_lost() {
        error!(
            "another database answers at the address of --db-url than at the start; nothing more is accepted, and the \
             server stops: let the address lead to the right database, then start it again"
        );
        app.store.stop_writes();
        app.files.set_lost();
    }
    Ok(Round::Done)
}

impl ClockMonitor {
    /// No code panics while it holds this.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs that the remembered time went back without being set: then the database was replaced by an older state.
    fn notice_steps_back(&self, seen: &StoredTime) {
        let mut state = self.state();
        let went_back =
            |last: &StoredTime| seen.at + CONFIRMED_WITHIN < last.at && seen.confirmations <= last.confirmations;
        if state.seen.as_ref().is_some_and(went_back) {
            error!(
                "the database is in an older state than before, as after a restore or a failover that lost something; stop \
                 all nodes and run `obscura-server after-restore`, or one-time prekeys may be handed out twice"
            );
        }
        state.seen = Some(seen.clone());
    }

    /// Returns true if the wall clock was accepted against the remembered time.
    fn evaluate(&self, app: &App, seen: &StoredTime) -> bool {
        let (mut state, wall) = (self.state(), app.clock.wall());
        let Some(ahead) = app.clock.doubt() else {
            if state.doubted_since.take().is_some() {
                info!("the clock of this machine is no longer in doubt");
            }
            state.reminded = None;
            state.compare_with_server(seen, wall);
            return false;
        };
        let since = *state.doubted_since.get_or_insert_with(Instant::now);
        match verdict(wall, seen, since.elapsed()) {
            Verdict::Doubtful => {
                if state.reminded.is_none_or(|last| last.elapsed() >= REMINDING) {
                    state.reminded = Some(Instant::now());
                    let (hours, direction) =
                        (ahead.unsigned_abs() / 3_600_000, if ahead > 0 { "ahead of" } else { "behind" });
                    warn!(
                        hours,
                        "the clock of this machine is {direction} the time that the server trusts, so nothing is deleted or \
                         hidden for its age by it: set the clock, or, if it is right, run `obscura-server confirm-clock` \
                         (docs/OPERATIONS.md, A clock in doubt)"
                    );
                }
                false
            }
            verdict => {
                app.clock.trust_wall_clock();
                state.doubted_since = None;
                state.reminded = None;
                match verdict {
                    Verdict::Accepted => warn!("the clock of this machine was in doubt for a day and is believed now"),
                    _ => info!("the clock of this machine was confirmed"),
                }
                verdict == Verdict::Accepted
            }
        }
    }
}

impl State {
    fn compare_with_server(&mut self, seen: &StoredTime, wall: Timestamp) {
        let differs = seen.server.is_some_and(|server| !is_near(server, wall, SERVER_DIFFERS));
        if differs && !self.is_server_logged {
            warn!("the clocks of this machine and of the database server differ by more than five minutes; set both");
        }
        self.is_server_logged = differs;
    }
}

fn verdict(wall: Timestamp, seen: &StoredTime, doubted_for: Duration) -> Verdict {
    if is_near(seen.at, wall, CONFIRMED_WITHIN) {
        Verdict::Confirmed
    } else if doubted_for >= LONGEST_DOUBT && seen.server.is_none_or(|server| is_near(server, wall, SERVER_OBJECTS)) {
        Verdict::Accepted
    } else {
        Verdict::Doubtful
    }
}

fn is_near(one: Timestamp, other: Timestamp, limit: Duration) -> bool {
    u128::from(one.millis().abs_diff(other.millis())) <= limit.as_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);
    const MINUTE: Duration = Duration::from_mins(1);
    const DAY: Duration = Duration::from_hours(24);

    fn seen(at: Timestamp, server: Option<Timestamp>) -> StoredTime {
        StoredTime { at, database_id: Vec::new(), confirmations: 0, server }
    }

    #[test]
    fn a_doubt_ends_by_a_confirmation_or_after_a_day_in_which_the_database_server_agrees() {
        let old = NOW - 40 * DAY;
        for (seen, doubted_for, expected) in [
            (seen(old, None), DAY - MINUTE, Verdict::Doubtful),
            (seen(old, None), DAY, Verdict::Accepted),
            (seen(NOW - 2 * MINUTE, None), MINUTE, Verdict::Confirmed),
            (seen(NOW - 6 * MINUTE, None), MINUTE, Verdict::Doubtful),
            (seen(old, Some(NOW)), MINUTE, Verdict::Doubtful),
            (seen(old, Some(NOW)), DAY, Verdict::Accepted),
            (seen(old, Some(old)), 3 * DAY, Verdict::Doubtful),
        ] {
            assert_eq!(verdict(NOW, &seen, doubted_for), expected, "{seen:?}, {doubted_for:?}");
        }
    }
}
