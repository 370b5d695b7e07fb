//! Builds the parts, opens both ports, starts the tasks, shuts down in order.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
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
use crate::store::{self, Store};
use crate::sweeps;
use crate::tasks::Tasks;

/// Connections to the management port: a few probes, never the public.
const MANAGEMENT_CONNECTIONS: usize = 64;
/// Memory for the bodies of all requests at once.
const BODIES_KIB: usize = 128 << 10;
/// Memory for the large frames of all sockets at once.
const FRAMES_KIB: usize = 64 << 10;
/// How long an unused server address is tried before the start is given up.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// A running server.
pub struct Server {
    app: App,
    /// The mailroom, which outlives the entrances, because all of them call it.
    keepers: Tasks,
    /// The management port. Nobody waits for those who ask there.
    probes: Tasks,
    api_address: SocketAddr,
    management_address: SocketAddr,
    /// Held for as long as the server runs: nobody else may use the database.
    _lock: File,
}

impl Server {
    /// Starts a server. When it returns, both ports answer. Errors are sentences for whoever started it.
    pub async fn start(mut config: Config, clock: Clock) -> Result<Self> {
        if clock.now() < EARLIEST {
            bail!("the clock of this machine is wrong (it is before 2026); set it, and start the server then");
        }
        let file = database_file(&config.database).await?;
        config.open_data_dir()?;
        config.check_secret()?;
        let lock = lock_database(&file)?;
        warn_of_what_is_not_there(&config);
        let config = Arc::new(config);
        let api = bind(&config.server, config.server.port).await?;
        let management = bind(&config.server, config.server.management_port).await?;
        let (api_address, management_address) = (api.local_addr()?, management.local_addr()?);
        let store = Store::open(&file, &config.database, store::Limits::of(&config)).await?;
        let blobs = Blobs::open(&config.attachments).await?;
        // Nothing can fail from here on, so no task is left behind by a start that was given up.
        let (tasks, keepers, probes) = (Tasks::new(), Tasks::new(), Tasks::new());
        let bus = Bus::local(config.gateway.max_connections_per_device);
        let app = App {
            mailroom: Mailroom::open(store.clone(), bus.clone(), clock.clone(), &keepers),
            store,
            bus,
            blobs,
            passwords: Passwords::new(),
            tokens: Tokens::new(
                &config.auth.jwt_secret,
                config.auth.access_token_lifetime,
                config.auth.refresh_token_lifetime,
            ),
            bodies: Budget::new(BODIES_KIB),
            frames: Budget::new(FRAMES_KIB),
            disk: Disk::new(file.parent().map(Path::to_owned), config.disk_reserve_bytes),
            clock,
            tasks,
            config,
        };
        open(&app, &probes, api, management).await;
        info!(port = api_address.port(), management_port = management_address.port(), "the server is ready");
        Ok(Self { app, keepers, probes, api_address, management_address, _lock: lock })
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
            () = self.probes.failed() => {}
        }
    }

    /// Stops in order, within the shutdown timeout: no new connections, requests answered, sockets told (1001), their
    /// acks written, the last groups stored, the database closed.
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

/// The file of the embedded database. A database server is asked whether it is there, so that the sentence about it is
/// the right one.
async fn database_file(database: &config::Database) -> Result<PathBuf> {
    if let Some(file) = database.file() {
        return Ok(file.to_owned());
    }
    let try_alone = "to try Obscura Server on this machine alone, start it with --data-dir DIR";
    let Some(address) = server_address(database.url.expose()) else {
        bail!("--db-url: this is not a URL of a database this server knows; {try_alone}");
    };
    let answers = tokio::time::timeout(PROBE_TIMEOUT, tokio::net::TcpStream::connect(&address)).await;
    if !matches!(answers, Ok(Ok(_))) {
        bail!("no database answers at {address} (--db-url); start it or name another, or, {try_alone}");
    }
    bail!(
        "--db-url: this version stores in SQLite only and can't use the PostgreSQL server at {address} yet; {try_alone}"
    )
}

/// Nobody should believe that phones are woken or traces exported when they aren't.
fn warn_of_what_is_not_there(config: &Config) {
    let is_asked_for = [
        ("--pubsub-url", !config.pubsub.url.expose().starts_with("local:")),
        ("--fcm-project-id", config.fcm.project_id.is_some()),
        ("--otlp-endpoint", config.telemetry.otlp_endpoint.is_some()),
    ];
    for (option, _) in is_asked_for.iter().filter(|(_, is_asked_for)| *is_asked_for) {
        warn!(option, "this version does not act on this option yet");
    }
}

/// Host and port of `scheme://user:password@host:port/name`, without the secrets in it.
fn server_address(url: &str) -> Option<String> {
    let (_, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?']).next()?;
    let host = authority.rsplit('@').next()?;
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Some(if has_port { host.to_owned() } else { format!("{host}:5432") })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_in_a_url_is_found_without_its_secrets() {
        for (url, address) in [
            ("postgres://user:p%40ss@db.example:6543/name?x=1", Some("db.example:6543")),
            ("postgres://user:password@localhost/signal_server", Some("localhost:5432")),
            ("postgres://[::1]/name", Some("[::1]:5432")),
            ("nonsense", None),
        ] {
            assert_eq!(server_address(url).as_deref(), address);
        }
    }
}
