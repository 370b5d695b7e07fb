//! What one run found, by names that are the same in the table, in the JSON and in the readme.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::watch::Curve;

/// Every figure: its name in the JSON, and what it is called in the table.
pub const KNOWN: &[(&str, &str)] = &[
    ("signups_per_s", "sign-ups/s"),
    ("sends_per_s", "sends/s"),
    ("messages_per_s", "messages/s"),
    ("p50_ms", "p50, ms"),
    ("p90_ms", "p90, ms"),
    ("p99_ms", "p99, ms"),
    ("p999_ms", "p99.9, ms"),
    ("max_ms", "longest, ms"),
    ("server_cores", "server, cores in use"),
    ("server_cpu_us_each", "server, CPU us each"),
    ("other_cpu_us_each", "CPU us each"),
    ("all_cpu_us_each", "server and others, CPU us each"),
    ("tool_cpu_us_each", "this tool, CPU us each"),
    ("messages_per_frame", "messages in a frame"),
    ("sent", "messages accepted"),
    ("delivered", "messages delivered"),
    ("lost", "lost"),
    ("repeated", "repeated"),
    ("reordered", "reordered"),
    ("redelivered", "came again though acknowledged"),
    ("refused", "refused and sent again"),
    ("waited_to_the_end", "still waiting at the end, taken then"),
    ("wakes", "returns of sleeping devices"),
    ("group_sends", "sends to groups"),
    ("fetched", "attachments fetched and compared"),
    ("queued_per_s", "queued in batches, messages/s"),
    ("drained_per_s", "delivered and acknowledged, messages/s"),
    ("drained_ms", "all delivered after, ms"),
    ("left", "left in the inboxes"),
    ("opened_per_s", "sockets opened/s"),
    ("socket_kib", "resident memory per socket, KiB"),
    ("socket_anonymous_kib", "of that anonymous, KiB"),
    ("upload_mib_per_s", "uploads, MiB/s"),
    ("download_mib_per_s", "downloads, MiB/s"),
    ("copy_mib_per_s", "copying with fsync beside it, MiB/s"),
    ("upload_ratio", "uploads to copying"),
    ("download_ratio", "downloads to copying"),
    ("ready_ms", "ready after, ms"),
    ("answering_ms", "API answers after, ms"),
    ("waiting", "waiting messages"),
    ("filled_s", "filled within, s"),
    ("resident_mib", "resident memory, MiB"),
    ("disk_ms", "disk, confirmed write of 4 KiB, ms"),
];

/// One number.
#[derive(Clone, Debug)]
pub struct Figure {
    pub key: &'static str,
    /// Which of several cases; empty when there is one only.
    pub of: String,
    pub value: f64,
}

/// The numbers of one run.
#[derive(Default)]
pub struct Figures {
    pub list: Vec<Figure>,
    pub curve: Option<Curve>,
    /// Of `growth`.
    pub steps: Vec<Step>,
}

/// How fast it is with so much of something.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub axis: &'static str,
    pub at: f64,
    pub sends_per_s: f64,
    pub relayed_per_s: f64,
}

impl Figures {
    /// Adds a figure of [`KNOWN`].
    pub fn add(&mut self, key: &'static str, value: f64) {
        self.add_of(key, "", value);
    }

    /// Adds a figure of one of several cases.
    pub fn add_of(&mut self, key: &'static str, of: &str, value: f64) {
        debug_assert!(KNOWN.iter().any(|(known, _)| *known == key), "{key} is not documented");
        self.list.push(Figure { key, of: of.to_owned(), value });
    }

