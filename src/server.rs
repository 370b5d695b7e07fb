//! Builds the parts, opens both ports, starts the tasks, shuts down in order.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::api::connections::Connections;
use crate::api::limits::Limits;
use crate::api::{self, management};
use crate::app::App;
use crate::auth::passwords::Passwords;
use crate::auth::tokens::Tokens;
use crate::blobs::Blobs;
use crate::bus::Bus;
use crate::clock::{Clock, EARLIEST};
use crate::config::{self, Config};
use crate::disk::Disk;
use crate::listener::{self, Patience};
use crate::mailroom::Mailroom;
use crate::memory::Budget;
use crate::push::Push;
use crate::rates::Rates;
use crate::store::{self, Store};
use crate::sweeps;
use crate::tasks::{Tasks, jittered};
use crate::telemetry::Telemetry;

/// Connections to the management port: a few probes, never the public.
const MANAGEMENT_CONNECTIONS: usize = 64;
/// Memory for the bodies of all requests at once.
const BODIES_KIB: usize = 128 << 10;
/// Memory for the large frames of all sockets at once.
const FRAMES_KIB: usize = 64 << 10;
/// The first pause before a database that isn't there is tried again; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A running server.
pub struct Server {
    app: App,
    /// The mailroom, which outlives the entrances, because all of them call it.
    keepers: Tasks,
    /// The wire to other nodes, which outlives the mailroom, because the readers of the last group are woken over it.
    wires: Tasks,
    /// The management port. Nobody waits for those who ask there.
    probes: Tasks,
    api_address: SocketAddr,
    management_address: SocketAddr,
    /// Held for as long as the server runs: nobody else may use the file of a database.
    _lock: Option<File>,
}

impl Server {
    /// Starts a server. When it returns, both ports answer. Errors are sentences for whoever started it.
    pub async fn start(mut config: Config, clock: Clock, telemetry: Telemetry) -> Result<Self> {
        if clock.now() < EARLIEST {
            bail!("the clock of this machine is wrong (it is before 2026); set it, and start the server then");
        }
        config.open_data_dir()?;
        config.check_secret()?;
        let lock = config.database.file().map(lock_database).transpose()?;
        let config = Arc::new(config);
        let api = bind(&config.server, config.server.port).await?;
        let management = bind(&config.server, config.server.management_port).await?;
        let (api_address, management_address) = (api.local_addr()?, management.local_addr()?);
        let store = open_store(&config).await?;
        let blobs = Blobs::open(&config.attachments).await?;
        let (tasks, keepers, wires, probes) = (Tasks::new(), Tasks::new(), Tasks::new(), Tasks::new());
        let sockets = config.gateway.max_connections_per_device;
        let push = Push::prepare(&config, &store, &clock).await?;
        let bus = Bus::open(&config.pubsub, &config.notifications, sockets, &wires)?;
        // So that a node that says it is ready is ready. One without Valkey serves all the same.
        let _ = tokio::time::timeout(config.health.pubsub_timeout, bus.connected()).await;
        // Nothing can fail from here on, so no task is left behind by a start that was given up.
        let push = Push::start(push, &config, &store, &clock, &telemetry.traces, &keepers);
        let app = App {
            mailroom: Mailroom::open(
                store.clone(),
                bus.clone(),
                push.clone(),
                clock.clone(),
                telemetry.traces.clone(),
                &keepers,
            ),
            store,
            bus,
            push,
            blobs,
            passwords: Passwords::new(),
            tokens: Tokens::new(
                &config.auth.jwt_secret,
                config.auth.access_token_lifetime,
                config.auth.refresh_token_lifetime,
            ),
            bodies: Budget::new(BODIES_KIB),
            frames: Budget::new(FRAMES_KIB),
            rates: Rates::new(&config.account_rates),
            disk: Disk::new(
                config.database.file().and_then(Path::parent).map(Path::to_owned),
                config.disk_reserve_bytes,
                config.database.max_size_bytes,
            ),
            clock,
            tasks,
            metrics: telemetry.metrics.clone(),
            traces: telemetry.traces.clone(),
            config,
        };
        open(&app, &probes, api, management).await;
        info!(port = api_address.port(), management_port = management_address.port(), "the server is ready");
        Ok(Self { app, keepers, wires, probes, api_address, management_address, _lock: lock })
    }

