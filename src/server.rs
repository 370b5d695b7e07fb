//! Builds the parts, opens both ports, starts the tasks, shuts down in order.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, TcpSocket};
use tracing::{debug, error, info, warn};

use crate::api::connections::Connections;
use crate::api::health::Health;
use crate::api::{self, management};
use crate::app::{App, Parts};
use crate::auth::passwords::Passwords;
use crate::auth::tokens::Tokens;
use crate::blobs::Blobs;
use crate::bus::Bus;
use crate::clock::{Clock, EARLIEST};
use crate::config::Config;
use crate::delivery::{MessageWriter, Notifier};
use crate::disk::{Disk, reserve};
use crate::files::{self, Files, Lock};
use crate::limits::{AccountLimits, Limits};
use crate::listener::{self, Timeouts};
use crate::push::Push;
use crate::store::{self, Store};
use crate::sweeps;
use crate::tasks::{Tasks, jittered};
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::{Metrics, Port};

/// Connections to the management port: a few probes, never the public.
const MANAGEMENT_CONNECTIONS: usize = 64;
/// Those of one address.
const MANAGEMENT_CONNECTIONS_OF_ADDRESS: usize = 16;
/// How long a probe may take to say what it asks for, at most.
const MANAGEMENT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a server whose files are lost still answers, so that clients get a 503 and probes see why.
const FINAL_ANSWER_TIME: Duration = Duration::from_secs(5);
/// The first pause before a database that isn't there is tried again; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A running server.
pub struct Server {
    app: App,
    health: Health,
    task_groups: TaskGroups,
    api_address: SocketAddr,
    management_address: SocketAddr,
    /// Held for as long as the server runs: no other process may use the file of a database.
    _lock: Option<Lock>,
}

/// How the time of the drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// After the delay.
    InOrder,
    /// A background task has died.
    Failed,
}

/// Who owns the background tasks, in the order in which they are stopped.
#[derive(Default)]
struct TaskGroups {
    /// What serves clients, and the repeated jobs. The app has it too.
    client_tasks: Tasks,
    /// The message writer, which outlives the entrances, because all of them call it.
    delivery_tasks: Tasks,
    /// The broker connection, which outlives the message writer, because the receivers of the last group are notified over it.
    broker_tasks: Tasks,
    /// The management port, which is there before everything else. Its requests are not waited for.
    management_tasks: Tasks,
}

impl Server {
    /// Starts a server. The management port answers at once. When this returns, so does the API; until then connections
    /// to it are refused, so that no client hangs. Errors are sentences for the operator.
    pub async fn start(mut config: Config, clock: Clock, telemetry: Telemetry) -> Result<Self> {
        if clock.now() < EARLIEST {
            bail!("the clock of this machine is wrong (it is before 2026); set it, and start the server then");
        }
        files::reject_orphaned_files(&config)?;
        let lock = open_folder(&mut config).await?;
        let api = listener::claim(SocketAddr::new(config.server.host, config.server.port))?;
        let management = listener::listen(listener::claim(SocketAddr::new(
            config.server.management_host,
            config.server.management_port,
        ))?)?;
        let (api_address, management_address) = (api.local_addr()?, management.local_addr()?);
        let (health, task_groups) = (Health::new(&config.health), TaskGroups::default());
        serve_probes(management, &health, &telemetry, &config, &task_groups.management_tasks);
        debug!(management_port = management_address.port(), "the server is starting");
        // No task is left behind by a start that is given up.
        let app = open(Arc::new(config), clock, telemetry, &health, &task_groups)
            .await
            .inspect_err(|_| task_groups.stop_all())?;
        serve_clients(&app, api).await.inspect_err(|_| task_groups.stop_all())?;
        health.set_serving(&app);
        info!(port = api_address.port(), management_port = management_address.port(), "the server is ready");
        Ok(Self { app, health, task_groups, api_address, management_address, _lock: lock })
    }

    /// Where the API listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Where health and metrics are told.
    pub fn management_address(&self) -> SocketAddr {
        self.management_address
    }

    /// What requests use.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Ends when the server has to stop by itself: a background task has died, which is a defect, or its files are lost.
    pub async fn failed(&self) {
        let lost = async {
            self.app.files.lost().await;
            tokio::time::sleep(FINAL_ANSWER_TIME).await;
        };
        tokio::select! {
            () = lost => return,
            () = self.task_groups.client_tasks.failed() => {}
            () = self.task_groups.delivery_tasks.failed() => {}
            () = self.task_groups.broker_tasks.failed() => {}
            () = self.task_groups.management_tasks.failed() => {}
        }
        self.app.metrics.tasks_died.increment(());
    }

