//! How the server is: still starting, at work, or about to leave; and which of its parts answer.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Serialize;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::config;
use crate::disk::DiskSpace;

/// The health of the server. Cloning gives the same.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    config: config::Health,
    is_database_open: AtomicBool,
    is_storage_open: AtomicBool,
    /// There from the moment on in which clients are served.
    app: OnceLock<App>,
    is_shutting_down: AtomicBool,
    logged: LoggedOutages,
}

/// Which parts are known to be away, as the log has it: probes come all the time, and each outage is told of once.
#[derive(Default)]
struct LoggedOutages {
    database: AtomicBool,
    storage: AtomicBool,
    pubsub: AtomicBool,
}

/// The answer of `GET /readyz`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    status: Status,
    database: Status,
    storage: Status,
    pubsub: Status,
    /// Only while something is refused for lack of room. The node is ready all the same: acks make room again.
    #[serde(skip_serializing_if = "Option::is_none")]
    space: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// A part is away, or the whole is not ready.
    Error,
    /// The whole is ready; an optional part is away.
    Degraded,
    /// Not looked at yet, or not open.
    Starting,
}

impl Readiness {
    /// Whether the server should get requests.
    pub fn is_ready(&self) -> bool {
        matches!(self.status, Status::Ok | Status::Degraded)
    }
}

impl Health {
    /// Of a server that is about to start.
    pub fn new(config: &config::Health) -> Self {
        let inner = Inner {
            config: config.clone(),
            is_database_open: AtomicBool::default(),
            is_storage_open: AtomicBool::default(),
            app: OnceLock::new(),
            is_shutting_down: AtomicBool::default(),
            logged: LoggedOutages::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The database has been opened. The server goes on starting.
    pub fn set_database_open(&self) {
        self.inner.is_database_open.store(true, Ordering::Relaxed);
    }

    /// The attachment storage has been opened. The server goes on starting.
    pub fn set_storage_open(&self) {
        self.inner.is_storage_open.store(true, Ordering::Relaxed);
    }

    /// The start is over: from now on the parts are asked.
    pub fn set_serving(&self, app: &App) {
        // There is one start, so nothing was there.
        let _ = self.inner.app.set(app.clone());
    }

    /// The server will stop: it is not ready from now on, whatever it still answers.
    pub fn set_shutting_down(&self) {
        self.inner.is_shutting_down.store(true, Ordering::Relaxed);
    }

    /// What there is to say now. All parts are asked at the same time, each within a limit of its own.
    pub async fn check_all(&self) -> Readiness {
        let Some(app) = self.inner.app.get() else { return self.while_starting() };
        let Inner { config, logged, .. } = &*self.inner;
        let (database, storage, pubsub) = tokio::join!(
            check("database", &logged.database, config.database_timeout, app.store.check()),
            check("storage", &logged.storage, config.storage_timeout, app.blobs.check()),
            check("pubsub", &logged.pubsub, config.pubsub_timeout, app.bus.check()),
        );
        let space = match app.disk.space() {
            DiskSpace::Enough => None,
            DiskSpace::Low => Some("low"),
            DiskSpace::Full => Some("full"),
        };
        let status = if self.inner.is_shutting_down.load(Ordering::Relaxed) {
            Status::Error
        } else {
            overall(database, [(storage, config.is_storage_optional), (pubsub, config.is_pubsub_optional)])
        };
        Readiness { status, database, storage, pubsub, space }
    }

    fn while_starting(&self) -> Readiness {
        let word = |is_open: &AtomicBool| if is_open.load(Ordering::Relaxed) { Status::Ok } else { Status::Starting };
        Readiness {
            status: Status::Starting,
            database: word(&self.inner.is_database_open),
            storage: word(&self.inner.is_storage_open),
            pubsub: Status::Starting,
            space: None,
        }
    }
}

/// Without its database a server can do nothing. The other parts come with whether they are optional.
fn overall(database: Status, others: [(Status, bool); 2]) -> Status {
    let is_away = |word: Status| word != Status::Ok;
    if is_away(database) || others.iter().any(|(part, is_optional)| is_away(*part) && !is_optional) {
        Status::Error
    } else if others.iter().any(|(part, _)| is_away(*part)) {
        Status::Degraded
    } else {
        Status::Ok
    }
}

async fn check<E: Display>(
    part: &str,
    logged: &AtomicBool,
    limit: Duration,
    probe: impl Future<Output = Result<(), E>>,
) -> Status {
    let error = match tokio::time::timeout(limit, probe).await {
        Ok(Ok(())) => {
            if logged.swap(false, Ordering::Relaxed) {
                info!(part, "a part of the server is ready again");
            }
            return Status::Ok;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    if logged.swap(true, Ordering::Relaxed) {
        debug!(part, %error, "a part of the server is still not ready");
    } else {
        warn!(part, %error, "a part of the server is not ready");
    }
    Status::Error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_part_that_is_optional_may_be_away() {
        let (up, away) = (Status::Ok, Status::Error);
        for (database, storage, pubsub, status) in [
            (up, (up, false), (up, false), Status::Ok),
            (up, (away, false), (up, false), Status::Error),
            (up, (away, true), (up, false), Status::Degraded),
            (up, (away, true), (away, false), Status::Error),
            (up, (away, true), (away, true), Status::Degraded),
            (away, (up, true), (up, true), Status::Error),
        ] {
            assert_eq!(overall(database, [storage, pubsub]), status);
        }
    }
}
