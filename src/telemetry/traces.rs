//! The ways of requests and messages, as spans for a collector. Without one nothing is kept, and nothing costs.
//!
//! Whether a trace is kept is decided by chance when it begins. A span of a trace that isn't kept is nothing: making,
//! passing and dropping it is a look at an `Option`. Names and values are words of ours and counts; what clients say
//! never comes into a span.

use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use opentelemetry::trace::{
    FutureExt, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanProcessor,
};

use crate::config;
use crate::telemetry::collector::{self, PAUSE};
use crate::telemetry::parent::Parent;

/// Spans that may wait for the collector, some 8 MiB. What comes on top is dropped.
const WAITING: usize = 8192;
/// Spans that are sent together.
const BATCH: usize = 1024;
/// Links of one span. A group may hold more sends than that.
const LINKS: u32 = 32;

/// What begins traces. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Traces(Option<Arc<TraceRecorder>>);

#[derive(Debug)]
struct TraceRecorder {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// The share of traces that is kept.
    ratio: f64,
}

impl Traces {
    /// Prepares the way to the collector, if there is one. Errors are about the options.
    pub(super) fn open(config: &config::Telemetry, resource: &Resource) -> Result<Self> {
        let Some(exporter) = collector::spans(config)? else { return Ok(Self(None)) };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(WAITING)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(PAUSE)
            .build();
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        Ok(Self::with_processor(processor, config.trace_sampling_ratio, resource))
    }

    /// Traces that end at this processor, such as one that a test has.
    pub fn with_processor(processor: impl SpanProcessor + 'static, ratio: f64, resource: &Resource) -> Self {
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.clone())
            // The choice is made before: what gets here is kept.
            .with_sampler(Sampler::AlwaysOn)
            .with_max_links_per_span(LINKS)
            .with_span_processor(processor)
            .build();
        let tracer = provider.tracer("obscura");
        Self(Some(Arc::new(TraceRecorder { provider, tracer, ratio })))
    }

    /// Whether any trace is kept.
    pub fn are_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// Begins a trace, which is kept by chance.
    pub fn begin(&self, name: impl Into<Cow<'static, str>>) -> Span {
        self.begin_as(SpanKind::Internal, name)
    }

    /// Begins a trace that is a call to another server. It is kept by chance, and the other isn't told of it.
    pub fn begin_client(&self, name: &'static str) -> Span {
        self.begin_as(SpanKind::Client, name)
    }

    fn begin_as(&self, kind: SpanKind, name: impl Into<Cow<'static, str>>) -> Span {
        match self.sampled() {
            Some(maker) => maker.span(name, kind, &Context::new()),
            None => Span::default(),
        }
    }

    /// Begins the part of a trace that is a request to us. Others may have begun the trace; whether our part is kept
    /// is up to chance all the same, unless a proxy that may say so says that it is not.
    pub fn begin_server(&self, name: impl Into<Cow<'static, str>>, parent: Option<Parent>) -> Span {
        if parent.as_ref().is_some_and(Parent::is_unsampled) {
            return Span::default();
        }
        let Some(maker) = self.sampled() else { return Span::default() };
        let before = parent.map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent.into()));
        maker.span(name, SpanKind::Server, &before)
    }

    /// Begins a trace of what is done for several at once. It is kept, and linked with each, if any of theirs is.
    pub fn begin_linked<'a>(&self, name: &'static str, parts: impl Iterator<Item = &'a mut Span>) -> Span {
        let Some(maker) = &self.0 else { return Span::default() };
        let mut parts = parts.filter(|part| part.is_recorded()).peekable();
        if parts.peek().is_none() {
            return Span::default();
        }
        let all = maker.span(name, SpanKind::Internal, &Context::new());
        parts.for_each(|part| {
            part.link(&all);
            all.link(part);
        });
        all
    }

    /// Goes on with a trace that another node or task has kept so far.
    pub fn continue_from(&self, name: &'static str, trace_link: TraceLink) -> Span {
        match &self.0 {
            Some(maker) => {
                let before = Context::new().with_remote_span_context(trace_link.into());
                maker.span(name, SpanKind::Internal, &before)
            }
            None => Span::default(),
        }
    }

    fn sampled(&self) -> Option<&TraceRecorder> {
        self.0.as_deref().filter(|maker| rand::random::<f64>() < maker.ratio)
    }

    pub(super) fn shut_down(&self, limit: Duration) {
        if let Some(maker) = &self.0 {
            let _ = maker.provider.shutdown_with_timeout(limit);
        }
    }
}

