//! Time. This is the only file that reads the clock; all others are told what time it is.

use std::ops::{Add, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment, in whole milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The moment that many milliseconds after the epoch.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// The moment that many seconds after the epoch.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Milliseconds since the epoch.
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since the epoch, rounded down.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// The time since the epoch; zero for moments before it.
    pub const fn since_epoch(self) -> Duration {
        Duration::from_millis(if self.0 < 0 { 0 } else { self.0 as u64 })
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }
}

/// No honest clock is behind this second (2026-01-01). Machines without a battery start in 1970; what they receive before
/// their clock is set would be taken for expired afterwards.
pub const EARLIEST: Timestamp = Timestamp::from_seconds(1_767_225_600);

/// The wall clock may differ by this much from what the monotonic clock says that it should be.
pub const TOLERANCE: Duration = Duration::from_hours(1);
/// At the start, this much may have passed since the remembered time without a doubt. A longer time means a long downtime or
/// a wrong clock, and only the operator knows which.
const MAX_DOWNTIME: Duration = Duration::from_hours(24);

/// The time, which may be in doubt. A moment that is made from a timestamp is not in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// See [`Clock::earliest`].
    pub earliest: Timestamp,
    /// See [`Clock::latest`].
    pub latest: Timestamp,
}

impl From<Timestamp> for Moment {
    fn from(now: Timestamp) -> Self {
        Self { earliest: now, latest: now }
    }
}

/// The wall clock, and a time that can be trusted when it jumps. Cloning gives the same clock.
///
/// The machine's clock can be set to anything at any moment. Its monotonic clock can't, so the two are compared at each look.
/// As long as they agree, the wall clock's time is the only one. When they don't, the clock is *in doubt*, and either may be
/// right: the wall clock may have gone wrong, or may just have been corrected. Then
///
/// - ages are judged by [`Clock::earliest`], so nothing is deleted or hidden too soon,
/// - what is deleted by its age is stored with [`Clock::latest`], so it is not too old when the doubt is over,
/// - everything else uses [`Clock::now`], which goes on as if nothing had happened.
#[derive(Clone, Debug)]
pub struct Clock {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    opened: Instant,
    /// Trusted minus monotonic time, in milliseconds. It follows the wall clock while that is not in doubt.
    offset_millis: AtomicI64,
    /// Tests: how far both clocks are ahead of the system's.
    ahead_millis: AtomicI64,
    /// Tests: how far the wall clock alone is.
    jumped_millis: AtomicI64,
}

impl Clock {
    /// The time of the system. It is not in doubt.
    pub fn system() -> Self {
        let [offset_millis, ahead_millis, jumped_millis] = [(); 3].map(|()| AtomicI64::new(0));
        let clock =
            Self { inner: Arc::new(Inner { opened: Instant::now(), offset_millis, ahead_millis, jumped_millis }) };
        clock.trust_wall_clock();
        clock
    }

    /// The trusted time: the wall clock's; while that is in doubt, the last trusted time plus the time that has passed since.
    /// For periods, and for what lives for minutes.
    pub fn now(&self) -> Timestamp {
        let (wall, trusted) = self.both();
        if differ(wall, trusted) { trusted } else { wall }
    }

    /// The earliest and the latest time that it may be, for code that needs both.
    pub fn moment(&self) -> Moment {
        let (wall, trusted) = self.both();
        if differ(wall, trusted) {
            Moment { earliest: wall.min(trusted), latest: wall.max(trusted) }
        } else {
            wall.into()
        }
    }

    /// The earliest time that it may be. For the question whether something is old enough to be deleted or hidden.
    pub fn earliest(&self) -> Timestamp {
        self.moment().earliest
    }

    /// The latest time that it may be. For the creation time of what is deleted by its age, and the end of what lives for days.
    pub fn latest(&self) -> Timestamp {
        self.moment().latest
    }

    /// The wall clock as it stands. For the clocks of others, such as the push providers'.
    pub fn wall(&self) -> Timestamp {
        #[expect(clippy::disallowed_methods, reason = "this is the one place that may")]
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        let set = self.inner.ahead_millis.load(Ordering::Relaxed) + self.inner.jumped_millis.load(Ordering::Relaxed);
        Timestamp(now.saturating_add(set))
    }

    /// While the clock is in doubt: by how many milliseconds the wall clock is ahead of the trusted time; negative when it is
    /// behind.
    pub fn doubt(&self) -> Option<i64> {
        let (wall, trusted) = self.both();
        differ(wall, trusted).then(|| wall.0.saturating_sub(trusted.0))
    }

    /// Lets the trusted time follow a wall clock that is not in doubt. To be called every few seconds, since the clocks of
    /// machines are corrected in small steps all the time.
    pub fn track_wall_clock(&self) {
        if self.doubt().is_none() {
            self.trust_wall_clock();
        }
    }

    /// Ends a doubt in favour of the wall clock.
    pub fn trust_wall_clock(&self) {
        self.set_trusted(self.wall());
    }

