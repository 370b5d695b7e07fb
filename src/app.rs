//! `App`: what every request and session may use.

use std::ops::Deref;
use std::sync::Arc;

use crate::auth::passwords::Passwords;
use crate::auth::tokens::Tokens;
use crate::blobs::Blobs;
use crate::bus::Bus;
use crate::clock::Clock;
use crate::config::Config;
use crate::delivery::MessageWriter;
use crate::disk::Disk;
use crate::files::Files;
use crate::limits::{AccountLimits, Limits};
use crate::push::Push;
use crate::store::Store;
use crate::tasks::Tasks;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;

/// Everything a request, session or job may use. Cloning counts one reference, whatever it holds: each request does so
/// several times.
#[derive(Clone)]
pub struct App(Arc<Parts>);

impl App {
    /// Puts the parts together.
    pub fn of(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

impl Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// The parts of a server, as fields of [`App`].
pub struct Parts {
    /// Takes sends and acks.
    pub message_writer: MessageWriter,
    /// What must survive a restart.
    pub store: Store,
    /// What an embedded server has open, compared with what is at its paths.
    pub files: Files,
    /// Signals between sessions.
    pub bus: Bus,
    /// Wakes phones that aren't connected.
    pub push: Push,
    /// Attachments.
    pub blobs: Blobs,
    /// Hashes and checks passwords.
    pub passwords: Passwords,
    /// Makes and checks tokens.
    pub tokens: Tokens,
    /// The budgets of addresses and accounts.
    pub limits: Limits,
    /// The budgets for sign-ups, passwords and uploads.
    pub account_limits: AccountLimits,
    /// Whether there is room to grow.
    pub disk: Disk,
    /// What time it is.
    pub clock: Clock,
    /// Counts and durations, for the operator.
    pub metrics: Metrics,
    /// The ways of requests and messages, for the operator.
    pub traces: Traces,
    /// Owner of everything that runs in the background.
    pub tasks: Tasks,
    /// The limits and intervals of the rooms that answer clients.
    pub config: Arc<Config>,
}
