//! What every mode is given.

use std::sync::{Arc, Mutex, PoisonError};

use tempfile::TempDir;

use crate::leftovers::Leftovers;
use crate::meter::Meter;
use crate::options::Options;
use crate::server::Server;
use crate::watch::Watch;

/// Cloning gives the same.
#[derive(Clone)]
pub struct Job {
    pub options: Arc<Options>,
    pub watch: Arc<Watch>,
    leftovers: Arc<Mutex<Leftovers>>,
}

impl Job {
    pub fn new(options: Options) -> Self {
        Self { options: Arc::new(options), watch: Arc::new(Watch::new()), leftovers: Arc::default() }
    }

    /// Says what is being done now to this server.
    pub fn phase(&self, what: &str, server: &Server) {
        self.watch.phase(what, server.process());
    }

    /// Keeps folders that are not needed any more, emptied, until all runs are over. See [`Leftovers`].
    pub fn put_away(&self, folders: impl IntoIterator<Item = TempDir>) {
        let mut leftovers = self.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        for folder in folders {
            if let Err(error) = leftovers.keep(folder) {
                eprintln!("a folder could not be emptied and was removed: {error}");
            }
        }
    }

    /// Counts what this server and its companions use from now on.
    pub fn meter(&self, server: &Server) -> Meter {
        Meter::start(server.processes(), &self.options.others)
    }
}
