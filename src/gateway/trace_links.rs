//! The traces that a socket takes part in: those of messages on their way over it.

use std::ops::RangeInclusive;

use crate::model::ids::Position;
use crate::model::message::Envelope;
use crate::telemetry::traces::{Span, TraceLink, Traces};

/// Traces that one socket takes part in at a time.
const MAX_LINKS: usize = 4;

/// While no message of a trace that is kept is on its way, this is a null pointer.
#[derive(Default)]
pub(super) struct TraceLinks(Option<Box<Parts>>);

#[derive(Default)]
struct Parts {
    /// From the signal until the inbox is read.
    waiting: Vec<Span>,
    /// From then until the frame has been handed to the kernel.
    under_way: Vec<Span>,
    /// What was delivered last, until it is acknowledged.
    delivered: Option<(RangeInclusive<Position>, Vec<TraceLink>)>,
}

impl TraceLinks {
    /// A signal came that belongs to these traces.
    pub(super) fn signalled(&mut self, traces: &Traces, trace_links: Vec<TraceLink>) {
        if trace_links.is_empty() {
            return;
        }
        let parts = self.0.get_or_insert_default();
        let room = MAX_LINKS.saturating_sub(parts.waiting.len());
        parts.waiting.extend(
            trace_links.into_iter().take(room).map(|trace_link| traces.continue_from("gateway.deliver", trace_link)),
        );
    }

    /// The inbox has been read, and these messages are sent now. If there are none, an earlier frame has had them, or they
    /// are gone.
    pub(super) fn read(&mut self, envelopes: &[Envelope]) {
        let Some(parts) = &mut self.0 else { return };
        let spans = std::mem::take(&mut parts.waiting);
        spans.iter().for_each(|span| span.set("obscura.batch.messages", envelopes.len() as i64));
        if let (Some(first), Some(last), false) = (envelopes.first(), envelopes.last(), spans.is_empty()) {
            parts.delivered =
                Some((first.position..=last.position, spans.iter().filter_map(Span::trace_link).collect()));
            parts.under_way = spans;
        }
        self.tidy_up();
    }

    /// The frame under way has been handed to the kernel.
    pub(super) fn written(&mut self) {
        if let Some(parts) = &mut self.0 {
            parts.under_way.clear();
        }
    }

    /// A message has been acknowledged. The first ack for a frame stands for all of it.
    pub(super) fn acknowledged(&mut self, traces: &Traces, position: Position) -> Vec<Span> {
        let Some(parts) = &mut self.0 else { return Vec::new() };
        let is_of_frame = parts.delivered.as_ref().is_some_and(|(frame, _)| frame.contains(&position));
        let Some((_, trace_links)) = parts.delivered.take_if(|_| is_of_frame) else { return Vec::new() };
        self.tidy_up();
        trace_links.into_iter().map(|trace_link| traces.continue_from("gateway.ack", trace_link)).collect()
    }

    /// An idle session keeps nothing.
    fn tidy_up(&mut self) {
        let is_idle = |parts: &mut Box<Parts>| {
            parts.waiting.is_empty() && parts.under_way.is_empty() && parts.delivered.is_none()
        };
        self.0.take_if(is_idle);
    }
}

#[cfg(test)]
mod tests {
    use crate::clock::Timestamp;
    use crate::model::ids::{DeviceId, MessageId, UserId};
    use crate::model::message::Sealed;
    use crate::telemetry::traces::tests::{Ended, traces};

    use super::*;

    fn envelope(position: i64) -> Envelope {
        Envelope {
            position: Position(position),
            id: MessageId::random(),
            sender_user: UserId::random(),
            sender_device: DeviceId::random(),
            received_at: Timestamp::default(),
            body: Sealed(Vec::new().into()),
        }
    }

    /// A socket on which a message of a trace was signalled and read, and is being written.
    fn under_way() -> (TraceLinks, Traces, Ended) {
        let (traces, ended) = traces(1.0);
        let mut trace_links = TraceLinks::default();
        trace_links.signalled(&traces, vec![traces.begin("send").trace_link().unwrap()]);
        trace_links.read(&[envelope(7), envelope(9)]);
        (trace_links, traces, ended)
    }

    #[test]
    fn a_delivery_lasts_until_it_is_written_and_its_first_ack_is_a_part_of_it() {
        let (mut trace_links, traces, ended) = under_way();
        assert_eq!(ended.names(), ["send"]);
        trace_links.written();
        assert_eq!(ended.names(), ["send", "gateway.deliver"]);
        assert!(trace_links.acknowledged(&traces, Position(6)).is_empty(), "that was in another frame");
        assert_eq!(trace_links.acknowledged(&traces, Position(8)).len(), 1);
        assert!(trace_links.acknowledged(&traces, Position(7)).is_empty());
        let [deliver, ack] = ["gateway.deliver", "gateway.ack"].map(|name| ended.named(name));
        assert_eq!(ack.parent_span_id, deliver.span_context.span_id());
        trace_links.read(&[]);
        assert!(trace_links.0.is_none(), "nothing is kept when all is over");
    }

    #[test]
    fn what_is_signalled_while_a_frame_is_written_is_delivered_by_a_later_one() {
        let (mut trace_links, traces, ended) = under_way();
        trace_links.signalled(&traces, vec![traces.begin("another send").trace_link().unwrap()]);
        trace_links.written();
        assert_eq!(ended.names().iter().filter(|name| *name == "gateway.deliver").count(), 1);
        trace_links.read(&[]);
        assert_eq!(ended.names().iter().filter(|name| *name == "gateway.deliver").count(), 2);
    }

    #[test]
    fn a_crowd_of_traces_is_more_than_one_socket_takes_part_in() {
        let (mut trace_links, traces, ended) = under_way();
        (0..100).for_each(|_| trace_links.signalled(&traces, vec![traces.begin("send").trace_link().unwrap()]));
        drop(trace_links);
        assert_eq!(ended.names().iter().filter(|name| *name == "gateway.deliver").count(), 1 + MAX_LINKS);
    }
}
