//! What the servers of a run said of themselves, and what its clients used, written down when `OBSCURA_TEST_RECORD` names
//! a folder. `scripts/privacy` then looks for the one in the other.
//!
//! `used` has every id, name, token and address, one a line; `logs`, `output`, `spans` and `metrics` are what was said.
//! All of it in lower case.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};

use obscura_server::telemetry::Telemetry;
use obscura_server::telemetry::traces::Traces;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use reqwest::header::HeaderMap;
use serde_json::Value;
use tracing_subscriber::fmt::MakeWriter;
use uuid::Uuid;

/// Shorter texts are words that are found everywhere.
const SHORTEST: usize = 8;
/// Members whose values are words of the contract, or ours.
const WORDS: &[&str] = &["database", "error", "provider", "pubsub", "space", "status", "storage"];
/// Headers that say who asks.
const HEADERS: &[&str] = &["authorization", "idempotency-key", "x-request-id", "x-forwarded-for", "user-agent"];

struct Record {
    folder: PathBuf,
    used: Mutex<(HashSet<String>, File)>,
    said: Mutex<HashMap<&'static str, File>>,
}

static RECORD: LazyLock<Option<Record>> = LazyLock::new(|| {
    let folder = PathBuf::from(std::env::var_os("OBSCURA_TEST_RECORD")?);
    std::fs::create_dir_all(&folder).expect("the folder of the record");
    let used = Mutex::new((HashSet::new(), open(&folder, "used")));
    // As servers log by default, each of this process into the same file.
    let logs = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::INFO).with_writer(Logs);
    logs.try_init().expect("nobody else listens to the logs");
    Some(Record { folder, used, said: Mutex::default() })
});

fn open(folder: &std::path::Path, name: &str) -> File {
    let options = OpenOptions::new().create(true).append(true).open(folder.join(name));
    options.expect("a file of the record")
}

impl Record {
    fn say(&self, name: &'static str, text: &str) {
        let text = text.to_lowercase() + "\n";
        let mut said = self.said.lock().unwrap();
        let file = said.entry(name).or_insert_with(|| open(&self.folder, name));
        file.write_all(text.as_bytes()).expect("the record is written");
    }

    fn use_text(&self, text: &str) {
        let text = text.trim().to_lowercase();
        if text.len() < SHORTEST || text.contains('\n') {
            return;
        }
        let mut used = self.used.lock().unwrap();
        if used.0.insert(text.clone()) {
            let line = text + "\n";
            used.1.write_all(line.as_bytes()).expect("the record is written");
        }
    }

    fn use_id(&self, id: Uuid) {
        self.use_text(&id.hyphenated().to_string());
        self.use_text(&id.simple().to_string());
    }

    /// Every text in a document.
    fn use_json(&self, value: &Value) {
        match value {
            Value::String(text) => self.use_word(text),
            Value::Array(values) => values.iter().for_each(|value| self.use_json(value)),
            Value::Object(members) => {
                let own_members = members.iter().filter(|(name, _)| !WORDS.contains(&name.as_str()));
                own_members.for_each(|(_, value)| self.use_json(value));
            }
            _ => {}
        }
    }

    fn use_word(&self, text: &str) {
        match text.parse() {
            Ok(id) => self.use_id(id),
            Err(_) => self.use_text(text),
        }
    }
}

/// A request is being made.
pub fn request(path: &str, headers: &HeaderMap, body: Option<&[u8]>) {
    let Some(record) = &*RECORD else { return };
    // The parts of a path that no route has are ids and worse.
    let parts = path.split(['/', '?', '=', '&']).filter(|part| part.parse::<Uuid>().is_ok() || part.len() > 24);
    parts.for_each(|part| record.use_word(part));
    for value in HEADERS.iter().flat_map(|name| headers.get_all(*name)).filter_map(|value| value.to_str().ok()) {
        record.use_word(value.strip_prefix("Bearer ").unwrap_or(value));
    }
    if let Some(value) = body.and_then(|body| serde_json::from_slice(body).ok()) {
        record.use_json(&value);
    }
}

/// A request was answered.
pub fn answer(body: &[u8]) {
    let Some(record) = &*RECORD else { return };
    if let Ok(value) = serde_json::from_slice(body) {
        record.use_json(&value);
    }
}

/// A message came with this id.
pub fn message(id: &[u8]) {
    let Some(record) = &*RECORD else { return };
    if let Ok(id) = Uuid::from_slice(id) {
        record.use_id(id);
    }
}

/// A program has said this on its standard output and standard error.
pub fn output(text: &str) {
    let Some(record) = &*RECORD else { return };
    record.say("output", &without_welcome(text));
}

/// Where a server listens is the operator's, and is told to nobody else. Those lines are indented, and no line of a log is:
/// an address that a log tells stays.
pub fn without_welcome(output: &str) -> String {
    let is_welcome = |line: &str| line.starts_with("  ") && line.contains("http://");
    output.lines().filter(|line| !is_welcome(line)).collect::<Vec<_>>().join("\n")
}

/// A server of this process has this page of metrics at its end.
pub fn metrics(page: &str) {
    let Some(record) = &*RECORD else { return };
    record.say("metrics", page);
}

/// Has all traces of a server of this process written down, unless it sends them somewhere.
pub fn listen_to(telemetry: &mut Telemetry) {
    if RECORD.is_some() && !telemetry.traces.are_recorded() {
        telemetry.traces = Traces::with_processor(Spans, 1.0, &opentelemetry_sdk::Resource::builder_empty().build());
    }
}

#[derive(Debug)]
struct Spans;

impl SpanProcessor for Spans {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        let Some(record) = &*RECORD else { return };
        let SpanData { name, attributes, events, links, status, span_context, parent_span_id, .. } = span;
        let ids = (span_context, parent_span_id);
        record.say("spans", &format!("{name} {attributes:?} {events:?} {links:?} {status:?} {ids:?}"));
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: std::time::Duration) -> OTelSdkResult {
        Ok(())
    }
}

struct Logs;

impl MakeWriter<'_> for Logs {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

impl Write for Logs {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if let Some(record) = &*RECORD {
            record.say("logs", String::from_utf8_lossy(line).trim_end());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
