//! The broker connection to other nodes, over the pub/sub of Valkey or Redis: one connection that is always being kept, or looked for.
//!
//! Each account has a channel, which a node subscribes while the account has a session there, and one small channel says
//! "all sessions, read everything"; over it nodes also say hello now and then, and goodbye. What may have been lost
//! while a connection was gone is made good by waking every session of this node once, after all their channels are
//! subscribed again.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionInfo, PushInfo, PushKind, RedisError, RedisResult, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use crate::bus::backoff::Backoff;
use crate::bus::channels::{ChannelSubscription, ChannelSubscriptions};
use crate::bus::heartbeat::{self, ConnectionLost};
use crate::bus::local::LocalBus;
use crate::bus::message::{Message, Node};
use crate::bus::pending_signals::{PendingSignals, SignalBatch};
use crate::bus::remote_signals::RemoteSignalHandler;
use crate::bus::resync::Resync;
use crate::bus::valkey_url::parse_servers;
use crate::bus::{BusError, Signals};
use crate::config;
use crate::model::ids::{Address, UserId};
use crate::tasks::Tasks;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::TraceLink;

/// Valkey is taken for gone when it answers nothing for so long, and when it is not connected within that time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a node says that it is there, and finds out whether Valkey is, takes writes and passes on what is published.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Accounts whose channels are subscribed, unsubscribed or written to with one request.
const BATCH: usize = 512;
/// At stop, so much time for the signals that still wait.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// The end of the name of the channel to all nodes. No account is called so.
const ALL_NODES: &str = "all";

/// The broker connection as the bus uses it. Nothing here waits for Valkey, except the check.
#[derive(Clone)]
pub(super) struct BrokerConnection {
    pending: Arc<PendingSignals>,
    channels: Arc<ChannelSubscriptions>,
    connection: watch::Receiver<Option<MultiplexedConnection>>,
}

