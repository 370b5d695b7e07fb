//! The list of all metrics. `docs/METRICS.md` explains each of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_otlp::{MetricExporter, WithExportConfig};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use prometheus::{Registry, TextEncoder};

use crate::config;
use crate::telemetry::resource;

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
    pub(super) fn open(config: &config::Telemetry) -> Result<Self> {
        let registry = Registry::new();
        let page = opentelemetry_prometheus::exporter().with_registry(registry.clone()).scope_info_enabled(false);
        let mut provider = SdkMeterProvider::builder()
            .with_resource(resource())
            .with_reader(page.build().context("the page of metrics can't be made")?);
        if let Some(endpoint) = &config.otlp_endpoint {
            let exporter =
                MetricExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(config.export_timeout);
            let exporter = exporter.build().context("--otlp-endpoint can't be used for metrics")?;
            let reader = PeriodicReader::builder(exporter).with_interval(config.metrics_export_interval);
            provider = provider.with_reader(reader.build());
        }
        let provider = provider.build();
        let _meter: Meter = provider.meter("obscura");
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
