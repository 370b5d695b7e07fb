//! The wire to other nodes, over the pub/sub of Valkey or Redis: one connection that is always being kept, or looked for.
//!
//! Each account has a channel, which a node subscribes while the account has a session there, and one small channel says
//! "everybody, look at everything"; over it nodes also say hello now and then, and goodbye. Whatever may have been lost
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
use crate::bus::ears::Ears;
use crate::bus::heartbeat::{self, Lost};
use crate::bus::listeners::{Listeners, Listening};
use crate::bus::local::LocalBus;
use crate::bus::looks::Looks;
use crate::bus::message::{Message, Node};
use crate::bus::outbox::{Letters, Outbox};
use crate::bus::seeds::seeds;
use crate::bus::{BusError, Signals};
use crate::config;
use crate::model::ids::{Address, UserId};
use crate::tasks::Tasks;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Trail;

/// Valkey is taken for gone when it answers nothing for so long, and when it is not connected within that time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a node says that it is there, and finds out whether Valkey is, takes writes and passes on what is published.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Accounts whose channels are subscribed, unsubscribed or written to with one request.
const BATCH: usize = 512;
/// At stop, so much time for the signals that still wait.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The end of the name of the channel to all nodes. No account is called so.
const EVERYBODY: &str = "all";

/// The wire as the bus uses it. Nothing here waits for Valkey, except the check.
#[derive(Clone)]
pub(super) struct Wire {
    outbox: Arc<Outbox>,
    listeners: Arc<Listeners>,
    connection: watch::Receiver<Option<MultiplexedConnection>>,
}

