//! The traces that a socket takes part in: those of messages on their way over it.

use std::ops::RangeInclusive;

use crate::model::ids::Position;
use crate::model::mail::Envelope;
use crate::telemetry::traces::{Span, Traces, Trail};

/// Traces that one socket takes part in at a time.
const MOST: usize = 4;

/// While no message of a trace that is kept is on its way, this is a null pointer.
#[derive(Default)]
pub(super) struct Trails(Option<Box<Parts>>);

#[derive(Default)]
struct Parts {
    /// From the signal on, until the message has been written.
    delivering: Vec<Span>,
    /// Set once the frame with the messages is under way.
    is_written_next: bool,
    /// What was delivered last, until it is acknowledged.
    delivered: Option<(RangeInclusive<Position>, Vec<Trail>)>,
}

impl Trails {
    /// A signal came that belongs to these traces.
    pub(super) fn signalled(&mut self, traces: &Traces, trails: Vec<Trail>) {
        if trails.is_empty() {
            return;
        }
        let parts = self.0.get_or_insert_default();
        let room = MOST.saturating_sub(parts.delivering.len());
        parts.delivering.extend(trails.into_iter().take(room).map(|trail| traces.follow("gateway.deliver", trail)));
    }

    /// The inbox has been read, and these messages, which may be none, are sent now.
    pub(super) fn read(&mut self, envelopes: &[Envelope]) {
        let Some(parts) = &mut self.0 else { return };
        parts.delivering.iter().for_each(|span| span.set("obscura.batch.messages", envelopes.len() as i64));
        match (envelopes.first(), envelopes.last()) {
            (Some(first), Some(last)) => {
                let trails = parts.delivering.iter().filter_map(Span::trail).collect();
                parts.delivered = Some((first.position..=last.position, trails));
                parts.is_written_next = true;
            }
            // An earlier batch has had them, or they are gone.
            _ => self.delivered(),
        }
    }

    /// A frame has been handed to the kernel.
    pub(super) fn written(&mut self) {
        if self.0.as_ref().is_some_and(|parts| parts.is_written_next) {
            self.delivered();
        }
    }

    fn delivered(&mut self) {
        let Some(parts) = &mut self.0 else { return };
        parts.is_written_next = false;
        parts.delivering.clear();
        if parts.delivered.is_none() {
            self.0 = None;
        }
    }

    /// A message has been acknowledged. The first ack for a batch stands for all of it.
    pub(super) fn acknowledged(&mut self, traces: &Traces, position: Position) -> Vec<Span> {
        let Some(parts) = &mut self.0 else { return Vec::new() };
        let is_of_batch = parts.delivered.as_ref().is_some_and(|(batch, _)| batch.contains(&position));
        let Some((_, trails)) = parts.delivered.take_if(|_| is_of_batch) else { return Vec::new() };
        if parts.delivering.is_empty() {
            self.0 = None;
        }
        trails.into_iter().map(|trail| traces.follow("gateway.ack", trail)).collect()
    }
}
