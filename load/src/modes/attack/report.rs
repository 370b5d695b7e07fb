//! The outcome of each attack, and whether it is within the limits that are aimed at.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

/// What an attack may cost the honest clients and the server.
const P99_MS: f64 = 250.0;
const MEMORY_MIB: f64 = 256.0;

/// The operations of the honest clients.
#[derive(Clone, Debug, Default)]
pub struct Honest {
    pub succeeded: u64,
    /// By kind and reason.
    pub failures: BTreeMap<String, u64>,
    /// Of all that succeeded.
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// The longest of each kind, in milliseconds.
    pub slowest: BTreeMap<String, f64>,
}

/// What the attacker did, and the answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attacker {
    /// Requests, frames or connections, whichever the attack makes.
    pub attempts: u64,
    pub seconds: f64,
    /// By class: `2xx`, `4xx`, `429`, `5xx`, `none` (closed or never answered).
    pub answers: BTreeMap<String, u64>,
}

/// The outcome of one attack.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    pub outcome: Outcome,
}

/// Whether it could be run at all.
#[derive(Clone, Debug)]
pub enum Outcome {
    Ran(Box<Ran>),
    /// Why it could not. That is no success.
    Skipped(String),
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Ran {
    pub honest: Honest,
    pub attacker: Attacker,
    /// The most memory that the server had in use during the attack, if that is known.
    pub peak_mib: Option<f64>,
    /// What else is to be known about this attack.
    pub note: String,
    /// What this attack must not do, and did.
    pub violations: Vec<String>,
}

impl Honest {
    fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// In percent.
    pub fn success(&self) -> f64 {
        let all = self.succeeded + self.failed();
        if all == 0 { 0.0 } else { self.succeeded as f64 * 100.0 / all as f64 }
    }
}

impl Ran {
    /// What is outside of the limits, in words; empty if nothing is.
    pub fn misses(&self, is_timed: bool) -> Vec<String> {
        let mut misses = Vec::new();
        if self.honest.failed() > 0 || self.honest.succeeded == 0 {
            misses.push(format!(
                "honest success {}: {}",
                percent(self.honest.success()),
                listed(&self.honest.failures)
            ));
        }
        if is_timed && self.honest.p99_ms > P99_MS {
            misses.push(format!("honest p99 {:.0} ms: longest {}", self.honest.p99_ms, slow(&self.honest.slowest)));
        }
        if let Some(peak) = self.peak_mib.filter(|peak| *peak > MEMORY_MIB) {
            misses.push(format!("peak memory {peak:.0} MiB"));
        }
        misses.extend(self.violations.iter().cloned());
        misses
    }
}

impl Row {
    /// True if everything is within the limits. False for an attack that was not run.
    pub fn is_met(&self, is_timed: bool) -> bool {
        matches!(&self.outcome, Outcome::Ran(ran) if ran.misses(is_timed).is_empty())
    }

    /// A line for people.
    pub fn line(&self, is_timed: bool) -> String {
        let ran = match &self.outcome {
            Outcome::Skipped(why) => return format!("{:<28} SKIPPED: {why}", self.name),
            Outcome::Ran(ran) => ran,
        };
        let mut line = format!(
            "{:<28} {:>7} {:>8.1} {:>8.1} {:>8} {:>10}/s  {}",
            self.name,
            percent(ran.honest.success()),
            ran.honest.p50_ms,
            ran.honest.p99_ms,
            ran.peak_mib.map_or_else(|| "?".to_owned(), |mib| format!("{mib:.0}")),
            ran.attacker.rate(),
            listed(&ran.attacker.answers),
        );
        if !ran.note.is_empty() {
            let _ = write!(line, "\n{:<28} {}", "", ran.note);
        }
        for miss in ran.misses(is_timed) {
            let _ = write!(line, "\n{:<28} MISSED: {miss}", "");
        }
        line
    }

    /// A line of the Markdown table.
    fn markdown(&self) -> String {
        let Outcome::Ran(ran) = &self.outcome else {
            return format!("| {} | not run | | | | | | |", self.what);
        };
        format!(
            "| {} | {} | {:.0} | {:.0} | {} | {} | {} | {} |",
            self.what,
            percent(ran.honest.success()),
            ran.honest.p50_ms,
            ran.honest.p99_ms,
            ran.peak_mib.map_or_else(|| "?".to_owned(), |mib| format!("{mib:.0}")),
            ran.attacker.rate(),
            listed(&ran.attacker.answers),
            ran.note,
        )
    }

