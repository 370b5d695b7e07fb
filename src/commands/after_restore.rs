//! `after-restore`: makes a restored backup safe to serve from.

use anyhow::bail;

use crate::config::Config;
use crate::files;
use crate::store::{self, Store};
use crate::telemetry::metrics::Metrics;

/// Sees to it that no one-time prekey that may have been handed out since the backup is handed out again.
#[tokio::main(flavor = "current_thread")]
pub(super) async fn run(config: Config) -> anyhow::Result<String> {
    // In PostgreSQL the operator has to see to it that no node runs.
    let _lock = match config.database.file() {
        Some(file) if !file.exists() => {
            bail!("there is no database at {}; restore the backup first", file.display())
        }
        Some(file) => Some(files::lock(file, config.data_dir.as_deref()).await?),
        None => None,
    };
    let store = Store::open(&config.database, store::Limits::of(&config), &Metrics::unexported()).await?;
    let dropped = store.delete_one_time_prekeys().await?;
    store.close().await;
    Ok(format!("Dropped {dropped} one-time prekeys. The server can be started; devices will be asked for new ones."))
}