impl BrokerConnection {
    pub(super) fn open(
        pubsub: &config::Pubsub,
        notifications: &config::Notifications,
        local: &LocalBus,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, BusError> {
        let servers = parse_servers(pubsub.url.expose())?;
        let resync = Resync::new(local.clone(), metrics.clone());
        let (connection, current) = watch::channel(None);
        let broker = Self { pending: Arc::default(), channels: Arc::default(), connection: current };
        let broker_task = BrokerTask {
            // Each node begins elsewhere, so that a cluster's nodes share the connections.
            server_index: rand::random_range(0..servers.len()),
            servers,
            prefix: notifications.channel_prefix.clone(),
            queue_key: notifications.push_queue_key.clone(),
            resync: resync.clone(),
            gc_interval: notifications.gc_interval,
            pending: broker.pending.clone(),
            channels: broker.channels.clone(),
            handler: RemoteSignalHandler {
                node: Node::random(),
                echo: Arc::default(),
                local: local.clone(),
                resync: resync.clone(),
                peers: Arc::default(),
                metrics: metrics.clone(),
            },
            connection,
            metrics: metrics.clone(),
            is_outage_logged: AtomicBool::new(false),
        };
        tasks.spawn("bus looks", resync.run(tasks.clone()));
        tasks.spawn("bus wire", broker_task.run(Backoff::new(pubsub), tasks.clone()));
        Ok(broker)
    }

    pub(super) fn subscribe(&self, address: Address) -> ChannelSubscription {
        self.channels.add(address)
    }

    pub(super) fn publish(&self, addresses: &[Address], signals: Signals) {
        self.pending.add(addresses, signals);
    }

    pub(super) fn send_trace_link(&self, addresses: &[Address], trace_link: TraceLink) {
        self.pending.send_trace_link(addresses, trace_link);
    }

    pub(super) async fn connected(&self) {
        // An error means that the broker connection has been closed, and no caller waits for that.
        let _ = self.connection.clone().wait_for(Option::is_some).await;
    }

    pub(super) async fn check(&self) -> Result<(), BusError> {
        let connection = self.connection.borrow().clone();
        let mut connection = connection.ok_or(BusError::Disconnected)?;
        Ok(ping(&mut connection).await?)
    }
}

/// A connection to a primary, on which the channel to all nodes is subscribed.
struct Connected {
    connection: MultiplexedConnection,
    /// Notified when the connection has ended.
    closed: Arc<Notify>,
    /// Notified when a greeting of ours comes back.
    echo: Arc<Notify>,
}

/// The task that keeps the connection.
struct BrokerTask {
    servers: Vec<ConnectionInfo>,
    /// The URL that is tried next.
    server_index: usize,
    prefix: String,
    /// The key that the heartbeat writes to, without changing anything.
    queue_key: String,
    gc_interval: Duration,
    pending: Arc<PendingSignals>,
    channels: Arc<ChannelSubscriptions>,
    handler: RemoteSignalHandler,
    resync: Resync,
    connection: watch::Sender<Option<MultiplexedConnection>>,
    metrics: Metrics,
    is_outage_logged: AtomicBool,
}

impl BrokerTask {
    async fn run(mut self, mut backoff: Backoff, tasks: Tasks) {
        loop {
            let pause = tokio::select! {
                biased;
                () = tasks.stopping() => break,
                held = self.connect_and_serve() => backoff.pause(held),
            };
            tokio::select! {
                () = tasks.stopping() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        if tokio::time::timeout(FLUSH_TIMEOUT, self.flush_and_leave()).await.is_err() {
            debug!("some signals to other nodes were not sent before the end");
        }
    }

    /// Ends when the connection is lost, or there was none, and answers how long it held.
    async fn connect_and_serve(&mut self) -> Option<Duration> {
        let connected = match self.connect().await {
            Ok(connected) => connected,
            Err(lost) => {
                self.log_outage(&lost);
                return None;
            }
        };
        let (since, connection) = (Instant::now(), &connected.connection);
        self.connection.send_replace(Some(connection.clone()));
        self.metrics.bus_connects.increment(());
        let lost = tokio::select! {
            Err(lost) = self.send_heartbeats(&connected) => lost,
            Err(error) = self.keep_subscribed(connection.clone()) => error.into(),
            Err(error) = self.publish_pending(connection.clone()) => error.into(),
            () = connected.closed.notified() => ConnectionLost::Closed,
        };
        self.connection.send_replace(None);
        self.metrics.bus_connected.set((), 0);
        // Signals of the last seconds may be lost, and no more arrive, so sessions look regularly now.
        self.resync.set_disconnected(true);
        if lost.is_wrong_host() {
            self.try_next_server();
        }
        self.log_outage(&lost);
        Some(since.elapsed())
    }

    /// Tries each URL once, and stays with a primary that answers.
    async fn connect(&mut self) -> Result<Connected, ConnectionLost> {
        let mut attempts = self.servers.len();
        loop {
            let connected = self.connect_to(self.servers[self.server_index].clone()).await;
            attempts -= 1;
            if connected.is_ok() {
                return connected;
            }
            self.try_next_server();
            if attempts == 0 {
                return connected;
            }
        }
    }

    fn try_next_server(&mut self) {
        self.server_index = (self.server_index + 1) % self.servers.len();
    }

    /// The name of the host is looked up anew each time.
    async fn connect_to(&self, server: ConnectionInfo) -> Result<Connected, ConnectionLost> {
        let (closed, echo) = (Arc::<Notify>::default(), Arc::<Notify>::default());
        let (handler, notify_closed) =
            (RemoteSignalHandler { echo: echo.clone(), ..self.handler.clone() }, closed.clone());
        // The library calls this between two reads of the socket. Nothing in it waits, so nothing needs to be queued.
        let handle = move |push: PushInfo| -> Result<(), Infallible> {
            match (push.kind, push.data.into_iter().nth(1)) {
                (PushKind::Message, Some(Value::BulkString(message))) => handler.handle(&message),
                (PushKind::Disconnection, _) => notify_closed.notify_one(),
                _ => {}
            }
            Ok(())
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_TIMEOUT))
            .set_response_timeout(Some(ANSWER_TIMEOUT))
            .set_push_sender(handle);
        let mut connection = Client::open(server)?.get_multiplexed_async_connection_with_config(&config).await?;
        heartbeat::check_primary(&mut connection, &self.queue_key).await?;
        // Before the first greeting, which has to come back.
        connection.subscribe(self.all_nodes_channel()).await?;
        Ok(Connected { connection, closed, echo })
    }

    /// Says hello to the other nodes now and then, by which it notices a Valkey that is frozen, was demoted or is cut off,
    /// and a connection of which only our half is left. Notices, too, when another node has fallen silent.
    async fn send_heartbeats(
        &self,
        Connected { connection, echo, .. }: &Connected,
    ) -> Result<Infallible, ConnectionLost> {
        let mut connection = connection.clone();
        self.handler.peers().reset(Instant::now());
        loop {
            self.publish_to_all(&mut connection, Message::hello(self.handler.node)).await?;
            tokio::time::timeout(ANSWER_TIMEOUT, echo.notified()).await.map_err(|_| ConnectionLost::NoEcho)?;
            tokio::time::sleep(HEARTBEAT).await;
            if self.handler.peers().mark_missing(Instant::now()) {
                info!("another node ended without a goodbye, or is not heard; every session looks at everything");
                self.handler.resync.request_full();
            }
            heartbeat::check_primary(&mut connection, &self.queue_key).await?;
        }
    }

    async fn publish_to_all(&self, connection: &mut MultiplexedConnection, message: Vec<u8>) -> RedisResult<()> {
        redis::cmd("PUBLISH").arg(self.all_nodes_channel()).arg(message).query_async(connection).await
    }

    /// Subscribes the channels of the sessions that listen, makes all of them read what was missed, and follows who comes and goes.
    async fn keep_subscribed(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        for users in self.channels.reset().chunks(BATCH) {
            connection.subscribe(self.channel_names(users)).await?;
            self.channels.confirm(users);
        }
        self.resync.set_disconnected(false);
        self.resync.request_full();
        self.is_outage_logged.store(false, Ordering::Relaxed);
        self.metrics.bus_connected.set((), 1);
        info!("connected to Valkey: signals go to other nodes and come from them");
        let mut gc = tokio::time::interval_at(Instant::now() + self.gc_interval, self.gc_interval);
        gc.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.channels.wanted() => {
                    let users = self.channels.take_wanted(BATCH);
                    connection.subscribe(self.channel_names(&users)).await?;
                    for device in self.channels.confirm(&users) {
                        self.handler.local.notify(device, Signals::ALL);
                    }
                }
                _ = gc.tick() => {
                    for users in self.channels.remove_unused().chunks(BATCH) {
                        connection.unsubscribe(self.channel_names(users)).await?;
                    }
                }
            }
        }
    }

