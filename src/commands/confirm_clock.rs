//! `confirm-clock`: ends the doubt of running servers about a clock that the operator has looked at.

use std::time::SystemTime;

use anyhow::bail;

use crate::clock::{Clock, EARLIEST};
use crate::config::Config;
use crate::store::{self, Store};
use crate::telemetry::metrics::Metrics;

/// Sets the time that the database remembers to the one of this machine. It runs beside servers: they see it within seconds.
#[tokio::main(flavor = "current_thread")]
pub(super) async fn run(config: Config) -> anyhow::Result<String> {
    let now = Clock::system().wall();
    if now < EARLIEST {
        bail!("the clock of this machine is wrong (it is before 2026); set it first");
    }
    if let Some(file) = config.database.file().filter(|file| !file.exists()) {
        bail!("there is no database at {}", file.display());
    }
    let store = Store::open(&config.database, store::Limits::of(&config), &Metrics::unexported()).await?;
    let confirmed = store.set_time(now).await;
    store.close().await;
    confirmed?;
    let time = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + now.since_epoch());
    Ok(format!("Confirmed: it is {time}. Servers whose clock says the same believe it within ten seconds."))
}