    fn json(&self, is_timed: bool) -> Value {
        let ran = match &self.outcome {
            Outcome::Skipped(why) => return json!({"name": self.name, "skipped": why}),
            Outcome::Ran(ran) => ran,
        };
        json!({
            "name": self.name,
            "honest": {
                "succeeded": ran.honest.succeeded,
                "success_percent": ran.honest.success(),
                "failures": ran.honest.failures,
                "p50_ms": ran.honest.p50_ms,
                "p99_ms": ran.honest.p99_ms,
                "slowest_ms": ran.honest.slowest,
            },
            "peak_mib": ran.peak_mib,
            "attacker": {
                "attempts": ran.attacker.attempts,
                "seconds": ran.attacker.seconds,
                "answers": ran.attacker.answers,
            },
            "note": ran.note,
            "misses": ran.misses(is_timed),
        })
    }
}

impl Attacker {
    /// Attempts in a second.
    fn rate(&self) -> u64 {
        (self.attempts as f64 / self.seconds.max(0.001)).round() as u64
    }
}

/// What is above the lines of [`Row::line`].
pub fn heading() -> String {
    format!(
        "{:<28} {:>7} {:>8} {:>8} {:>8} {:>12}  answers",
        "attack", "honest", "p50, ms", "p99, ms", "MiB", "attempts"
    )
}

/// The Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    let mut text =
        "| Attack | Honest success | p50, ms | p99, ms | Peak memory, MiB | Attempts/s | Answers | Besides |\n\
                    |---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for row in rows {
        text += &row.markdown();
        text.push('\n');
    }
    text
}

/// All rows for machines.
pub fn json(rows: &[Row], is_timed: bool) -> Value {
    rows.iter().map(|row| row.json(is_timed)).collect::<Vec<_>>().into()
}

/// Only all of them is 100 %.
fn percent(share: f64) -> String {
    if share >= 100.0 { "100 %".to_owned() } else { format!("{:.1} %", (share * 10.0).floor() / 10.0) }
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none yet".to_owned();
    }
    counts.iter().map(|(name, count)| format!("{count} × {name}")).collect::<Vec<_>>().join(", ")
}

/// The kinds whose longest took more than the limit, or else the longest of all.
fn slow(longest: &BTreeMap<String, f64>) -> String {
    let mut all: Vec<_> = longest.iter().collect();
    all.sort_by(|one, other| other.1.total_cmp(one.1));
    let some = all.iter().take(4).map(|(kind, millis)| format!("{kind} {millis:.0}"));
    some.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(change: impl FnOnce(&mut Ran)) -> Row {
        let honest = Honest { succeeded: 1000, p50_ms: 4.0, p99_ms: 249.0, ..Honest::default() };
        let answers = BTreeMap::from([("429".to_owned(), 20), ("2xx".to_owned(), 3)]);
        let attacker = Attacker { attempts: 23, seconds: 2.0, answers };
        let mut ran = Ran { honest, attacker, peak_mib: Some(255.0), note: String::new(), violations: Vec::new() };
        change(&mut ran);
        Row { name: "flood", what: "a flood", outcome: Outcome::Ran(Box::new(ran)) }
    }

    #[test]
    fn each_reach_is_evaluated() {
        assert!(row(|_| {}).is_met(true));
        assert!(!row(|ran| ran.honest.failures = BTreeMap::from([("send: 503".to_owned(), 1)])).is_met(false));
        assert!(!row(|ran| ran.honest.succeeded = 0).is_met(false));
        assert!(!row(|ran| ran.peak_mib = Some(257.0)).is_met(false));
        assert!(!row(|ran| ran.violations.push("mail was lost".to_owned())).is_met(false));
        let slow = row(|ran| ran.honest.p99_ms = 251.0);
        assert!(!slow.is_met(true) && slow.is_met(false));
    }

    #[test]
    fn what_was_not_run_is_no_success() {
        let row = Row { name: "dns", what: "silent DNS", outcome: Outcome::Skipped("no root".to_owned()) };
        assert!(!row.is_met(false));
        assert!(row.line(true).contains("SKIPPED: no root") && row.markdown().contains("not run"));
    }

    #[test]
    fn one_failure_of_many_is_not_rounded_away() {
        let row = row(|ran| {
            ran.honest.succeeded = 99_999;
            ran.honest.failures.insert("log-in: 429".to_owned(), 1);
        });
        assert!(row.line(true).contains("99.9 %") && row.line(true).contains("1 × log-in: 429"), "{}", row.line(true));
    }

    #[test]
    fn the_table_has_as_many_cells_in_each_line() {
        let table = markdown(&[row(|_| {}), row(|ran| ran.note = "a note".to_owned())]);
        let cells: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(cells, [9, 9, 9, 9]);
        assert!(table.contains("12 |") && table.contains("3 × 2xx, 20 × 429"), "{table}");
    }
}
