//! Counts and durations. What there is stands in one list, in `list`; `docs/METRICS.md` explains each of them.
//!
//! Rooms get a handle when they are built, and count where something happens: `metrics.accepted.add((), rows)`.

mod instruments;
mod labels;
mod list;
pub mod process;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry::metrics::MeterProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{Instrument, MeterProviderBuilder, PeriodicReader, SdkMeterProvider, Stream};
use prometheus::{Registry, TextEncoder};

use crate::config;
use crate::telemetry::collector;

pub use instruments::{ActiveGauge, ActiveGuard, Counter, Gauge, Histogram, Kind, Name, Requests};
pub use labels::*;
pub use list::{Definition, Instruments, catalogue};

/// Every instrument of a server, as its fields. Cloning is cheap and gives the same ones.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    provider: SdkMeterProvider,
    registry: Registry,
    instruments: Instruments,
}

impl Deref for Metrics {
    type Target = Instruments;

    fn deref(&self) -> &Instruments {
        &self.0.instruments
    }
}

impl Metrics {
    /// Makes the instruments. Errors are about the options.
    pub(super) fn open(config: &config::Telemetry, resource: &Resource) -> Result<Self> {
        let builder = SdkMeterProvider::builder().with_resource(resource.clone());
        let Some(exporter) = collector::metrics(config)? else { return Self::with_page(builder) };
        let reader = PeriodicReader::builder(exporter).with_interval(config.metrics_export_interval);
        Self::with_page(builder.with_reader(reader.build()))
    }

    /// Instruments that are not read: for a room that is opened without a server around it, as a command does.
    pub fn unexported() -> Self {
        Self::of(SdkMeterProvider::builder().build(), Registry::new())
    }

    fn with_page(provider: MeterProviderBuilder) -> Result<Self> {
        let registry = Registry::new();
        let page = opentelemetry_prometheus::exporter().with_registry(registry.clone()).scope_info_enabled(false);
        let page = page.build().context("the page of metrics can't be made")?;
        // The SDK sets memory aside for as many series as there may be.
        let series: HashMap<&str, usize> = catalogue().iter().map(|metric| (metric.name.name, metric.series)).collect();
        let bounded = move |instrument: &Instrument| {
            let limit = *series.get(instrument.name())?;
            Stream::builder().with_cardinality_limit(limit).build().ok()
        };
        let provider = provider.with_reader(page).with_view(bounded).build();
        Ok(Self::of(provider, registry))
    }

    fn of(provider: SdkMeterProvider, registry: Registry) -> Self {
        let instruments = Instruments::make(&provider.meter("obscura"));
        Self(Arc::new(Inner { provider, registry, instruments }))
    }

    /// All of them as Prometheus reads them.
    pub fn page(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0.registry.gather())
    }

    pub(super) fn shut_down(&self, limit: Duration) {
        let _ = self.0.provider.shutdown_with_timeout(limit);
    }
}

#[cfg(test)]
mod tests;
