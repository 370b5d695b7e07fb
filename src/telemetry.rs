//! What the operator sees: logs, metrics and traces.
//!
//! Metrics are always kept, for the Prometheus page. With `--otlp-endpoint` metrics, traces and logs are sent to a
//! collector as well. A collector that is slow or away costs telemetry, never a message: what waits for it is bounded.

mod collector;
pub mod metrics;
pub mod parent;
pub mod throttle;
pub mod traces;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use opentelemetry::KeyValue;
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::{BatchConfigBuilder, BatchLogProcessor, SdkLoggerProvider};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};
use uuid::Uuid;

use crate::config::{self, LogFormat};
use crate::telemetry::collector::PAUSE;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;

/// What is logged when `RUST_LOG` doesn't say otherwise.
const LEVEL: &str = "info";
/// Whose log lines are not exported: those about an export would be exported in turn, and so on for ever.
const EXPORTERS: &[&str] = &["h2", "hyper", "tonic", "tower", "opentelemetry"];
/// Log lines that may wait for the collector. What comes on top is dropped.
const WAITING_LINES: usize = 4096;

/// The telemetry of one server. Cloning gives the same.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// Counts and durations.
    pub metrics: Metrics,
    /// The ways of requests and messages.
    pub traces: Traces,
    logs: Option<SdkLoggerProvider>,
}

impl Telemetry {
    /// Prepares all of it; with a collector, inside the runtime on which it is to be called. Nothing waits for the
    /// collector: it may come later. Errors are about the options.
    pub fn open(config: &config::Telemetry) -> Result<Self> {
        let resource = resource();
        Ok(Self {
            metrics: Metrics::open(config, &resource)?,
            traces: Traces::open(config, &resource)?,
            logs: log_provider(config, &resource)?,
        })
    }

    /// Starts logging to standard error, and to the collector when there is one. Once in a process. `RUST_LOG` chooses
    /// levels in the usual way. No ids, addresses, tokens, names or contents are logged above `debug`.
    pub fn start_logs(&self, format: LogFormat) {
        let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let logs = match format {
            LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).boxed(),
            LogFormat::Json => logs.json().boxed(),
        };
        let exportable = filter_fn(|line| !EXPORTERS.iter().any(|exporter| line.target().starts_with(exporter)));
        let exported = self.logs.as_ref().map(|logs| OpenTelemetryTracingBridge::new(logs).with_filter(exportable));
        tracing_subscriber::registry().with(chosen()).with(logs).with(exported).init();
    }

    /// Sends what has not been sent yet, as long as `limit` allows. Nothing more is sent afterwards. A collector that
    /// doesn't answer must not keep the process: its threads end with that.
    pub async fn flush(self, limit: Duration) {
        let Self { metrics, traces, logs } = self;
        let flushing = [
            tokio::task::spawn_blocking(move || traces.shut_down(limit)),
            tokio::task::spawn_blocking(move || metrics.shut_down(limit)),
            tokio::task::spawn_blocking(move || {
                let _ = logs.map(|logs| logs.shutdown_with_timeout(limit));
            }),
        ];
        let _ = tokio::time::timeout(limit, futures_util::future::join_all(flushing)).await;
    }
}

fn chosen() -> EnvFilter {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LEVEL));
    // These would write whole frames, that is content, at their finest levels.
    with_directives(filter, &["tungstenite=info", "tokio_tungstenite=info"])
}

fn with_directives(filter: EnvFilter, directives: &[&str]) -> EnvFilter {
    let directives = directives.iter().map(|directive| directive.parse().expect("a directive"));
    directives.fold(filter, EnvFilter::add_directive)
}

fn log_provider(config: &config::Telemetry, resource: &Resource) -> Result<Option<SdkLoggerProvider>> {
    let Some(exporter) = collector::logs(config)? else { return Ok(None) };
    let batches = BatchConfigBuilder::default().with_max_queue_size(WAITING_LINES).with_scheduled_delay(PAUSE).build();
    let lines = BatchLogProcessor::builder(exporter).with_batch_config(batches).build();
    Ok(Some(SdkLoggerProvider::builder().with_resource(resource.clone()).with_log_processor(lines).build()))
}

/// Who this is, as a collector shows it: a number made at each start, by which nodes can be told apart. No name of the
/// machine, which may be a person's.
fn resource() -> Resource {
    Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", env!("CARGO_PKG_NAME")),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", Uuid::new_v4().to_string()),
        ])
        .build()
}
