//! What the operator sees of a transfer while it runs.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use tokio::time::Instant;

/// Lines that only tell of progress come at most this often.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lines on standard error: on a terminal one that changes in place, elsewhere one after another.
pub(super) struct Report {
    is_terminal: bool,
    /// What is being done: `copied`, `compared`.
    verb: &'static str,
    last: Option<Instant>,
    /// Whether a line waits to be written over.
    is_open: bool,
}

impl Report {
    pub(super) fn new() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), verb: "", last: None, is_open: false }
    }

    /// Begins a part of the work.
    pub(super) fn begin(&mut self, sentence: &str, verb: &'static str) {
        self.verb = verb;
        self.write(sentence, true);
    }

    /// So much of something is done. Most of these are passed over.
    pub(super) fn step(&mut self, what: &str, done: u64, all: u64) {
        let is_end = done >= all;
        if !is_end && self.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return;
        }
        let percent = done.min(all).saturating_mul(100).checked_div(all).unwrap_or(100);
        self.write(&format!("  {what}: {done} of {all} {} ({percent} %)", self.verb), is_end);
        self.last = Some(Instant::now());
    }

    fn write(&mut self, line: &str, is_end: bool) {
        let mut text = String::new();
        if self.is_open {
            // Back to the start of the line, which is emptied.
            text += "\r\x1b[K";
        }
        text += line;
        self.is_open = self.is_terminal && !is_end;
        if !self.is_open {
            text.push('\n');
        }
        // A closed standard error means that no report is wanted.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.is_open {
            let _ = std::io::stderr().write_all(b"\n");
        }
    }
}