    /// Goes on from the remembered time, at the start. The wall clock is in doubt if it is an hour before that time, or a day
    /// after it. Then `witness`, the time of a database server, is trusted if it fits, and otherwise the remembered time.
    pub fn resume(&self, remembered: Timestamp, witness: Option<Timestamp>) {
        let fits = |time: &Timestamp| *time + TOLERANCE >= remembered && *time <= remembered + MAX_DOWNTIME;
        let candidates = [Some(self.wall()), witness];
        self.set_trusted(candidates.into_iter().flatten().find(fits).unwrap_or(remembered));
    }

    fn set_trusted(&self, time: Timestamp) {
        self.inner.offset_millis.store(time.0.saturating_sub(self.monotonic()), Ordering::Relaxed);
    }

    /// The wall clock and the trusted time.
    fn both(&self) -> (Timestamp, Timestamp) {
        let trusted = self.monotonic().saturating_add(self.inner.offset_millis.load(Ordering::Relaxed));
        (self.wall(), Timestamp(trusted))
    }

    /// Milliseconds that have passed. Nothing sets this clock; while a machine sleeps it may stand still.
    fn monotonic(&self) -> i64 {
        let passed = i64::try_from(self.inner.opened.elapsed().as_millis()).unwrap_or(i64::MAX);
        passed.saturating_add(self.inner.ahead_millis.load(Ordering::Relaxed))
    }

    /// Lets time pass for this clock and all its clones. No test can wait for thirty days.
    pub fn advance(&self, by: Duration) {
        self.inner.ahead_millis.fetch_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// Sets the wall clock of this clock and all its clones ahead by this many milliseconds, as if the machine's clock were set.
    pub fn set_wrong(&self, millis: i64) {
        self.inner.jumped_millis.store(millis, Ordering::Relaxed);
    }
}

fn differ(wall: Timestamp, trusted: Timestamp) -> bool {
    wall.0.abs_diff(trusted.0) > TOLERANCE.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    const DAY: Duration = Duration::from_hours(24);
    const DAY_MILLIS: i64 = 24 * 60 * 60 * 1000;

    /// True when two times are the same, except for what passes during a test.
    fn is_about(one: Timestamp, other: Timestamp) -> bool {
        one.0.abs_diff(other.0) < 60_000
    }

    #[test]
    fn seconds_are_rounded_down_on_both_sides_of_the_epoch() {
        assert_eq!(Timestamp::from_millis(1999).seconds(), 1);
        assert_eq!(Timestamp::from_millis(-1).seconds(), -1);
    }

    #[test]
    fn an_advanced_clock_is_ahead_for_all_its_clones_and_in_no_doubt() {
        let clock = Clock::system();
        let before = clock.now();
        clock.clone().advance(40 * DAY);
        assert!(clock.now() >= before + 40 * DAY);
        assert_eq!(clock.doubt(), None);
    }

    #[test]
    fn a_wall_clock_that_jumps_leaves_the_trusted_time_as_it_is_and_makes_no_difference_when_it_is_back() {
        let clock = Clock::system();
        let start = clock.now();
        for days in [40, -40] {
            clock.set_wrong(days * DAY_MILLIS);
            clock.track_wall_clock();
            let jumped = clock.wall();
            assert!(is_about(clock.now(), start));
            assert!(is_about(clock.earliest(), start.min(jumped)) && is_about(clock.latest(), start.max(jumped)));
            assert_eq!(clock.doubt().unwrap() / 60_000, days * DAY_MILLIS / 60_000);
            clock.set_wrong(0);
            assert_eq!(clock.doubt(), None);
            assert!(is_about(clock.now(), start) && is_about(clock.latest(), start));
        }
    }

    #[test]
    fn a_small_step_is_followed() {
        let clock = Clock::system();
        let start = clock.now();
        for steps in 1..=3 {
            clock.set_wrong(steps * DAY_MILLIS / 48);
            assert_eq!(clock.doubt(), None);
            clock.track_wall_clock();
        }
        assert!(clock.now() > start + HOUR);
    }

    #[test]
    fn a_jump_that_is_believed_is_the_time() {
        let clock = Clock::system();
        clock.set_wrong(40 * DAY_MILLIS);
        let jumped = clock.wall();
        clock.trust_wall_clock();
        assert!(clock.doubt().is_none() && is_about(clock.now(), jumped) && is_about(clock.earliest(), jumped));
    }

    #[test]
    fn a_start_is_in_doubt_before_the_remembered_time_and_a_day_behind_it() {
        let now = Clock::system().now();
        for (remembered, is_in_doubt) in
            [(now - HOUR / 2, false), (now + HOUR / 2, false), (now - 25 * HOUR, true), (now + 2 * HOUR, true)]
        {
            let clock = Clock::system();
            clock.resume(remembered, None);
            assert_eq!(clock.doubt().is_some(), is_in_doubt);
            assert!(is_about(clock.now(), if is_in_doubt { remembered } else { now }));
        }
    }

    #[test]
    fn a_database_server_whose_time_fits_what_was_remembered_is_believed_before_a_wall_clock_that_does_not() {
        let clock = Clock::system();
        clock.set_wrong(40 * DAY_MILLIS);
        let right = Clock::system().now();
        clock.resume(right - HOUR, Some(right));
        assert!(clock.doubt().is_some() && is_about(clock.now(), right));
        clock.resume(right - HOUR, Some(right - 3 * DAY));
        assert!(is_about(clock.now(), right - HOUR), "neither fits");
    }
}
