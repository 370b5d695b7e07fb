use std::sync::Mutex;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::SpanData;

use super::*;
use crate::tasks::Tasks;

/// Keeps what has ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.lock().unwrap().push(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

pub(crate) fn traces(ratio: f64) -> (Traces, Ended) {
    let ended = Ended::default();
    (Traces::with_processor(ended.clone(), ratio, &Resource::builder_empty().build()), ended)
}

impl Ended {
    pub(crate) fn named(&self, name: &str) -> SpanData {
        self.0.lock().unwrap().iter().find(|span| span.name == name).expect("a span").clone()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().map(|span| span.name.to_string()).collect()
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

#[test]
fn the_ratio_is_the_share_of_traces_that_is_kept() {
    for (ratio, expected) in [(0.0, 0..=0), (0.25, 350..=650), (1.0, 2000..=2000)] {
        let (traces, ended) = traces(ratio);
        (0..2000).for_each(|_| drop(traces.begin("something")));
        assert!(expected.contains(&ended.count()), "{} at {ratio}", ended.count());
    }
}

/// A client that chooses the number of a trace does not choose with it whether the trace is kept.
#[test]
fn the_number_of_a_trace_is_no_reason_to_keep_it() {
    let (traces, ended) = traces(0.25);
    for number in ["00000000000000000000000000000001", "ffffffffffffffffffffffffffffffff"] {
        for is_trusted in [true, false] {
            let text = format!("00-{number}-0000000000000001-01");
            let before = ended.count();
            (0..1000).for_each(|_| drop(traces.begin_server("asked", Parent::read(text.as_bytes(), None, is_trusted))));
            assert!((150..=350).contains(&(ended.count() - before)));
        }
    }
}

#[tokio::test]
async fn parts_belong_to_what_they_run_within_also_in_another_task() {
    let (traces, ended) = traces(1.0);
    let whole = traces.begin("whole");
    whole
        .run(async {
            tokio::task::yield_now().await;
            let (part, tasks) = (Span::within("part"), Tasks::new());
            part.run(async { tasks.run_to_end(with_current_span(async { drop(Span::calling("elsewhere")) })).await })
                .await;
        })
        .await;
    assert!(!Span::within("outside").is_recorded());
    drop(whole);
    let [whole, part, elsewhere] = ["whole", "part", "elsewhere"].map(|name| ended.named(name));
    assert_eq!(part.parent_span_id, whole.span_context.span_id());
    assert_eq!(elsewhere.parent_span_id, part.span_context.span_id());
    assert_eq!(elsewhere.span_context.trace_id(), whole.span_context.trace_id());
    assert_eq!((ended.count(), elsewhere.span_kind), (3, SpanKind::Client));
}

#[tokio::test]
async fn servers_in_one_process_have_traces_of_their_own() {
    let ((one, seen), (other, unseen)) = (traces(1.0), traces(1.0));
    one.begin("whole").run(async { drop(Span::within("part")) }).await;
    assert_eq!((seen.count(), unseen.count()), (2, 0));
    drop(other);
}

#[test]
fn nothing_comes_of_what_is_not_kept() {
    let (traces, ended) = traces(0.0);
    let span = traces.begin("whole");
    span.set("key", 1);
    span.note("something");
    span.set_failed();
    assert_eq!((span.is_recorded(), span.trace_link()), (false, None));
    assert!(!traces.begin_linked("group", [Span::default(), span].iter_mut()).is_recorded());
    assert_eq!(ended.count(), 0);
    assert_eq!(size_of::<Traces>(), size_of::<usize>(), "one pointer, which is null without a collector");
}

#[test]
fn a_group_and_its_parts_are_linked_both_ways_up_to_a_bound() {
    let (traces, ended) = traces(1.0);
    let mut parts: Vec<_> = (0..100).map(|_| traces.begin("part")).collect();
    parts.push(Span::default());
    drop(traces.begin_linked("group", parts.iter_mut()));
    parts.clear();
    let (group, part) = (ended.named("group"), ended.named("part"));
    assert_eq!(group.links.len(), LINKS as usize);
    assert_eq!(part.links.len(), 1);
    assert_eq!(part.links[0].span_context.span_id(), group.span_context.span_id());
}

#[test]
fn a_trace_link_continues_a_trace_from_another_node() {
    let ((here, one), (there, other)) = (traces(1.0), traces(0.0));
    let span = here.begin("send");
    let trace_link = TraceLink::from_bytes(&span.trace_link().unwrap().to_bytes()).unwrap();
    drop(there.continue_from("deliver", trace_link));
    drop(span);
    let (send, deliver) = (one.named("send"), other.named("deliver"));
    assert_eq!(deliver.span_context.trace_id(), send.span_context.trace_id());
    assert_eq!(deliver.parent_span_id, send.span_context.span_id());
    assert_eq!(TraceLink::from_bytes(&[0; TraceLink::BYTES]), None);
}

#[tokio::test]
async fn an_attempt_that_fails_is_marked() {
    let (traces, ended) = traces(1.0);
    let _: Result<(), ()> = traces.begin("bad").attempt(async { Err(()) }).await;
    let _: Result<(), ()> = traces.begin("good").attempt(async { Ok(()) }).await;
    assert_eq!(ended.named("bad").status, Status::error(""));
    assert_eq!(ended.named("good").status, Status::Unset);
}
