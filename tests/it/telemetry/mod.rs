//! What a collector gets: traces, metrics and logs, and what becomes of the server without one.

mod export;
mod journey;
mod requests;

use obscura_server::config::Config;

use crate::harness::Collector;

/// Everything is sent there, as soon as possible.
fn attach(config: &mut Config, collector: &Collector) {
    config.telemetry.otlp_endpoint = Some(collector.url());
}