impl TraceRecorder {
    fn span(&self, name: impl Into<Cow<'static, str>>, kind: SpanKind, before: &Context) -> Span {
        start_span(&self.tracer, SpanBuilder::from_name(name).with_kind(kind), before)
    }
}

fn start_span(tracer: &SdkTracer, builder: SpanBuilder, before: &Context) -> Span {
    let span = tracer.build_with_context(builder, before);
    // The tracer comes along, so that whatever runs within this span can make parts of it.
    Span(Some(Context::new().with_value(tracer.clone()).with_span(span)))
}

/// A part of a trace; nothing, if the trace isn't kept. Dropping it ends it.
#[derive(Debug, Default)]
pub struct Span(Option<Context>);

impl Span {
    /// A part of what runs now (see [`Span::run`]).
    pub fn within(name: &'static str) -> Self {
        Self::of_kind(name, SpanKind::Internal)
    }

    /// A call to another server, as a part of what runs now.
    pub fn calling(name: &'static str) -> Self {
        Self::of_kind(name, SpanKind::Client)
    }

    fn of_kind(name: &'static str, kind: SpanKind) -> Self {
        let part = |now: &Context| {
            let tracer = now.get::<SdkTracer>()?;
            Some(start_span(tracer, SpanBuilder::from_name(name).with_kind(kind), now))
        };
        Context::map_current(part).unwrap_or_default()
    }

    /// Whether anything is written down.
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// Runs `future` as this: what it makes parts of and logs belongs to it.
    pub async fn run<F: Future>(&self, future: F) -> F::Output {
        match &self.0 {
            Some(context) => future.with_context(context.clone()).await,
            None => future.await,
        }
    }

    /// Runs `future` as this, and marks this as failed if it fails.
    pub async fn attempt<T, E>(&self, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let outcome = self.run(future).await;
        if outcome.is_err() {
            self.set_failed();
        }
        outcome
    }

    /// Writes down a word of ours or a number, never anything of a client.
    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    /// Writes down that something happened.
    pub fn note(&self, what: &'static str) {
        if let Some(context) = &self.0 {
            context.span().add_event(what, Vec::new());
        }
    }

    /// Marks it as failed. Why is in the log.
    pub fn set_failed(&self) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(""));
        }
    }

    fn link(&self, other: &Self) {
        if let (Some(context), Some(other)) = (&self.0, &other.0) {
            context.span().add_link(other.span().span_context().clone(), Vec::new());
        }
    }

    /// What is needed to go on with it elsewhere.
    pub fn trace_link(&self) -> Option<TraceLink> {
        let context = self.0.as_ref()?.span().span_context().clone();
        Some(TraceLink { trace: context.trace_id(), span: context.span_id() })
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

/// Has another task go on with what runs where this is called.
pub fn with_current_span<F: Future>(future: F) -> impl Future<Output = F::Output> {
    future.with_current_context()
}

/// Where a trace that is kept has got to: numbers that are random, unless the sender's client has named the trace, and
/// nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceLink {
    trace: TraceId,
    span: SpanId,
}

impl TraceLink {
    /// The length as bytes.
    pub const BYTES: usize = 24;

    /// For another node.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.trace.to_bytes());
        bytes[16..].copy_from_slice(&self.span.to_bytes());
        bytes
    }

    /// From another node; `None` if these can't be numbers of a trace.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let (trace, span) = bytes.split_first_chunk::<16>()?;
        let trace_link =
            Self { trace: TraceId::from_bytes(*trace), span: SpanId::from_bytes(*span.first_chunk::<8>()?) };
        (trace_link.trace != TraceId::INVALID && trace_link.span != SpanId::INVALID).then_some(trace_link)
    }
}

impl From<TraceLink> for SpanContext {
    fn from(trace_link: TraceLink) -> Self {
        Self::new(trace_link.trace, trace_link.span, TraceFlags::SAMPLED, true, TraceState::NONE)
    }
}

#[cfg(test)]
pub(crate) mod tests;
