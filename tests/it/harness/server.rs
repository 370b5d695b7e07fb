//! A whole server in this process, on free ports and with a folder of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use obscura_server::clock::Clock;
use obscura_server::config::Config;
use obscura_server::server::Server;
use obscura_server::telemetry::Telemetry;
use tempfile::TempDir;

use super::client::Target;
use super::{Client, Database, Device, deployment, record, within};

/// A running server. Dropping it stops it without ceremony; [`TestServer::stop`] is the graceful way.
pub struct TestServer {
    server: Option<Server>,
    /// Moves the time of this server.
    pub clock: Clock,
    config: Config,
    folder: Arc<TempDir>,
    target: Target,
}

impl TestServer {
    /// With rate limits out of the way and everything else as it is by default.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With these changes to the configuration.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the server");
        let config = deployment::config(folder.path()).await;
        Self::start_on(folder, config, change).await
    }

    /// In embedded mode, whatever this run is about: for what only that has.
    pub async fn start_embedded_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the server");
        let config = Config::embedded(folder.path()).expect("the defaults are allowed");
        Self::start_on(folder, config, change).await
    }

    /// On PostgreSQL, Valkey and S3, whatever this run is about: a node that others can be started beside.
    pub async fn start_node_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the server");
        let config = deployment::config_of(&deployment::distributed_options(folder.path()).await);
        Self::start_on(folder, config, change).await
    }

    /// So many nodes of one deployment whose database is still empty, all at the same time.
    pub async fn start_together(count: usize) -> Vec<Self> {
        let folder = Arc::new(tempfile::tempdir().expect("a folder for the servers"));
        deployment::make_empty_database(folder.path()).await;
        let mut config = deployment::config_of(&deployment::distributed_options(folder.path()).await);
        make_testable(&mut config);
        let clock = Clock::system();
        let servers = join_all((0..count).map(|_| start(config.clone(), clock.clone()))).await;
        let node = |server: Server| {
            let (config, clock, folder) = (config.clone(), clock.clone(), folder.clone());
            Self { target: Target::new(server.api_address()), server: Some(server), clock, config, folder }
        };
        servers.into_iter().map(node).collect()
    }

    /// Another node of the same deployment.
    pub async fn start_beside(&self) -> Self {
        self.start_beside_with(|_| {}).await
    }

    /// Another node of the same deployment, with these changes to the configuration.
    pub async fn start_beside_with(&self, change: impl FnOnce(&mut Config)) -> Self {
        let (mut config, clock, folder) = (self.config.clone(), self.clock.clone(), self.folder.clone());
        change(&mut config);
        let server = start(config.clone(), clock.clone()).await;
        let target = Target::new(server.api_address());
        Self { server: Some(server), clock, config, folder, target }
    }

    async fn start_on(folder: TempDir, mut config: Config, change: impl FnOnce(&mut Config)) -> Self {
        make_testable(&mut config);
        change(&mut config);
        let clock = Clock::system();
        let server = start(config.clone(), clock.clone()).await;
        let target = Target::new(server.api_address());
        Self { server: Some(server), clock, config, folder: Arc::new(folder), target }
    }

    /// Stops gracefully and starts again on the same folder. Clients made before go on with the new one.
    pub async fn restart(&mut self) {
        self.restart_after(async {}).await;
    }

    /// Stops gracefully, lets something happen while no server runs, and starts again.
    pub async fn restart_after(&mut self, meanwhile: impl Future<Output = ()>) {
        self.stop_server().await;
        meanwhile.await;
        let server = start(self.config.clone(), self.clock.clone()).await;
        self.target.set(server.api_address());
        self.server = Some(server);
    }

    /// Stops gracefully and starts again with a changed configuration.
    pub async fn restart_with(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        self.restart().await;
    }

    /// Stops gracefully.
    pub async fn stop(mut self) {
        self.stop_server().await;
    }

    async fn stop_server(&mut self) {
        let server = self.server.take().expect("a running server");
        write_metrics_down(&server);
        within("the server to stop", server.stop()).await;
    }

    /// The server itself.
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("a running server")
    }

    /// Somebody who talks to the API port.
    pub fn client(&self) -> Client {
        Client::new(self.target.clone())
    }

    /// Somebody who talks to the management port.
    pub fn management(&self) -> Client {
        Client::management(Target::new(self.server().management_address()))
    }

    /// Where the API port is.
    pub fn address(&self) -> SocketAddr {
        self.target.get()
    }

    /// What the server was started with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A look at, and a hand in, the server's database.
    pub async fn database(&self) -> Database {
        Database::open(&self.config.database).await
    }

    /// A new account with its primary device and 30 one-time prekeys.
    pub async fn account(&self) -> Device {
        Device::register(&self.client()).await
    }
}

fn make_testable(config: &mut Config) {
    config.messaging.grouping = deployment::grouping(config.messaging.grouping);
    config.server.host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    config.server.management_host = config.server.host;
    config.server.port = 0;
    config.server.management_port = 0;
    config.server.max_connections_per_address = 10_000;
    // Many tests share a few processors and a disk; a writer whose turn comes late is no reason for a 503.
    config.database.acquire_timeout = super::PATIENCE;
    config.database.lock_timeout = super::PATIENCE;
    config.database.statement_timeout = super::PATIENCE;
    config.database.min_connections = 1;
    config.rate_limits.per_second = 1_000_000;
    config.rate_limits.burst = 1_000_000;
    config.rate_limits.auth_per_second = 1_000_000;
    config.rate_limits.auth_burst = 1_000_000;
    config.accounts.sign_ups_per_hour = 0;
    config.accounts.sign_ups_per_address = 0;
    config.accounts.sign_ups_per_network = 0;
    config.accounts.wrong_passwords_per_hour = 0;
    config.accounts.uploads_per_second = 0;
    config.account_rates.per_second = 0;
    config.account_rates.target_per_second = 0;
    config.account_rates.bundles_per_hour = 0;
    config.account_rates.one_time_prekeys_per_hour = 0;
}

/// A database in use by somebody else is an error after a second.
pub fn impatient(config: &mut Config) {
    config.database.acquire_timeout = Duration::from_secs(1);
    config.database.lock_timeout = Duration::from_secs(1);
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.server.iter().for_each(write_metrics_down);
        // The last node takes along what they share.
        if Arc::strong_count(&self.folder) == 1 {
            deployment::drop_state(self.folder());
        }
    }
}

fn write_metrics_down(server: &Server) {
    record::metrics(&server.app().metrics.page().expect("a page"));
}

async fn start(config: Config, clock: Clock) -> Server {
    within("the server to start", try_to_start(config, clock)).await.expect("the server starts")
}

/// Starts a server that may well refuse to.
pub async fn try_to_start(config: Config, clock: Clock) -> anyhow::Result<Server> {
    let mut telemetry = Telemetry::open(&config.telemetry)?;
    record::listen_to(&mut telemetry);
    Server::start(config, clock, telemetry).await
}
