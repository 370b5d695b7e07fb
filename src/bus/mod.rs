//! Signals: "look again", told to the sessions of a device, here and on other nodes. A signal carries no content, may be
//! repeated, merged or lost; the database is the truth that a woken session then reads.

mod backoff;
mod channels;
mod heartbeat;
mod local;
mod message;
mod peers;
mod pending_signals;
mod remote_signals;
mod resync;
mod valkey;
mod valkey_url;

use crate::config;
use crate::model::ids::{Address, DeviceNo};
use crate::tasks::Tasks;
use crate::telemetry::metrics::{Metrics, SignalWay};
use crate::telemetry::traces::TraceLink;

pub use backoff::Backoff;
pub use valkey_url::parse_servers;

/// What to look at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Signal {
    /// There may be new mail.
    NewMessages = 1,
    /// There may be few one-time prekeys left.
    KeysLow = 2,
    /// The device may have been removed or logged out.
    AuthChanged = 4,
    /// The device has opened more sockets than it may have, and this one is the oldest.
    Superseded = 8,
}

/// Everything signalled since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals(u8);

impl Signals {
    /// For a session that may have missed anything. That it is one too many it can't have missed.
    const ALL: Self = Self(Signal::NewMessages as u8 | Signal::KeysLow as u8 | Signal::AuthChanged as u8);

    /// Whether `signal` is among them.
    pub fn contains(self, signal: Signal) -> bool {
        self.0 & signal as u8 != 0
    }

    /// For a session that looks by itself while no signals come from other nodes.
    const PERIODIC: Self = Self(Signal::NewMessages as u8 | Signal::AuthChanged as u8);

    fn union(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Those that make sense on another node. How many sockets a device has is each node's own affair.
    fn remote(self) -> Self {
        Self(self.0 & Self::ALL.0)
    }
}

impl From<Signal> for Signals {
    fn from(signal: Signal) -> Self {
        Self(signal as u8)
    }
}

/// Why the bus can't be opened, or is not ready.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The URL can't be used. Neither it nor a part of it is repeated, since a password may be in it.
    #[error(
        "--pubsub-url: this is not the address of a Valkey or Redis ({0}); it takes for example \
         rediss://user:password@host:6379, several hosts separated by commas, and %40 for a special character such as @ \
         in a password"
    )]
    Url(&'static str),
    /// There is no connection at the moment. It is being looked for.
    #[error("there is no connection to Valkey at the moment")]
    Disconnected,
    /// Valkey said no, or the connection broke.
    #[error(transparent)]
    Valkey(#[from] redis::RedisError),
}

/// Brings signals to the sessions of this process, and over the broker connection, if there is one, to those of other nodes. Cloning
/// gives the same bus.
#[derive(Clone)]
pub struct Bus {
    local: local::LocalBus,
    broker: Option<valkey::BrokerConnection>,
    metrics: Metrics,
}

impl Bus {
    /// A bus within this process. A device may have `sockets_per_device` subscriptions at once; the oldest is told
    /// to make way for one more.
    pub fn local(sockets_per_device: usize, metrics: &Metrics) -> Self {
        Self { local: local::LocalBus::new(sockets_per_device), broker: None, metrics: metrics.clone() }
    }

    /// The bus that the URL asks for. A wire connects in the background, and again whenever it is lost; it ends with
    /// `tasks`, after it has sent what it can within a second. Has to be called within a runtime.
    pub fn open(
        pubsub: &config::Pubsub,
        notifications: &config::Notifications,
        sockets_per_device: usize,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, BusError> {
        let bus = Self::local(sockets_per_device, metrics);
        if pubsub.url.expose() == "local:" {
            metrics.bus_connected.set((), 1);
            return Ok(bus);
        }
        metrics.bus_connected.set((), 0);
        let broker = valkey::BrokerConnection::open(pubsub, notifications, &bus.local, metrics, tasks)?;
        Ok(Self { broker: Some(broker), ..bus })
    }

    /// Listens for signals to a device. A session that reads the database after this call misses nothing. Dropping the answer
    /// ends it.
    pub fn subscribe(&self, address: Address) -> SignalSubscription {
        // In this order, so that the session is there when its account's channel is confirmed.
        let local = self.local.subscribe(address.device);
        let channel = self.broker.as_ref().map(|broker| broker.subscribe(address));
        SignalSubscription { local, _channel: channel }
    }

    /// Tells the sessions of these devices to look again. Best effort: it never fails the caller, and never waits for
    /// Valkey.
    pub fn notify(&self, addresses: &[Address], signal: Signal) {
        for address in addresses {
            self.local.notify(address.device, signal.into());
        }
        self.metrics.signals.add(SignalWay::Local, addresses.len() as u64);
        if let Some(broker) = &self.broker {
            self.metrics.signals.add(SignalWay::Out, addresses.len() as u64);
            broker.publish(addresses, signal.into());
        }
    }

    /// Leaves word of a trace for the sessions of these devices. It lies there until their next signal, which the
    /// caller sends. Few are kept for each session, and those that are under way when the broker connection breaks are lost: traces have
    /// gaps then.
    pub fn send_trace_link(&self, addresses: &[Address], trace_link: TraceLink) {
        for address in addresses {
            self.local.send_trace_link(address.device, trace_link);
        }
        if let Some(broker) = &self.broker {
            broker.send_trace_link(addresses, trace_link);
        }
    }

    /// Ends when there is a connection to other nodes. It waits for ever when there never is; the caller sets the limit.
    pub async fn connected(&self) {
        if let Some(broker) = &self.broker {
            broker.connected().await;
        }
    }

    /// Whether signals reach other nodes. It waits for Valkey's answer; the caller sets the limit.
    pub async fn check(&self) -> Result<(), BusError> {
        match &self.broker {
            Some(broker) => broker.check().await,
            None => Ok(()),
        }
    }

    /// Every device with a session here.
    pub fn devices(&self) -> Vec<DeviceNo> {
        self.local.devices()
    }

    /// How many devices have a session here.
    pub fn device_count(&self) -> usize {
        self.local.device_count()
    }
}

/// The signals to one session of a device. Dropping it ends the subscription.
pub struct SignalSubscription {
    local: local::LocalSubscription,
    _channel: Option<channels::ChannelSubscription>,
}

impl SignalSubscription {
    /// Waits for a signal, and answers everything signalled since the last call. Dropping the future loses nothing.
    pub async fn next(&self) -> Signals {
        self.local.next().await
    }

    /// The traces that the last signals belong to.
    pub fn take_trace_links(&self) -> Vec<TraceLink> {
        self.local.take_trace_links()
    }
}