    /// Whether what the server has open is still at its paths. Only an embedded server can lose files.
    pub async fn has_its_files(&self) -> bool {
        sweeps::check_files(&self.app).await;
        !self.app.files.are_lost()
    }

    /// Says that it is not ready, and serves on for the drain delay, so that balancers send no client here any more when
    /// [`Server::stop`] follows. It ends early when a task dies.
    pub async fn drain(&self) -> Drained {
        self.health.set_shutting_down();
        let delay = self.app.config.server.drain_delay;
        if !delay.is_zero() {
            info!("not ready any more; everything goes on for another {} s", delay.as_secs());
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => Drained::InOrder,
            () = self.failed() => Drained::Failed,
        }
    }

    /// Stops in order, within the shutdown timeout: no new connections, requests answered, sockets told (1001), their
    /// acks written, the last groups stored and signalled, the database closed. Returns false if the files of the server are
    /// lost, so that what was stored last is lost as well.
    pub async fn stop(self) -> bool {
        self.health.set_shutting_down();
        let limit = self.app.config.server.shutdown_timeout;
        if tokio::time::timeout(limit, self.wind_down()).await.is_err() {
            warn!("not everything ended within the shutdown timeout; what is stored is safe");
        }
        !self.app.files.are_lost()
    }

    async fn wind_down(&self) {
        // A share of the time is kept for the steps behind the clients, who may not hang up.
        let clients = self.app.config.server.shutdown_timeout.mul_f64(0.7);
        let task_groups = &self.task_groups;
        task_groups.client_tasks.stop();
        if tokio::time::timeout(clients, task_groups.client_tasks.ended()).await.is_err() {
            warn!("some clients did not let go in time");
        }
        task_groups.delivery_tasks.stop();
        task_groups.delivery_tasks.ended().await;
        task_groups.broker_tasks.stop();
        task_groups.broker_tasks.ended().await;
        task_groups.management_tasks.stop();
        sweeps::check_files(&self.app).await;
        self.app.store.close().await;
        info!("the server has stopped");
    }
}

impl TaskGroups {
    /// Ends everything without an order, and does not wait.
    fn stop_all(&self) {
        [&self.client_tasks, &self.delivery_tasks, &self.broker_tasks, &self.management_tasks]
            .into_iter()
            .for_each(Tasks::stop);
    }
}

/// Compares the clock with the time that the database remembers. The first start on a database has only the clock of the
/// database server to compare with, if that has one.
async fn resume(clock: &Clock, store: &Store) -> store::Result<()> {
    let mut seen = store.stored_time().await?;
    if seen.is_none() {
        store.store_time(store.server_time().await?.unwrap_or(clock.now())).await?;
        seen = store.stored_time().await?;
    }
    if let Some(seen) = seen {
        clock.resume(seen.at, seen.server);
    }
    Ok(())
}

/// Opens the parts one after another.
async fn open(
    config: Arc<Config>,
    clock: Clock,
    telemetry: Telemetry,
    health: &Health,
    task_groups: &TaskGroups,
) -> Result<App> {
    let metrics = &telemetry.metrics;
    let store = open_store(&config, metrics).await?;
    health.set_database_open();
    resume(&clock, &store).await.context("the database can't be asked for the time")?;
    let blobs = open_storage(&config, health, &task_groups.client_tasks).await?;
    let sockets = config.gateway.max_connections_per_device;
    let files = Files::watch(&config).context("the files of the server can't be looked at")?;
    let push = Push::prepare(&config, &store, &clock).await?;
    let bus = Bus::open(&config.pubsub, &config.notifications, sockets, metrics, &task_groups.broker_tasks)?;
    // So that a node that says it is ready is ready. One without Valkey serves all the same.
    let _ = tokio::time::timeout(config.health.pubsub_timeout, bus.connected()).await;
    let push = Push::start(push, &config, &store, &clock, &telemetry, &task_groups.delivery_tasks);
    Ok(App::of(Parts {
        message_writer: MessageWriter::open(
            config.messaging.grouping,
            store.clone(),
            Notifier { bus: bus.clone(), push: push.clone() },
            clock.clone(),
            &telemetry,
            &task_groups.delivery_tasks,
        ),
        store,
        files,
        bus,
        push,
        blobs,
        passwords: Passwords::new(metrics),
        tokens: Tokens::new(
            &config.auth.jwt_secret,
            config.auth.jwt_secret_previous.as_ref(),
            config.auth.access_token_lifetime,
            config.auth.refresh_token_lifetime,
        ),
        limits: Limits::new(&config.rate_limits, &config.account_rates, api::largest_guest_body(&config)),
        account_limits: AccountLimits::new(&config.accounts),
        disk: Disk::new(
            config.database.file().and_then(Path::parent).map(Path::to_owned),
            config.disk_reserve_bytes,
            config.database.max_size_bytes,
        ),
        clock,
        tasks: task_groups.client_tasks.clone(),
        metrics: metrics.clone(),
        traces: telemetry.traces,
        config,
    }))
}

