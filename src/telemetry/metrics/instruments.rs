//! The kinds of instruments.
//!
//! Counters and gauges are atomics that the SDK reads when the metrics are asked for: counting is one addition,
//! without a look-up or a lock (some 20 ns), and a series is there from the start, at zero. Histograms are the SDK's own,
//! because it has no other way in; recording in one costs 100 to 200 ns.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;

use crate::telemetry::metrics::labels::{Class, Label, Labels, Method};

/// Bounds of durations, in seconds.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Bounds of numbers of things.
const NUMBERS: &[f64] = &[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];
/// Routes of the API, with room for more.
const ROUTES: usize = 64;

/// What an instrument measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows, since the process started.
    Counter,
    /// A number as it is now.
    Gauge,
    /// How many there were of each size.
    Histogram,
}

/// What an instrument is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// In OTLP.
    pub name: &'static str,
    /// In UCUM, as OpenTelemetry asks for.
    pub unit: &'static str,
    /// What it says, in a sentence.
    pub meaning: &'static str,
}

/// Something that is in the list of metrics.
pub(super) trait Instrument {
    type Labels: Labels;
    const KIND: Kind;
    /// More series than these there can't be.
    const SERIES: usize = Self::Labels::COUNT;
    fn labels() -> Vec<Label> {
        Self::Labels::all()
    }
    fn make(meter: &Meter, name: Name) -> Self;
}

/// A number that only grows.
#[derive(Clone, Debug)]
pub struct Counter<L = ()> {
    values: Arc<[AtomicU64]>,
    labels: PhantomData<L>,
}

impl<L: Labels> Counter<L> {
    /// One more.
    pub fn increment(&self, labels: L) {
        self.add(labels, 1);
    }

    /// So many more.
    pub fn add(&self, labels: L, more: u64) {
        self.values[labels.place()].fetch_add(more, Ordering::Relaxed);
    }

    /// How many by now.
    pub fn value(&self, labels: L) -> u64 {
        self.values[labels.place()].load(Ordering::Relaxed)
    }
}

impl<L: Labels> Instrument for Counter<L> {
    type Labels = L;

    const KIND: Kind = Kind::Counter;

    fn make(meter: &Meter, name: Name) -> Self {
        let values: Arc<[AtomicU64]> = (0..L::COUNT).map(|_| AtomicU64::new(0)).collect();
        let (seen, attributes) = (values.clone(), L::combinations());
        meter
            .u64_observable_counter(name.name)
            .with_unit(name.unit)
            .with_description(name.meaning)
            .with_callback(move |observer| {
                for (value, attributes) in seen.iter().zip(&attributes) {
                    observer.observe(value.load(Ordering::Relaxed), attributes);
                }
            })
            .build();
        Self { values, labels: PhantomData }
    }
}

/// Time that only grows, in seconds, as another part counts it.
#[derive(Clone, Debug)]
pub struct TimeCounter<L = ()> {
    micros: Arc<[AtomicU64]>,
    labels: PhantomData<L>,
}

impl<L: Labels> TimeCounter<L> {
    /// So long by now.
    pub fn set(&self, labels: L, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.micros[labels.place()].fetch_max(micros, Ordering::Relaxed);
    }
}

impl<L: Labels> Instrument for TimeCounter<L> {
    type Labels = L;

    const KIND: Kind = Kind::Counter;

    fn make(meter: &Meter, name: Name) -> Self {
        let micros: Arc<[AtomicU64]> = (0..L::COUNT).map(|_| AtomicU64::new(0)).collect();
        let (seen, attributes) = (micros.clone(), L::combinations());
        meter
            .f64_observable_counter(name.name)
            .with_unit(name.unit)
            .with_description(name.meaning)
            .with_callback(move |observer| {
                for (micros, attributes) in seen.iter().zip(&attributes) {
                    observer.observe(micros.load(Ordering::Relaxed) as f64 / 1e6, attributes);
                }
            })
            .build();
        Self { micros, labels: PhantomData }
    }
}

/// A number as it is now.
#[derive(Clone, Debug)]
pub struct Gauge<L = ()> {
    values: Arc<[AtomicI64]>,
    labels: PhantomData<L>,
}

impl<L: Labels> Gauge<L> {
    /// Not shown until it is set.
    const UNKNOWN: i64 = i64::MIN;

