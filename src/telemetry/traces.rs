//! The ways of requests and messages, as spans for a collector. Without one nothing is kept, and nothing costs.

use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};

use crate::config;
use crate::telemetry::resource;

/// What makes spans. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Traces {
    provider: Option<SdkTracerProvider>,
}

impl Traces {
    /// Prepares the way to the collector, if there is one. Errors are about the options.
    pub(super) fn open(config: &config::Telemetry) -> Result<Self> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(Self { provider: None }) };
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(config.export_timeout);
        let exporter = exporter.build().context("--otlp-endpoint can't be used for traces")?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.trace_sampling_ratio))))
            .with_batch_exporter(exporter)
            .build();
        Ok(Self { provider: Some(provider) })
    }

    pub(super) fn shut_down(&self, limit: Duration) {
        if let Some(provider) = &self.provider {
            let _ = provider.shutdown_with_timeout(limit);
        }
    }
}
