//! Records the operations of the honest clients.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;
use tokio::time::timeout;

use super::report::Honest;

/// How long an honest operation may take before it counts as failed.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Counts the operations of one run. Shared by all clients.
pub struct Record {
    state: Mutex<State>,
}

struct State {
    /// Microseconds.
    all: Histogram<u32>,
    kinds: BTreeMap<&'static str, Histogram<u32>>,
    failures: BTreeMap<String, u64>,
    /// When a message was sent, by receiving device, sender and number.
    awaited: HashMap<(usize, u32, u32), Instant>,
}

fn empty() -> Histogram<u32> {
    Histogram::new_with_bounds(1, 120_000_000, 3).expect("the bounds are constants, and sound")
}

impl Record {
    pub fn new() -> Self {
        let state = State { all: empty(), kinds: BTreeMap::new(), failures: BTreeMap::new(), awaited: HashMap::new() };
        Self { state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a success that took this long.
    pub fn success(&self, kind: &'static str, took: Duration) {
        let micros = took.as_micros() as u64;
        let mut state = self.state();
        state.all.saturating_record(micros);
        state.kinds.entry(kind).or_insert_with(empty).saturating_record(micros);
    }

    /// Counts a failure. Equal reasons are counted together, so they are short and have no ids in them.
    pub fn failure(&self, kind: &str, reason: &str) {
        *self.state().failures.entry(format!("{kind}: {reason}")).or_default() += 1;
    }

    /// Does an operation and counts it. An error, or more than [`PATIENCE`], is a failure.
    pub async fn operation<T>(&self, kind: &'static str, doing: impl Future<Output = Result<T>>) -> Result<T> {
        let began = Instant::now();
        let error = match timeout(PATIENCE, doing).await {
            Ok(Ok(value)) => {
                self.success(kind, began.elapsed());
                return Ok(value);
            }
            Ok(Err(error)) => reason(&error),
            Err(_) => "nothing in time".to_owned(),
        };
        self.failure(kind, &error);
        bail!("{kind}: {error}")
    }

    /// A message is on its way from now on.
    pub fn expect(&self, receiver: usize, sender: u32, number: u32) {
        self.state().awaited.insert((receiver, sender, number), Instant::now());
    }

    /// A message was not accepted, so it need not arrive.
    pub fn give_up(&self, receiver: usize, sender: u32, number: u32) {
        self.state().awaited.remove(&(receiver, sender, number));
    }

    /// Counts a message that arrived, once.
    pub fn arrived(&self, receiver: usize, sender: u32, number: u32) {
        let sent = self.state().awaited.remove(&(receiver, sender, number));
        if let Some(sent) = sent {
            self.success("delivery", sent.elapsed());
        }
    }

    /// Waits until all that was accepted has arrived, for [`PATIENCE`] at most. What is missing then has failed.
    pub async fn wait_for_deliveries(&self) {
        let until = Instant::now() + PATIENCE;
        while !self.state().awaited.is_empty() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let missing = std::mem::take(&mut self.state().awaited).len();
        (0..missing).for_each(|_| self.failure("delivery", "nothing in time"));
    }

    /// What there is so far.
    pub fn honest(&self) -> Honest {
        let state = self.state();
        let millis = |latencies: &Histogram<u32>, share: f64| latencies.value_at_quantile(share) as f64 / 1000.0;
        Honest {
            succeeded: state.all.len(),
            failures: state.failures.clone(),
            p50_ms: millis(&state.all, 0.5),
            p99_ms: millis(&state.all, 0.99),
            slowest: state.kinds.iter().map(|(kind, all)| ((*kind).to_owned(), all.max() as f64 / 1000.0)).collect(),
        }
    }
}

/// An error in a few words that are the same for the same cause.
fn reason(error: &anyhow::Error) -> String {
    let text = error.root_cause().to_string();
    // "the server answered 503 instead of 200: …"
    let status = text.strip_prefix("the server answered ").and_then(|rest| rest.get(..3));
    status.map_or(text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn operations_are_counted_by_their_outcome() {
        let record = Record::new();
        record.operation("send", async { Ok(()) }).await.unwrap();
        let failing = async { crate::http::Answer { status: 503, body: b"busy" }.expect(200) };
        assert!(record.operation("send", failing).await.is_err());
        let honest = record.honest();
        assert_eq!((honest.succeeded, honest.failures), (1, BTreeMap::from([("send: 503".to_owned(), 1)])));
    }

    #[tokio::test]
    async fn a_message_is_counted_once_when_it_arrives() {
        let record = Record::new();
        record.expect(1, 2, 3);
        record.arrived(1, 2, 4);
        record.arrived(1, 2, 3);
        record.arrived(1, 2, 3);
        record.expect(1, 2, 5);
        record.give_up(1, 2, 5);
        record.wait_for_deliveries().await;
        assert_eq!((record.honest().succeeded, record.honest().failures.len()), (1, 0));
    }
}