    /// It is this now.
    pub fn set(&self, labels: L, value: impl TryInto<i64>) {
        self.values[labels.place()].store(value.try_into().unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// It isn't shown any more.
    pub fn unset(&self, labels: L) {
        self.set(labels, Self::UNKNOWN);
    }

    /// What it is, once it was set.
    pub fn value(&self, labels: L) -> Option<i64> {
        Some(self.values[labels.place()].load(Ordering::Relaxed)).filter(|value| *value != Self::UNKNOWN)
    }

    fn observed(meter: &Meter, name: Name, first: i64) -> Self {
        let values: Arc<[AtomicI64]> = (0..L::COUNT).map(|_| AtomicI64::new(first)).collect();
        let (seen, attributes) = (values.clone(), L::combinations());
        meter
            .i64_observable_gauge(name.name)
            .with_unit(name.unit)
            .with_description(name.meaning)
            .with_callback(move |observer| {
                for (value, attributes) in seen.iter().zip(&attributes) {
                    let value = value.load(Ordering::Relaxed);
                    if value != Self::UNKNOWN {
                        observer.observe(value, attributes);
                    }
                }
            })
            .build();
        Self { values, labels: PhantomData }
    }
}

impl<L: Labels> Instrument for Gauge<L> {
    type Labels = L;

    const KIND: Kind = Kind::Gauge;

    fn make(meter: &Meter, name: Name) -> Self {
        Self::observed(meter, name, Self::UNKNOWN)
    }
}

/// How many there are of something that comes and goes.
#[derive(Clone, Debug)]
pub struct ActiveGauge<L = ()>(Gauge<L>);

impl<L: Labels> ActiveGauge<L> {
    /// One more, until the answer is dropped.
    pub fn hold(&self, labels: L) -> ActiveGuard {
        let held = ActiveGuard { values: self.0.values.clone(), place: labels.place() };
        held.values[held.place].fetch_add(1, Ordering::Relaxed);
        held
    }

    /// How many there are.
    pub fn value(&self, labels: L) -> i64 {
        self.0.values[labels.place()].load(Ordering::Relaxed)
    }
}

impl<L: Labels> Instrument for ActiveGauge<L> {
    type Labels = L;

    const KIND: Kind = Kind::Gauge;

    fn make(meter: &Meter, name: Name) -> Self {
        Self(Gauge::observed(meter, name, 0))
    }
}

/// One of those that are counted now.
#[derive(Debug)]
pub struct ActiveGuard {
    values: Arc<[AtomicI64]>,
    place: usize,
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.values[self.place].fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many there were of each size.
#[derive(Clone, Debug)]
pub struct Histogram<L = ()> {
    inner: opentelemetry::metrics::Histogram<f64>,
    attributes: Arc<[Vec<KeyValue>]>,
    labels: PhantomData<L>,
}

impl<L: Labels> Histogram<L> {
    /// Something took so long.
    pub fn time(&self, labels: L, time: Duration) {
        self.inner.record(time.as_secs_f64(), &self.attributes[labels.place()]);
    }

    /// Something had so many parts.
    pub fn number(&self, labels: L, number: usize) {
        self.inner.record(number as f64, &self.attributes[labels.place()]);
    }
}

impl<L: Labels> Instrument for Histogram<L> {
    type Labels = L;

    const KIND: Kind = Kind::Histogram;

    fn make(meter: &Meter, name: Name) -> Self {
        Self { inner: histogram(meter, name), attributes: L::combinations().into(), labels: PhantomData }
    }
}

/// The durations of requests.
#[derive(Clone, Debug)]
pub struct Requests(opentelemetry::metrics::Histogram<f64>);

impl Requests {
    /// The label that no enum has: the routes are in `api`.
    pub const ROUTE: &'static str = "http.route";

    /// A request was answered. The route is one of the table of routes, and not what the client asked for.
    pub fn time(&self, route: &'static str, method: Method, class: Class, time: Duration) {
        // None of these texts is copied.
        let attributes = [
            KeyValue::new(Self::ROUTE, route),
            KeyValue::new("http.request.method", method.text()),
            KeyValue::new("http.response.status_class", class.text()),
        ];
        self.0.record(time.as_secs_f64(), &attributes);
    }
}

impl Instrument for Requests {
    type Labels = ();

    const KIND: Kind = Kind::Histogram;
    const SERIES: usize = ROUTES * Method::COUNT * Class::COUNT;

    fn labels() -> Vec<Label> {
        let values = &[
            ("/v1/…", "a path of the contract, with its varying segments in braces"),
            ("unmatched", "what was asked for is not there"),
        ];
        [vec![Label { name: Self::ROUTE, values }], Method::all(), Class::all()].concat()
    }

    fn make(meter: &Meter, name: Name) -> Self {
        Self(histogram(meter, name))
    }
}

fn histogram(meter: &Meter, name: Name) -> opentelemetry::metrics::Histogram<f64> {
    meter
        .f64_histogram(name.name)
        .with_unit(name.unit)
        .with_description(name.meaning)
        .with_boundaries(if name.unit == "s" { SECONDS } else { NUMBERS }.to_vec())
        .build()
}

/// The version of this server, as a label.
#[derive(Clone, Debug)]
pub struct Build;

impl Instrument for Build {
    type Labels = ();

    const KIND: Kind = Kind::Gauge;
    const SERIES: usize = 1;

    fn labels() -> Vec<Label> {
        vec![Label { name: "version", values: &[("a version", "of the server")] }]
    }

    fn make(meter: &Meter, name: Name) -> Self {
        let version = [KeyValue::new("version", env!("CARGO_PKG_VERSION"))];
        meter
            .i64_observable_gauge(name.name)
            .with_unit(name.unit)
            .with_description(name.meaning)
            .with_callback(move |observer| observer.observe(1, &version))
            .build();
        Self
    }
}
