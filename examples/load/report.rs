//! Figures, and what `/proc` knows about a process.

use std::fmt::Write;
use std::fs;
use std::time::Instant;

/// Linux counts CPU time for users in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// What one run found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    figures: Vec<(String, f64)>,
}

impl Report {
    /// Adds a figure; its name tells the unit.
    pub fn add(&mut self, name: impl Into<String>, value: f64) {
        self.figures.push((name.into(), value));
    }

    /// Adds median, 99th percentile and maximum of some durations.
    pub fn add_latencies(&mut self, name: &str, latencies: &mut [u32]) {
        latencies.sort_unstable();
        let at = |share: f64| {
            let index = ((latencies.len() as f64 * share).ceil() as usize).saturating_sub(1);
            latencies.get(index).map_or(f64::NAN, |micros| f64::from(*micros) / 1000.0)
        };
        self.add(format!("{name} p50, ms"), at(0.5));
        self.add(format!("{name} p99, ms"), at(0.99));
        self.add(format!("{name} max, ms"), at(1.0));
    }

    /// Adds what a piece of work cost, in all and for each thousand of its parts.
    pub fn add_cost(&mut self, cost: &Cost, parts: usize) {
        let thousands = parts as f64 / 1000.0;
        if let Some(cpu) = cost.server_cpu {
            self.add("server, cores in use", cpu / cost.seconds);
            self.add("server, CPU s per 1000", cpu / thousands);
        }
        self.add("this tool, CPU s per 1000", cost.own_cpu / thousands);
    }

    /// All runs beside each other, with the medians.
    pub fn table(runs: &[Self]) -> String {
        let mut text = format!("{:<44}{:>12}", "", "median");
        let _ = (1..=runs.len()).try_for_each(|run| write!(text, "{:>12}", format!("run {run}")));
        let Some(first) = runs.first() else { return text };
        for (row, (name, _)) in first.figures.iter().enumerate() {
            let values: Vec<f64> = runs.iter().filter_map(|run| run.figures.get(row)).map(|figure| figure.1).collect();
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
            let _ = write!(text, "\n{name:<44}{:>12}", shown(median));
            let _ = values.iter().try_for_each(|value| write!(text, "{:>12}", shown(*value)));
        }
        text
    }
}

/// Four significant digits are more than a measurement is good for.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Runs from its making on.
pub struct Meter {
    server: Option<u32>,
    began: Instant,
    server_cpu: Option<f64>,
    own_cpu: f64,
}

/// What a piece of work cost, in seconds.
pub struct Cost {
    pub seconds: f64,
    pub server_cpu: Option<f64>,
    pub own_cpu: f64,
}

impl Meter {
    /// Starts to count.
    pub fn start(server: Option<u32>) -> Self {
        let own_cpu = cpu_seconds("self").unwrap_or_default();
        Self { server, began: Instant::now(), server_cpu: of(server), own_cpu }
    }

    /// What it was from the start to now.
    pub fn read(&self) -> Cost {
        Cost {
            seconds: self.began.elapsed().as_secs_f64(),
            server_cpu: of(self.server).zip(self.server_cpu).map(|(now, then)| now - then),
            own_cpu: cpu_seconds("self").unwrap_or_default() - self.own_cpu,
        }
    }
}

fn of(process: Option<u32>) -> Option<f64> {
    cpu_seconds(&process?.to_string())
}

fn cpu_seconds(process: &str) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may contain anything; user and system time are the 12th and 13th behind it.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks: Option<Vec<f64>> = rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse().ok()).collect();
    Some(ticks?.iter().sum::<f64>() / TICKS_PER_SECOND)
}

/// KiB of memory in use: all, and without the parts that are files.
pub fn resident_kib(process: u32) -> Option<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    Some((line("VmRSS:")?, line("RssAnon:")?))
}

/// How busy the machine has been in the last minute.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}