async fn serve_clients(app: &App, api: TcpSocket) -> Result<()> {
    let server = &app.config.server;
    if server.trusts_private_networks_by_default() {
        info!(
            "the client addresses that peers in private networks forward (X-Forwarded-For) are believed, as of a reverse \
             proxy; if other clients connect from such networks, set --trusted-proxies to the proxy's address alone"
        );
    }
    let max = listener::connections_that_fit(server.max_connections);
    let of_address = server.max_connections_per_address;
    let connections = Connections::new(max, of_address, Some(server.clone())).with_rate(of_address);
    sweeps::start(app).await;
    let api = listener::listen(api)?;
    let router = api::router(app.clone());
    app.tasks.spawn(
        "api",
        listener::serve(
            api,
            router,
            connections,
            timeouts(&app.config),
            (Port::Api, app.metrics.clone()),
            app.tasks.clone(),
        ),
    );
    Ok(())
}

fn serve_probes(
    management: TcpListener,
    health: &Health,
    telemetry: &Telemetry,
    config: &Config,
    management_tasks: &Tasks,
) {
    let router = management::router(health.clone(), telemetry.metrics.clone());
    // Without a rate: probes and scrapers may open one for each question.
    let few = Connections::new(MANAGEMENT_CONNECTIONS, MANAGEMENT_CONNECTIONS_OF_ADDRESS, None);
    let timeouts = Timeouts { head: config.server.header_timeout.min(MANAGEMENT_PATIENCE), ..timeouts(config) };
    management_tasks.spawn(
        "management",
        listener::serve(
            management,
            router,
            few,
            timeouts,
            (Port::Management, telemetry.metrics.clone()),
            management_tasks.clone(),
        ),
    );
}

fn timeouts(config: &Config) -> Timeouts {
    Timeouts { head: config.server.header_timeout, write: config.gateway.write_timeout }
}

/// Locks the database of an embedded server, and makes sure that its folder can be written.
async fn open_folder(config: &mut Config) -> Result<Option<Lock>> {
    let file = config.database.file().map(Path::to_owned);
    let mut lock = None;
    if let Some(file) = &file {
        // A lock file that is there needs no room on the disk. So a start that is refused leaves the reserve of the running
        // server alone.
        if files::lock_path(file).exists() {
            lock = Some(files::lock(file, config.data_dir.as_deref()).await?);
        }
        // On a full disk the start needs what is held back for it: to see that the folder can be written, and for the log of
        // the database. A job makes it anew.
        reserve::release(file);
    }
    config.open_data_dir()?;
    config.check_secret()?;
    if let (Some(file), None) = (&file, &lock) {
        lock = Some(files::lock(file, config.data_dir.as_deref()).await?);
    }
    Ok(lock)
}

/// Opens the database. A server that isn't there yet is waited for: in a deployment whose parts start together, one is
/// always the last.
async fn open_store(config: &Config, metrics: &Metrics) -> Result<Store> {
    let mut pause = FIRST_WAIT;
    loop {
        match Store::open(&config.database, store::Limits::of(config), metrics).await {
            Err(error) if error.is_temporary() => {
                warn!(%error, "waiting for the database; trying again in {} s", pause.as_secs());
                tokio::time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(LONGEST_WAIT);
            }
            opened => return Ok(opened?),
        }
    }
}

/// Opens the storage of attachments. One that is away is waited for; in the background, if the server may do without.
async fn open_storage(config: &Arc<Config>, health: &Health, tasks: &Tasks) -> Result<Blobs> {
    let blobs = Blobs::prepare(&config.attachments)?;
    let (waiting_blobs, waiting_config) = (blobs.clone(), config.clone());
    let mut usable = Box::pin(async move { waiting_blobs.until_usable(&waiting_config.attachments).await });
    if !config.health.is_storage_optional {
        usable.await?;
    } else if let Ok(usable) = tokio::time::timeout(config.health.storage_timeout, &mut usable).await {
        usable?;
    } else {
        warn!("the server starts without the attachment storage, which it may do without");
        let stopping = tasks.clone();
        tasks.spawn_tracked(async move {
            tokio::select! {
                () = stopping.stopping() => {}
                usable = usable => match usable {
                    Ok(()) => info!("the attachment storage is there"),
                    Err(error) => error!(%error, "the attachment storage can't be used"),
                },
            }
        });
        return Ok(blobs);
    }
    health.set_storage_open();
    Ok(blobs)
}