impl Wire {
    pub(super) fn open(
        pubsub: &config::Pubsub,
        notifications: &config::Notifications,
        local: &LocalBus,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, BusError> {
        let seeds = seeds(pubsub.url.expose())?;
        let looks = Looks::new(local.clone(), metrics.clone());
        let (connection, current) = watch::channel(None);
        let wire = Self { outbox: Arc::default(), listeners: Arc::default(), connection: current };
        let keeper = Keeper {
            // Each node begins elsewhere, so that a cluster's nodes share the connections.
            seed: rand::random_range(0..seeds.len()),
            seeds,
            prefix: notifications.channel_prefix.clone(),
            queue_key: notifications.push_queue_key.clone(),
            looks: looks.clone(),
            gc_interval: notifications.gc_interval,
            outbox: wire.outbox.clone(),
            listeners: wire.listeners.clone(),
            ears: Ears {
                node: Node::random(),
                echo: Arc::default(),
                local: local.clone(),
                looks: looks.clone(),
                peers: Arc::default(),
                metrics: metrics.clone(),
            },
            connection,
            metrics: metrics.clone(),
            is_outage_told: AtomicBool::new(false),
        };
        tasks.spawn("bus looks", looks.run(tasks.clone()));
        tasks.spawn("bus wire", keeper.run(Backoff::new(pubsub), tasks.clone()));
        Ok(wire)
    }

    pub(super) fn listen(&self, address: Address) -> Listening {
        self.listeners.join(address)
    }

    pub(super) fn publish(&self, addresses: &[Address], signals: Signals) {
        self.outbox.add(addresses, signals);
    }

    pub(super) fn lay_trail(&self, addresses: &[Address], trail: Trail) {
        self.outbox.lay_trail(addresses, trail);
    }

    pub(super) async fn connected(&self) {
        // An error means that the wire has been closed, and nobody waits for that.
        let _ = self.connection.clone().wait_for(Option::is_some).await;
    }

    pub(super) async fn check(&self) -> Result<(), BusError> {
        let connection = self.connection.borrow().clone();
        let mut connection = connection.ok_or(BusError::Away)?;
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
struct Keeper {
    seeds: Vec<ConnectionInfo>,
    /// The seed that is tried next.
    seed: usize,
    prefix: String,
    /// The key that the heartbeat writes to, without changing anything.
    queue_key: String,
    gc_interval: Duration,
    outbox: Arc<Outbox>,
    listeners: Arc<Listeners>,
    ears: Ears,
    looks: Looks,
    connection: watch::Sender<Option<MultiplexedConnection>>,
    metrics: Metrics,
    is_outage_told: AtomicBool,
}

impl Keeper {
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
        if tokio::time::timeout(LAST_WORDS, self.say_last_words()).await.is_err() {
            debug!("some signals to other nodes were not sent before the end");
        }
    }

    /// Ends when the connection is lost, or there was none, and answers how long it held.
    async fn connect_and_serve(&mut self) -> Option<Duration> {
        let connected = match self.connect().await {
            Ok(connected) => connected,
            Err(lost) => {
                self.tell_outage(&lost);
                return None;
            }
        };
        let (since, connection) = (Instant::now(), &connected.connection);
        self.connection.send_replace(Some(connection.clone()));
        self.metrics.bus_connects.one(());
        let lost = tokio::select! {
            Err(lost) = self.greet(&connected) => lost,
            Err(error) = self.follow(connection.clone()) => error.into(),
            Err(error) = self.send(connection.clone()) => error.into(),
            () = connected.closed.notified() => Lost::Closed,
        };
        self.connection.send_replace(None);
        self.metrics.bus_connected.set((), 0);
        // Signals of the last seconds may be lost, and no more arrive, so sessions look regularly now.
        self.looks.set_away(true);
        if lost.is_wrong_host() {
            self.try_next_seed();
        }
        self.tell_outage(&lost);
        Some(since.elapsed())
    }

    /// Tries each seed once, and stays with a primary that answers.
    async fn connect(&mut self) -> Result<Connected, Lost> {
        let mut attempts = self.seeds.len();
        loop {
            let connected = self.connect_to(self.seeds[self.seed].clone()).await;
            attempts -= 1;
            if connected.is_ok() {
                return connected;
            }
            self.try_next_seed();
            if attempts == 0 {
                return connected;
            }
        }
    }

    fn try_next_seed(&mut self) {
        self.seed = (self.seed + 1) % self.seeds.len();
    }

    /// The name of the host is looked up anew each time.
    async fn connect_to(&self, seed: ConnectionInfo) -> Result<Connected, Lost> {
        let (closed, echo) = (Arc::<Notify>::default(), Arc::<Notify>::default());
        let (ears, tell_closed) = (Ears { echo: echo.clone(), ..self.ears.clone() }, closed.clone());
        // The library calls this between two reads of the socket. Nothing in it waits, so nothing needs to be queued.
        let hear = move |push: PushInfo| -> Result<(), Infallible> {
            match (push.kind, push.data.into_iter().nth(1)) {
                (PushKind::Message, Some(Value::BulkString(message))) => ears.hear(&message),
                (PushKind::Disconnection, _) => tell_closed.notify_one(),
                _ => {}
            }
            Ok(())
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_TIMEOUT))
            .set_response_timeout(Some(ANSWER_TIMEOUT))
            .set_push_sender(hear);
        let mut connection = Client::open(seed)?.get_multiplexed_async_connection_with_config(&config).await?;
        heartbeat::check_primary(&mut connection, &self.queue_key).await?;
        // Before the first greeting, which has to come back.
        connection.subscribe(self.channel_to_everybody()).await?;
        Ok(Connected { connection, closed, echo })
    }

    /// Says hello to the other nodes now and then, by which it notices a Valkey that is frozen, was demoted or is cut off,
    /// and a connection of which only our half is left. Notices, too, when another node has fallen silent.
    async fn greet(&self, Connected { connection, echo, .. }: &Connected) -> Result<Infallible, Lost> {
        let mut connection = connection.clone();
        self.ears.peers().start_over(Instant::now());
        loop {
            self.say_to_all(&mut connection, Message::hello(self.ears.node)).await?;
            tokio::time::timeout(ANSWER_TIMEOUT, echo.notified()).await.map_err(|_| Lost::Deaf)?;
            tokio::time::sleep(HEARTBEAT).await;
            if self.ears.peers().notice_lost(Instant::now()) {
                info!("another node ended without a goodbye, or is not heard; every session looks at everything");
                self.ears.looks.everything();
            }
            heartbeat::check_primary(&mut connection, &self.queue_key).await?;
        }
    }

    async fn say_to_all(&self, connection: &mut MultiplexedConnection, message: Vec<u8>) -> RedisResult<()> {
        redis::cmd("PUBLISH").arg(self.channel_to_everybody()).arg(message).query_async(connection).await
    }

    /// Subscribes the channels of those who listen, has everybody look at what was missed, and follows who comes and goes.
    async fn follow(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        for users in self.listeners.start_over().chunks(BATCH) {
            connection.subscribe(self.channels(users)).await?;
            self.listeners.confirm(users);
        }
        self.looks.set_away(false);
        self.looks.everything();
        self.is_outage_told.store(false, Ordering::Relaxed);
        self.metrics.bus_connected.set((), 1);
        info!("connected to Valkey: signals go to other nodes and come from them");
        let mut gc = tokio::time::interval_at(Instant::now() + self.gc_interval, self.gc_interval);
        gc.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.listeners.wanted() => {
                    let users = self.listeners.take_wanted(BATCH);
                    connection.subscribe(self.channels(&users)).await?;
                    for device in self.listeners.confirm(&users) {
                        self.ears.local.wake(device, Signals::EVERYTHING);
                    }
                }
                _ = gc.tick() => {
                    for users in self.listeners.leave().chunks(BATCH) {
                        connection.unsubscribe(self.channels(users)).await?;
                    }
                }
            }
        }
    }

    /// Publishes what waits, as long as Valkey confirms it.
    async fn send(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        self.outbox.put_back();
        loop {
            self.outbox.filled().await;
            self.publish(&mut connection, &self.outbox.take(BATCH)).await?;
            self.outbox.confirm();
        }
    }

    async fn publish(&self, connection: &mut MultiplexedConnection, letters: &Letters) -> RedisResult<()> {
        let mut pipeline = redis::pipe();
        if letters.everybody {
            warn!("too many signals waited for Valkey; all nodes look at everything instead");
            pipeline.publish(self.channel_to_everybody(), Message::everybody(self.ears.node)).ignore();
        }
        for (address, trail) in &letters.trails {
            let message = Message::trail(self.ears.node, address.device, *trail);
            pipeline.publish(self.channel(address.user), message).ignore();
        }
        for (user, entries) in letters.messages() {
            pipeline.publish(self.channel(user), Message::devices(self.ears.node, entries)).ignore();
        }
        pipeline.query_async(connection).await
    }

    /// Nobody adds any more. What is still here goes out, if the connection stands.
    async fn say_last_words(&self) {
        let Some(mut connection) = self.connection.borrow().clone() else { return };
        self.outbox.put_back();
        while !self.outbox.is_empty() {
            if self.publish(&mut connection, &self.outbox.take(BATCH)).await.is_err() {
                return;
            }
            self.outbox.confirm();
        }
        // When this is not reached, the others look at everything instead.
        let _ = self.say_to_all(&mut connection, Message::goodbye(self.ears.node)).await;
    }

    /// Once for each outage.
    fn tell_outage(&self, error: &dyn std::fmt::Display) {
        if self.is_outage_told.swap(true, Ordering::Relaxed) {
            debug!(%error, "there is still no connection to Valkey");
        } else {
            warn!(%error, "there is no connection to Valkey; signals to other nodes wait until it is back");
        }
    }

    fn channel(&self, user: UserId) -> String {
        format!("{}{user}", self.prefix)
    }

    fn channels(&self, users: &[UserId]) -> Vec<String> {
        users.iter().map(|user| self.channel(*user)).collect()
    }

    fn channel_to_everybody(&self) -> String {
        format!("{}{EVERYBODY}", self.prefix)
    }
}

async fn ping(connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    redis::cmd("PING").query_async(connection).await
}
