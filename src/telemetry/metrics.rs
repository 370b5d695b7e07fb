//! The list of all metrics. `docs/METRICS.md` explains each of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use prometheus::{Registry, TextEncoder};

use crate::config;
use crate::telemetry::collector;

/// Every instrument of a server. Cloning is cheap and gives the same ones.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Instruments>);

#[derive(Debug)]
struct Instruments {
    provider: SdkMeterProvider,
    registry: Registry,
}

impl Metrics {
    /// Makes the instruments. Errors are about the options.
    pub(super) fn open(config: &config::Telemetry, resource: &Resource) -> Result<Self> {
        let registry = Registry::new();
        let page = opentelemetry_prometheus::exporter().with_registry(registry.clone()).scope_info_enabled(false);
        let mut provider = SdkMeterProvider::builder()
            .with_resource(resource.clone())
            .with_reader(page.build().context("the page of metrics can't be made")?);
        if let Some(exporter) = collector::metrics(config)? {
            let reader = PeriodicReader::builder(exporter).with_interval(config.metrics_export_interval);
            provider = provider.with_reader(reader.build());
        }
        let provider = provider.build();
        let meter: Meter = provider.meter("obscura");
        meter
            .u64_gauge("obscura.build.info")
            .with_description("Always 1; its label says which version runs.")
            .build()
            .record(1, &[KeyValue::new("version", env!("CARGO_PKG_VERSION"))]);
        Ok(Self(Arc::new(Instruments { provider, registry })))
    }

    /// All of them as Prometheus reads them.
    pub fn page(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0.registry.gather())
    }

    pub(super) fn shut_down(&self, limit: Duration) {
        let _ = self.0.provider.shutdown_with_timeout(limit);
    }
}
