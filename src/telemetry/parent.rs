//! The trace that a request says it is a part of: W3C Trace Context, `traceparent` and `tracestate`.
//!
//! Every client may name a trace. What else the headers say counts only from a proxy that the operator trusts, since a client
//! could otherwise have the server keep every one of its traces, or write texts into the operator's telemetry.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// `00-`, 32 hex digits, `-`, 16, `-`, 2.
const LENGTH: usize = 55;
/// A longer state is left out, as the standard allows.
const LONGEST_STATE: usize = 512;

/// Who is one step before us in a trace, and what it says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    context: SpanContext,
    is_trusted: bool,
}

impl Parent {
    /// Reads the two headers; `None` when they are no context.
    pub fn read(traceparent: &[u8], tracestate: Option<&str>, is_trusted: bool) -> Option<Self> {
        let text = std::str::from_utf8(traceparent).ok().filter(|text| text.is_ascii())?;
        let (known, more) = text.split_at_checked(LENGTH)?;
        let mut fields = known.split('-');
        let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let lengths = [(version, 2), (trace, 32), (span, 16), (flags, 2)];
        if fields.next().is_some() || !lengths.iter().all(|(field, length)| field.len() == *length && is_hex(field)) {
            return None;
        }
        // A later version may say more behind what we know; this one may not.
        let may_be = match version {
            "ff" => false,
            "00" => more.is_empty(),
            _ => more.is_empty() || more.starts_with('-'),
        };
        if !may_be {
            return None;
        }
        let state = tracestate.filter(|state| is_trusted && state.len() <= LONGEST_STATE);
        let state = state.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE);
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
        let context =
            SpanContext::new(TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?, flags, true, state);
        context.is_valid().then_some(Self { context, is_trusted })
    }

    /// Whether a proxy that may say so says that this trace is not kept.
    pub(super) fn is_unsampled(&self) -> bool {
        self.is_trusted && !self.context.is_sampled()
    }
}

impl From<Parent> for SpanContext {
    fn from(parent: Parent) -> Self {
        parent.context
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn read(text: &str) -> Option<Parent> {
        Parent::read(text.as_bytes(), None, true)
    }

    #[test]
    fn the_example_of_the_standard_is_read() {
        let context = SpanContext::from(read(SAMPLED).unwrap());
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id().to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled() && context.is_remote());
    }

    #[test]
    fn only_a_trusted_proxy_leaves_a_trace_out_or_adds_a_state() {
        let unsampled = SAMPLED.replace("-01", "-00");
        for is_trusted in [true, false] {
            let parent = Parent::read(unsampled.as_bytes(), Some("a=1,b=2"), is_trusted).unwrap();
            assert_eq!(parent.is_unsampled(), is_trusted);
            let state = SpanContext::from(parent).trace_state().header();
            assert_eq!(state, if is_trusted { "a=1,b=2" } else { "" });
        }
    }

    #[test]
    fn a_state_that_is_too_long_or_none_is_left_out_and_the_rest_counts() {
        for state in ["x=".to_owned() + &"1".repeat(LONGEST_STATE), "no state".to_owned()] {
            let parent = Parent::read(SAMPLED.as_bytes(), Some(&state), true).unwrap();
            assert_eq!(SpanContext::from(parent).trace_state().header(), "");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_we_know_it() {
        assert!(read(&SAMPLED.replacen("00", "cc", 1)).is_some());
        assert!(read(&(SAMPLED.replacen("00", "cc", 1) + "-more")).is_some());
        assert!(read(&(SAMPLED.replacen("00", "cc", 1) + "more")).is_none());
    }

    #[test]
    fn what_the_standard_forbids_is_ignored() {
        let zero_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        let zero_span = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16));
        let forbidden = [
            String::new(),
            zero_trace,
            zero_span,
            SAMPLED.to_uppercase(),
            SAMPLED.replacen("00", "ff", 1),
            format!("{SAMPLED}-more"),
            format!(" {SAMPLED}"),
            SAMPLED[..54].to_owned(),
            SAMPLED.replace('-', "_"),
            SAMPLED.replace('4', "g"),
            "é".repeat(30),
        ];
        for text in forbidden {
            assert_eq!(read(&text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Parent::read(&bytes, None, false);
        }
    }
}
