//! What happens while it happens: a line each second, and the curves for the end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::figures::shown;
use crate::proc::{own_cpu_seconds, resident_kib};

/// Durations are counted in microseconds, three digits of them, up to this. What takes longer counts as this.
const LONGEST_MICROS: u64 = 120_000_000;
const DIGITS: u8 = 3;

/// Durations of one measurement, in a fixed amount of memory.
pub type Latencies = Histogram<u32>;

/// What happened in one second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Second {
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// What there is to draw of a run.
#[derive(Clone, Debug)]
pub struct Curve {
    pub latencies: Latencies,
    pub seconds: Vec<Second>,
}

/// Shared by all tasks of a measurement.
pub struct Watch {
    state: Mutex<State>,
}

struct State {
    what: String,
    process: Option<u32>,
    cpu: Option<f64>,
    is_counting: bool,
    curve: Curve,
    second: Latencies,
    count: u64,
    since: Instant,
}

fn empty() -> Latencies {
    Histogram::new_with_bounds(1, LONGEST_MICROS, DIGITS).expect("the bounds are constants, and sound")
}

impl Watch {
    pub fn new() -> Self {
        let curve = Curve { latencies: empty(), seconds: Vec::new() };
        let state = State {
            what: "starting".to_owned(),
            process: None,
            cpu: None,
            is_counting: false,
            curve,
            second: empty(),
            count: 0,
            since: Instant::now(),
        };
        Self { state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is being done now.
    pub fn phase(&self, what: impl Into<String>, process: Option<u32>) {
        let mut state = self.state();
        if state.process != process {
            (state.process, state.cpu) = (process, process.and_then(own_cpu_seconds));
        }
        state.what = what.into();
    }

    /// From now on it counts.
    pub fn begin(&self) {
        let mut state = self.state();
        state.curve = Curve { latencies: empty(), seconds: Vec::new() };
        state.second.reset();
        (state.count, state.since, state.is_counting) = (0, Instant::now(), true);
    }

    /// One more has happened, and took so long.
    pub fn record(&self, took: Duration) {
        let mut state = self.state();
        if state.is_counting {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            state.second.saturating_record(micros);
        }
        state.count += 1;
    }

    /// So many more have happened.
    pub fn count(&self, number: usize) {
        self.state().count += number as u64;
    }

    /// What was counted since it began.
    pub fn end(&self) -> Curve {
        let mut state = self.state();
        state.is_counting = false;
        state.turn(false);
        let nothing = Curve { latencies: empty(), seconds: Vec::new() };
        std::mem::replace(&mut state.curve, nothing)
    }

    /// Tells a line each second, for as long as it is polled.
    pub async fn report(&self) {
        let mut clock = tokio::time::interval(Duration::from_secs(1));
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        clock.tick().await;
        loop {
            clock.tick().await;
            let line = self.state().line();
            eprintln!("{line}");
        }
    }
}

impl State {
    /// Ends a second, or what there is of one.
    fn turn(&mut self, is_whole: bool) -> Second {
        let at = |share: f64| self.second.value_at_quantile(share) as f64 / 1000.0;
        let lasted = self.since.elapsed().as_secs_f64();
        let second = Second { per_second: self.count as f64 / lasted, p50_ms: at(0.5), p99_ms: at(0.99) };
        if self.is_counting || !is_whole {
            // Both have the same bounds, so nothing can fail to fit.
            let _ = self.curve.latencies.add(&self.second);
        }
        if self.is_counting {
            self.curve.seconds.push(second);
        }
        self.second.reset();
        (self.count, self.since) = (0, Instant::now());
        second
    }

    fn line(&mut self) -> String {
        let lasted = self.since.elapsed().as_secs_f64();
        let (is_silent, has_latencies) = (self.count == 0, !self.second.is_empty());
        let second = self.turn(true);
        let mut line = format!("  {}", self.what);
        if !is_silent {
            line += &format!(": {}/s", shown(second.per_second));
        }
        if has_latencies {
            line += &format!(", p50 {} ms, p99 {} ms", shown(second.p50_ms), shown(second.p99_ms));
        }
        if let Some(process) = self.process {
            let cpu = own_cpu_seconds(process);
            if let (Some(now), Some(then)) = (cpu, self.cpu) {
                line += &format!("; server {} cores", shown((now - then) / lasted));
            }
            self.cpu = cpu;
            if let Some((kib, _)) = resident_kib(process) {
                line += &format!(", {} MiB", shown(kib / 1024.0));
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happens_between_begin_and_end_is_in_the_curve() {
        let watch = Watch::new();
        watch.record(Duration::from_secs(100));
        watch.begin();
        (1..=100).for_each(|millis| watch.record(Duration::from_millis(millis)));
        watch.state().line();
        watch.record(Duration::from_secs(9999));
        let curve = watch.end();
        watch.record(Duration::from_secs(100));
        assert_eq!((curve.latencies.len(), curve.seconds.len()), (101, 1));
        let median = curve.latencies.value_at_quantile(0.5) as f64 / 1000.0;
        assert!((50.0..52.0).contains(&median), "{median}");
        assert_eq!(curve.seconds[0].p99_ms.round(), 99.0);
        assert!(watch.end().latencies.is_empty());
    }
}
