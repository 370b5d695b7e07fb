//! Push: "wake up", told to a phone that isn't connected.
//!
//! Code that queues mail, or sees that prekeys run low, says so here, and never waits. After a grace the device is looked
//! at: only the inbox says whether it is still to be woken, so neither a connection nor an ack cancels anything that mail
//! is left for. The queue between the two holds nothing but "look at this device then", and is rebuilt from the inboxes.

mod attempts;
mod janitor;
mod pending_pushes;
mod provider_client;
mod providers;
mod queue;
mod rebuild;
mod refusals;
mod waiting_jobs;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::bus::BusError;
use crate::clock::Clock;
use crate::config::Config;
use crate::model::ids::{Address, DeviceNo};
use crate::model::push::Subscription;
use crate::push::janitor::Janitor;
use crate::push::pending_pushes::PendingPushes;
use crate::push::provider_client::ProviderClients;
use crate::push::providers::{Provider, VapidKey};
use crate::push::queue::{Job, Queue, Reason};
use crate::push::worker::Worker;
use crate::store::{Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::Telemetry;

/// The name under which the key of Web Push is kept.
const VAPID: &str = "vapid";

/// Why pushes can't be sent. Each says in one sentence what to do.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// A file of the options can't be used.
    #[error("{option}: \"{path}\" can't be used: {what}", path = path.display())]
    File {
        /// Which option names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Some of the four options are missing.
    #[error("--apns-key-file, --apns-key-id, --apns-team-id and --apns-topic come together; give all four or none")]
    Apns,
    /// The certificates of the system can't be used.
    #[error("the push providers can't be called: {0}; install the certificates of the authorities (ca-certificates)")]
    Client(reqwest::Error),
    /// The address of Valkey is wrong.
    #[error(transparent)]
    Queue(#[from] BusError),
    /// The key of Web Push can't be read or kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key of Web Push is damaged.
    #[error("the key for Web Push in the database (table server_keys) is damaged; restore it from a backup")]
    Key,
}

/// The way to the phones. Cloning gives the same one.
#[derive(Clone)]
pub struct Push {
    pending: Arc<PendingPushes>,
    clients: Arc<ProviderClients>,
    grace: std::time::Duration,
}

/// Everything that pushes need, before the first task runs.
pub struct Prepared {
    queue: Queue,
    clients: ProviderClients,
}

impl Push {
    /// Reads the keys of the providers, and makes that of Web Push if there is none. It waits for the disk.
    pub async fn prepare(config: &Config, store: &Store, clock: &Clock) -> Result<Prepared, PushError> {
        let made = VapidKey::make().ok_or(PushError::Key)?;
        let key = VapidKey::read(&store.server_key(VAPID, &made).await?).ok_or(PushError::Key)?;
        let concurrency = config.notifications.worker_concurrency;
        let clients = ProviderClients::new(
            Provider::fcm(config, clock)?,
            Provider::apns(config, clock)?,
            Provider::web_push(config, clock, key)?,
            concurrency,
        );
        if config.fcm.project_id.is_some() && config.fcm.credentials_file.is_none() {
            warn!("there is an --fcm-project-id, and no --fcm-credentials-file: its pushes are only logged");
        }
        info!(fcm = clients.fcm.is_configured(), apns = clients.apns.is_configured(), webpush = true, "push providers");
        Ok(Prepared { queue: Queue::open(&config.pubsub, &config.notifications)?, clients })
    }

    /// Starts the worker, the janitor and the rebuilding. They run until `tasks` are stopped.
    pub fn start(
        prepared: Prepared,
        config: &Arc<Config>,
        store: &Store,
        clock: &Clock,
        telemetry: &Telemetry,
        tasks: &Tasks,
    ) -> Self {
        let push = Self {
            pending: Arc::default(),
            clients: Arc::new(prepared.clients),
            grace: config.notifications.push_delay,
        };
        let metrics = &telemetry.metrics;
        let janitor = Janitor::start(&config.notifications, store.clone(), metrics.clone(), tasks);
        let worker = Worker::new(prepared.queue, &push, janitor, config, (store, clock, telemetry));
        tasks.spawn("push", worker.run(tasks.clone()));
        let seen = (clock.clone(), metrics.clone());
        rebuild::start(push.pending.clone(), &config.notifications, store.clone(), seen, tasks);
        push
    }

    /// Mail was queued for these devices.
    pub fn new_messages(&self, addresses: &[Address]) {
        self.schedule(addresses, Reason::NewMessages);
    }

    /// These devices have few one-time prekeys left.
    pub fn keys_low(&self, addresses: &[Address]) {
        self.schedule(addresses, Reason::Keys);
    }

    /// A socket of this device is gone. If mail is left behind, the device is woken again.
    pub fn session_ended(&self, device: DeviceNo) {
        self.pending.ended(device);
    }

    /// The public key that a client gives to its Web Push service.
    pub fn vapid_key(&self) -> &str {
        match &self.clients.web_push.provider {
            Provider::WebPush(web_push) => web_push.public_key(),
            _ => "",
        }
    }

    /// Whether pushes may be sent to this subscription.
    pub fn accepts(&self, subscription: &Subscription) -> bool {
        matches!(&self.clients.web_push.provider, Provider::WebPush(web_push) if web_push.accepts(subscription))
    }

    fn schedule(&self, addresses: &[Address], reason: Reason) {
        let due = Instant::now() + self.grace;
        self.pending.add(addresses.iter().map(|address| Job { device: address.device, reason }), due);
    }
}