    /// Publishes what waits, as long as Valkey confirms it.
    async fn publish_pending(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        self.pending.requeue();
        loop {
            self.pending.not_empty().await;
            self.publish(&mut connection, &self.pending.take(BATCH)).await?;
            self.pending.confirm();
        }
    }

    async fn publish(&self, connection: &mut MultiplexedConnection, batch: &SignalBatch) -> RedisResult<()> {
        let mut pipeline = redis::pipe();
        if batch.resync_all {
            warn!("too many signals waited for Valkey; all nodes look at everything instead");
            pipeline.publish(self.all_nodes_channel(), Message::resync_all(self.handler.node)).ignore();
        }
        for (address, trace_link) in &batch.trace_links {
            let message = Message::trace_link(self.handler.node, address.device, *trace_link);
            pipeline.publish(self.channel_name(address.user), message).ignore();
        }
        for (user, entries) in batch.messages() {
            pipeline.publish(self.channel_name(user), Message::devices(self.handler.node, entries)).ignore();
        }
        pipeline.query_async(connection).await
    }

    /// Nothing is added any more. What is still here goes out, if the connection stands.
    async fn flush_and_leave(&self) {
        let Some(mut connection) = self.connection.borrow().clone() else { return };
        self.pending.requeue();
        while !self.pending.is_empty() {
            if self.publish(&mut connection, &self.pending.take(BATCH)).await.is_err() {
                return;
            }
            self.pending.confirm();
        }
        // When this is not reached, the others look at everything instead.
        let _ = self.publish_to_all(&mut connection, Message::goodbye(self.handler.node)).await;
    }

    /// Once for each outage.
    fn log_outage(&self, error: &dyn std::fmt::Display) {
        if self.is_outage_logged.swap(true, Ordering::Relaxed) {
            debug!(%error, "there is still no connection to Valkey");
        } else {
            warn!(%error, "there is no connection to Valkey; signals to other nodes wait until it is back");
        }
    }

    fn channel_name(&self, user: UserId) -> String {
        format!("{}{user}", self.prefix)
    }

    fn channel_names(&self, users: &[UserId]) -> Vec<String> {
        users.iter().map(|user| self.channel_name(*user)).collect()
    }

    fn all_nodes_channel(&self) -> String {
        format!("{}{ALL_NODES}", self.prefix)
    }
}

async fn ping(connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    redis::cmd("PING").query_async(connection).await
}
