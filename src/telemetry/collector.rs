//! The way to the collector, for spans, measurements and log lines alike. It has an end for each call, and says once when
//! the collector doesn't take what it is sent, and once when it does again.
//!
//! The calls are made by threads of the library, one for each kind, from queues that drop what doesn't fit.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::LogBatch;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::SpanData;
use tokio::runtime::Handle;
use tracing::{debug, info, warn};

use crate::config;

/// The pause between two calls that bring spans or log lines, when there are few.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

/// Brings one kind of telemetry to the collector.
#[derive(Debug)]
pub(super) struct BoundedExporter<E> {
    exporter: E,
    kind: &'static str,
    limit: Duration,
    runtime: Handle,
    is_outage_logged: AtomicBool,
}

/// For spans, if there is a collector.
pub(super) fn spans(config: &config::Telemetry) -> Result<Option<BoundedExporter<SpanExporter>>> {
    open(config, "traces", |address, limit| address.onto(SpanExporter::builder().with_tonic(), limit).build())
}

/// For measurements, if there is a collector.
pub(super) fn metrics(config: &config::Telemetry) -> Result<Option<BoundedExporter<MetricExporter>>> {
    open(config, "metrics", |address, limit| address.onto(MetricExporter::builder().with_tonic(), limit).build())
}

/// For log lines, if there is a collector.
pub(super) fn logs(config: &config::Telemetry) -> Result<Option<BoundedExporter<LogExporter>>> {
    open(config, "logs", |address, limit| address.onto(LogExporter::builder().with_tonic(), limit).build())
}

/// Where the collector is.
struct Address<'a>(&'a str);

impl Address<'_> {
    fn onto<B: WithExportConfig + WithTonicConfig>(&self, builder: B, limit: Duration) -> B {
        let builder = builder.with_endpoint(self.0).with_timeout(limit);
        if self.0.starts_with("https:") {
            // Certificates are checked against those that the system trusts.
            return builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
        }
        builder
    }
}

fn open<E, B: std::error::Error + Send + Sync + 'static>(
    config: &config::Telemetry,
    kind: &'static str,
    build: impl FnOnce(Address<'_>, Duration) -> Result<E, B>,
) -> Result<Option<BoundedExporter<E>>> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
    // The library repeats the address, in which a password may be.
    let hidden = |error: B| format!("{:#}", anyhow::Error::from(error)).replace(endpoint, "***");
    let exporter = build(Address(endpoint), config.export_timeout)
        .map_err(|error| anyhow!("--otlp-endpoint can't be used for {kind}: {}", hidden(error)))?;
    let (limit, runtime) = (config.export_timeout, Handle::current());
    Ok(Some(BoundedExporter { exporter, kind, limit, runtime, is_outage_logged: AtomicBool::new(false) }))
}

impl<E> BoundedExporter<E> {
    /// The library's own limit is for one attempt, and not for connecting.
    async fn within_limit(&self, export: impl Future<Output = OTelSdkResult>) -> OTelSdkResult {
        let bounded = {
            // The library's threads know no runtime, and a timer needs one.
            let _entered = self.runtime.enter();
            tokio::time::timeout(self.limit, export)
        };
        let outcome = bounded.await.unwrap_or(Err(OTelSdkError::Timeout(self.limit)));
        self.log_outage(&outcome);
        outcome
    }

    fn log_outage(&self, outcome: &OTelSdkResult) {
        let kind = self.kind;
        match outcome {
            Ok(()) if self.is_outage_logged.swap(false, Ordering::Relaxed) => {
                info!(kind, "the collector takes them again")
            }
            Ok(()) => {}
            Err(error) if self.is_outage_logged.swap(true, Ordering::Relaxed) => {
                debug!(kind, %error, "the collector still does not take them");
            }
            Err(error) => warn!(kind, %error, "the collector does not take them; what it misses is dropped"),
        }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for BoundedExporter<SpanExporter> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.within_limit(self.exporter.export(batch)).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl opentelemetry_sdk::logs::LogExporter for BoundedExporter<LogExporter> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.within_limit(self.exporter.export(batch)).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl PushMetricExporter for BoundedExporter<MetricExporter> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.within_limit(self.exporter.export(metrics)).await
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}
