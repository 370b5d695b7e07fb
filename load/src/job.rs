//! What every mode is given.

use std::sync::Arc;

use crate::meter::Meter;
use crate::options::Options;
use crate::server::Server;
use crate::watch::Watch;

/// Cloning gives the same.
#[derive(Clone)]
pub struct Job {
    pub options: Arc<Options>,
    pub watch: Arc<Watch>,
}

impl Job {
    pub fn new(options: Options) -> Self {
        Self { options: Arc::new(options), watch: Arc::new(Watch::new()) }
    }

    /// Says what is being done now to this server.
    pub fn phase(&self, what: &str, server: &Server) {
        self.watch.phase(what, server.process());
    }

    /// Counts what this server and its companions use from now on.
    pub fn meter(&self, server: &Server) -> Meter {
        Meter::start(server.processes(), &self.options.others)
    }
}