    /// Adds the percentiles of a curve.
    pub fn add_latencies(&mut self, of: &str, curve: &Curve) {
        let at = |share: f64| curve.latencies.value_at_quantile(share) as f64 / 1000.0;
        if !curve.latencies.is_empty() {
            let shares = [("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("p999_ms", 0.999)];
            shares.into_iter().for_each(|(key, share)| self.add_of(key, of, at(share)));
            self.add_of("max_ms", of, curve.latencies.max() as f64 / 1000.0);
        }
    }

    /// Adds another run's figures as those of one case.
    pub fn add_all(&mut self, of: &str, other: Self) {
        for figure in other.list {
            let of = if figure.of.is_empty() { of.to_owned() } else { format!("{}, {of}", figure.of) };
            self.add_of(figure.key, &of, figure.value);
        }
    }
}

/// A figure over all runs.
pub struct Summary {
    pub figure: Figure,
    pub runs: Vec<f64>,
}

impl Summary {
    /// Each figure of the first run, with its values in all.
    pub fn of(runs: &[Figures]) -> Vec<Self> {
        let Some(first) = runs.first() else { return Vec::new() };
        let find = |run: &Figures, figure: &Figure| {
            let same = run.list.iter().find(|other| other.key == figure.key && other.of == figure.of);
            same.map(|figure| figure.value)
        };
        let summary = |figure: &Figure| Self {
            figure: figure.clone(),
            runs: runs.iter().filter_map(|run| find(run, figure)).collect(),
        };
        first.list.iter().map(summary).collect()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        (sorted[last / 2] + sorted[sorted.len() / 2]) / 2.0
    }

    fn lowest(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    fn highest(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    fn label(&self) -> String {
        let Figure { key, of, .. } = &self.figure;
        let label = KNOWN.iter().find(|(known, _)| known == key).map_or(*key, |(_, label)| label);
        if of.is_empty() { label.to_owned() } else { format!("{of}: {label}") }
    }

    fn json(&self) -> Value {
        // What is infinite or no number is `null`.
        let (median, min, max) = (self.median(), self.lowest(), self.highest());
        json!({"of": self.figure.of, "label": self.label(), "median": median, "min": min, "max": max, "runs": self.runs})
    }
}

/// The subjects beside each other: medians, and the lowest and highest run.
pub fn table(subjects: &[(String, Vec<Summary>)]) -> String {
    let Some((_, first)) = subjects.first() else { return String::new() };
    let width = first.iter().map(|summary| summary.label().len()).max().unwrap_or_default() + 2;
    let mut text = " ".repeat(width);
    for (name, _) in subjects {
        let _ = write!(text, "{name:>32}");
    }
    for summary in first {
        let Figure { key, of, .. } = &summary.figure;
        let _ = write!(text, "\n{:<width$}", summary.label());
        for (_, summaries) in subjects {
            let same = summaries.iter().find(|other| other.figure.key == *key && other.figure.of == *of);
            let _ = write!(text, "{:>32}", same.map_or_else(String::new, shown_with_range));
        }
    }
    text
}

fn shown_with_range(summary: &Summary) -> String {
    let median = shown(summary.median());
    match summary.runs.len() {
        0 | 1 => median,
        _ => format!("{median} ({} to {})", shown(summary.lowest()), shown(summary.highest())),
    }
}

/// The figures for machines: by name, and in each a list of the cases.
pub fn json(summaries: &[Summary]) -> Value {
    let mut map = Map::new();
    for summary in summaries {
        let cases = map.entry(summary.figure.key).or_insert_with(|| json!([]));
        if let Some(cases) = cases.as_array_mut() {
            cases.push(summary.json());
        }
    }
    Value::from(map)
}

/// Three or four significant digits are more than a measurement is good for.
pub fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(value: f64) -> Figures {
        let mut figures = Figures::default();
        figures.add("sends_per_s", value);
        figures.add_of("other_cpu_us_each", "postgres", value);
        figures
    }

    #[test]
    fn the_median_and_the_range_of_all_runs_are_told() {
        let summaries = Summary::of(&[run(1.0), run(100.0), run(10.0), run(4.0)]);
        assert_eq!(summaries[0].median(), 7.0);
        let text = table(&[("it".to_owned(), Summary::of(&[run(1.0), run(100.0), run(10.0)]))]);
        assert!(text.contains("10 (1 to 100)") && text.contains("postgres: CPU us each"), "{text}");
        assert_eq!(json(&summaries)["sends_per_s"][0]["max"], 100.0);
        assert_eq!(json(&summaries)["other_cpu_us_each"][0]["of"], "postgres");
    }

    #[test]
    fn the_readme_explains_every_figure_once() {
        let readme = include_str!("../README.md");
        let (_, readme) = readme.split_once("| Figure |").unwrap();
        for (key, _) in KNOWN {
            assert_eq!(readme.matches(&format!("`{key}`")).count(), 1, "{key}");
        }
    }
}
