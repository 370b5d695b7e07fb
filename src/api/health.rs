//! How the server is: still starting, at work, or about to leave; and which of its parts answer.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Serialize;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::config;
use crate::disk::Room;

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
    is_leaving: AtomicBool,
    told: Told,
}

/// Which parts are known to be away, as the log has it: probes come all the time, and each outage is told of once.
#[derive(Default)]
struct Told {
    database: AtomicBool,
    storage: AtomicBool,
    pubsub: AtomicBool,
}

/// The answer of `GET /readyz`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    status: Word,
    database: Word,
    storage: Word,
    pubsub: Word,
    /// Only while something is refused for lack of room. The node is ready all the same: acks make room again.
    #[serde(skip_serializing_if = "Option::is_none")]
    space: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Word {
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
        matches!(self.status, Word::Ok | Word::Degraded)
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
            is_leaving: AtomicBool::default(),
            told: Told::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The database has been opened. The server goes on starting.
    pub fn database_is_open(&self) {
        self.inner.is_database_open.store(true, Ordering::Relaxed);
    }

    /// The attachment storage has been opened. The server goes on starting.
    pub fn storage_is_open(&self) {
        self.inner.is_storage_open.store(true, Ordering::Relaxed);
    }

    /// The start is over: from now on the parts are asked.
    pub fn at_work(&self, app: &App) {
        // There is one start, so nothing was there.
        let _ = self.inner.app.set(app.clone());
    }

    /// The server will stop: it is not ready from now on, whatever it still answers.
    pub fn leaving(&self) {
        self.inner.is_leaving.store(true, Ordering::Relaxed);
    }

    /// What there is to say now. All parts are asked at the same time, each within a limit of its own.
    pub async fn look(&self) -> Readiness {
        let Some(app) = self.inner.app.get() else { return self.while_starting() };
        let Inner { config, told, .. } = &*self.inner;
        let (database, storage, pubsub) = tokio::join!(
            check("database", &told.database, config.database_timeout, app.store.check()),
            check("storage", &told.storage, config.storage_timeout, app.blobs.check()),
            check("pubsub", &told.pubsub, config.pubsub_timeout, app.bus.check()),
        );
        let space = match app.disk.room() {
            Room::Enough => None,
            Room::Low => Some("low"),
            Room::Full => Some("full"),
        };
        let status = if self.inner.is_leaving.load(Ordering::Relaxed) {
            Word::Error
        } else {
            overall(database, [(storage, config.is_storage_optional), (pubsub, config.is_pubsub_optional)])
        };
        Readiness { status, database, storage, pubsub, space }
    }

    fn while_starting(&self) -> Readiness {
        let word = |is_open: &AtomicBool| if is_open.load(Ordering::Relaxed) { Word::Ok } else { Word::Starting };
        Readiness {
            status: Word::Starting,
            database: word(&self.inner.is_database_open),
            storage: word(&self.inner.is_storage_open),
            pubsub: Word::Starting,
            space: None,
        }
    }
}

/// Without its database a server can do nothing. The other parts come with whether they are optional.
fn overall(database: Word, others: [(Word, bool); 2]) -> Word {
    let is_away = |word: Word| word != Word::Ok;
    if is_away(database) || others.iter().any(|(part, is_optional)| is_away(*part) && !is_optional) {
        Word::Error
    } else if others.iter().any(|(part, _)| is_away(*part)) {
        Word::Degraded
    } else {
        Word::Ok
    }
}

async fn check<E: Display>(
    part: &str,
    told: &AtomicBool,
    limit: Duration,
    look: impl Future<Output = Result<(), E>>,
) -> Word {
    let error = match tokio::time::timeout(limit, look).await {
        Ok(Ok(())) => {
            if told.swap(false, Ordering::Relaxed) {
                info!(part, "a part of the server is ready again");
            }
            return Word::Ok;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    if told.swap(true, Ordering::Relaxed) {
        debug!(part, %error, "a part of the server is still not ready");
    } else {
        warn!(part, %error, "a part of the server is not ready");
    }
    Word::Error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_part_that_is_optional_may_be_away() {
        let (up, away) = (Word::Ok, Word::Error);
        for (database, storage, pubsub, status) in [
            (up, (up, false), (up, false), Word::Ok),
            (up, (away, false), (up, false), Word::Error),
            (up, (away, true), (up, false), Word::Degraded),
            (up, (away, true), (away, false), Word::Error),
            (up, (away, true), (away, true), Word::Degraded),
            (away, (up, true), (up, true), Word::Error),
        ] {
            assert_eq!(overall(database, [storage, pubsub]), status);
        }
    }
}