    /// Where the API listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Where health is told.
    pub fn management_address(&self) -> SocketAddr {
        self.management_address
    }

    /// What requests use.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Ends when a background task has died, which is a defect; the server then has to stop.
    pub async fn failed(&self) {
        tokio::select! {
            () = self.app.tasks.failed() => {}
            () = self.keepers.failed() => {}
            () = self.wires.failed() => {}
            () = self.probes.failed() => {}
        }
    }

    /// Stops in order, within the shutdown timeout: no new connections, requests answered, sockets told (1001), their
    /// acks written, the last groups stored and signalled, the database closed.
    pub async fn stop(self) {
        let limit = self.app.config.server.shutdown_timeout;
        if tokio::time::timeout(limit, self.wind_down()).await.is_err() {
            warn!("not everything ended within the shutdown timeout; what is stored is safe");
        }
    }

    async fn wind_down(self) {
        // A share of the time is kept for the steps behind the clients, who may not hang up.
        let clients = self.app.config.server.shutdown_timeout.mul_f64(0.7);
        self.app.tasks.stop();
        if tokio::time::timeout(clients, self.app.tasks.ended()).await.is_err() {
            warn!("some clients did not let go in time");
        }
        self.keepers.stop();
        self.keepers.ended().await;
        self.wires.stop();
        self.wires.ended().await;
        self.probes.stop();
        self.app.store.close().await;
        info!("the server has stopped");
    }
}

async fn open(app: &App, probes: &Tasks, api: TcpListener, management: TcpListener) {
    let server = &app.config.server;
    let limits = Limits::new(&app.config.rate_limits, server.trusted_proxies.clone());
    let connections = Connections::new(
        listener::connections_that_fit(server.max_connections),
        server.max_connections_per_address,
        server.trusted_proxies.clone(),
    );
    let forgetful = limits.clone();
    sweeps::start(app, move || forgetful.sweep()).await;
    let router = api::router(app.clone(), &limits);
    let patience = Patience { head: server.header_timeout, write: app.config.gateway.write_timeout };
    app.tasks.spawn("api", listener::serve(api, router, connections, patience, app.tasks.clone()));
    let few = Connections::new(MANAGEMENT_CONNECTIONS, MANAGEMENT_CONNECTIONS, Vec::new());
    let router = management::router(app.clone());
    probes.spawn("management", listener::serve(management, router, few, patience, probes.clone()));
}

async fn bind(config: &config::Server, port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(config.host, port);
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "can't listen on {address}; stop what uses that port, or choose another with --server-port or --mgmt-port"
        )
    })
}

/// Opens the database. A server that isn't there yet is waited for: in a deployment whose parts start together, one is
/// always the last.
async fn open_store(config: &Config) -> Result<Store> {
    let mut pause = FIRST_WAIT;
    loop {
        match Store::open(&config.database, store::Limits::of(config)).await {
            Err(error) if error.is_temporary() => {
                warn!(%error, "waiting for the database; trying again in {} s", pause.as_secs());
                tokio::time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(LONGEST_WAIT);
            }
            opened => return Ok(opened?),
        }
    }
}

/// Makes sure that no other server uses this database: they would not see each other's signals.
pub(crate) fn lock_database(file: &Path) -> Result<File> {
    let mut path = file.as_os_str().to_owned();
    path.push(".lock");
    let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let lock = lock.with_context(|| format!("can't write {}; check its folder", path.display()))?;
    if lock.try_lock().is_err() {
        bail!("another server is already running on {}; stop it, or name another --data-dir", file.display());
    }
    Ok(lock)
}
