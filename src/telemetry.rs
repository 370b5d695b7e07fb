//! Logs.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// What is logged when `RUST_LOG` doesn't say otherwise.
const LEVEL: &str = "info";

/// Starts logging to standard error. `RUST_LOG` chooses levels in the usual way. No ids, addresses, tokens, names or
/// contents are logged above `debug`.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LEVEL));
    // These would write whole frames, that is content, at their finest levels.
    let filter = ["tungstenite=info", "tokio_tungstenite=info"]
        .into_iter()
        .fold(filter, |filter, directive| filter.add_directive(directive.parse().expect("a directive")));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().init(),
    }
}
