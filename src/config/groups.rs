//! The settings as the rest of the server sees them: one struct for each room, units in the types.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;

use crate::config::table::{PROXIES, SAMPLE_DATABASE};
use crate::config::{Accounts, Apns, Fcm, Secret, WebPush};

/// Everything that can be set, checked. Each room gets its own group; only `main` and `server` see all of it.
#[derive(Clone, Debug)]
pub struct Config {
    /// The folder of embedded mode; `None` means distributed.
    pub data_dir: Option<PathBuf>,
    /// Where accounts, keys and queued messages are.
    pub database: Database,
    /// The two ports and who may hold how many connections.
    pub server: Server,
    /// Tokens and devices.
    pub auth: Auth,
    /// Requests per client address.
    pub rate_limits: RateLimits,
    /// What an account may do how often.
    pub account_rates: AccountRates,
    /// Readiness.
    pub health: Health,
    /// Age at which messages and attachments are deleted; at least a day.
    pub retention: Duration,
    /// Sign-ups, passwords, uploads, and how long accounts stay.
    pub accounts: Accounts,
    /// Sends and inboxes.
    pub messaging: Messaging,
    /// One-time prekeys.
    pub prekeys: Prekeys,
    /// Signals to connected devices and pushes to sleeping ones.
    pub notifications: Notifications,
    /// The wire between nodes.
    pub pubsub: Pubsub,
    /// Open sockets.
    pub gateway: Gateway,
    /// Encrypted attachments and where they are kept.
    pub attachments: Attachments,
    /// Firebase Cloud Messaging.
    pub fcm: Fcm,
    /// The Apple Push Notification service.
    pub apns: Apns,
    /// Web Push and UnifiedPush.
    pub web_push: WebPush,
    /// Logs, traces and metrics.
    pub telemetry: Telemetry,
    /// Growth is refused when the data folder's disk has less free space than this, new attachments below twice that; 0
    /// turns it off.
    pub disk_reserve_bytes: u64,
}

/// The database and its pool.
#[derive(Clone, Debug)]
pub struct Database {
    /// `postgres:`, `postgresql:` or `sqlite:`.
    pub url: Secret,
    /// Pool maximum, at least 1.
    pub max_connections: u32,
    /// Idle connections kept, at most `max_connections`.
    pub min_connections: u32,
    /// Longest wait for a connection.
    pub acquire_timeout: Duration,
    /// A connection idle for this long is closed.
    pub idle_timeout: Duration,
    /// A connection this old is replaced.
    pub max_lifetime: Duration,
    /// PostgreSQL: a statement that takes longer is given up.
    pub statement_timeout: Duration,
    /// PostgreSQL: longest wait for another transaction's lock.
    pub lock_timeout: Duration,
    /// Growth is refused from this size on; 0 means no limit.
    pub max_size_bytes: u64,
}

impl Database {
    /// The file of a `sqlite:` URL, `None` for a database server. `sqlite:a.db`, `sqlite://a.db` and `sqlite:///a.db` are
    /// understood as usual; whatever follows a `?` is left out.
    pub fn file(&self) -> Option<&Path> {
        let path = self.url.expose().strip_prefix("sqlite:")?;
        let path = path.strip_prefix("//").unwrap_or(path);
        path.split('?').next().map(Path::new)
    }

    /// Whether this is the published default, which is no real database.
    pub fn is_sample(&self) -> bool {
        self.url.expose() == SAMPLE_DATABASE
    }
}

/// The API port and the management port.
#[derive(Clone, Debug)]
pub struct Server {
    /// Bind address of the API.
    pub host: IpAddr,
    /// Bind address of the management port.
    pub management_host: IpAddr,
    /// API and WebSocket; 0 takes any free port.
    pub port: u16,
    /// Health and metrics; 0 takes any free port.
    pub management_port: u16,
    /// Time for tasks to finish at shutdown; may be zero.
    pub shutdown_timeout: Duration,
    /// Before that, how long everything goes on while readiness is down already; may be zero.
    pub drain_delay: Duration,
    /// From request head to response head, for all routes but attachments.
    pub request_timeout: Duration,
    /// The same for every route, on top of the narrower timeouts.
    pub global_timeout: Duration,
    /// Time for a request head to arrive.
    pub header_timeout: Duration,
    /// Networks whose forwarded addresses are believed; may be empty.
    pub trusted_proxies: Vec<IpNet>,
    /// Open connections on the API port.
    pub max_connections: usize,
    /// Open connections of one client address (IPv6: of one /64); trusted proxies are exempt.
    pub max_connections_per_address: usize,
}

impl Server {
    /// True when private networks are trusted only because that is the default.
    pub fn trusts_private_networks_by_default(&self) -> bool {
        let defaults = PROXIES.split(',').map(|network| network.parse().ok());
        !self.host.is_loopback() && defaults.eq(self.trusted_proxies.iter().copied().map(Some))
    }

    /// True when forwarded addresses are believed from this peer. `::1` counts as 127.0.0.1, and a mapped address as the
    /// IPv4 address that it is.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let is_listed = |peer| self.trusted_proxies.iter().any(|network| network.contains(&peer));
        let peer = peer.to_canonical();
        is_listed(peer) || (peer == Ipv6Addr::LOCALHOST && is_listed(IpAddr::V4(Ipv4Addr::LOCALHOST)))
    }
}

/// Tokens and devices of an account.
#[derive(Clone, Debug)]
pub struct Auth {
    /// Signs access tokens. Empty in embedded mode until `Config::open_data_dir` has filled it in.
    pub jwt_secret: Secret,
    /// Signs nothing, but tokens that were signed with it are accepted.
    pub jwt_secret_previous: Option<Secret>,
    /// Lifetime of an access token; zero means dead on arrival, except for the leeway.
    pub access_token_lifetime: Duration,
    /// Lifetime of a refresh token; zero means dead on arrival.
    pub refresh_token_lifetime: Duration,
    /// Pause between two removals of expired refresh tokens.
    pub refresh_token_cleanup_interval: Duration,
    /// Devices of one account, the primary included.
    pub max_devices_per_user: u32,
    /// Whether every new device has to prove that it holds the identity key.
    pub require_link_proof: bool,
}

/// Token buckets per client address. Never zero: a 0 given counts as 1.
#[derive(Clone, Debug)]
pub struct RateLimits {
    /// API requests that come back each second.
    pub per_second: u32,
    /// API requests available at first.
    pub burst: u32,
    /// Sign-up and log-in requests that come back each second.
    pub auth_per_second: u32,
    /// Sign-up and log-in requests available at first.
    pub auth_burst: u32,
}

/// Token buckets per account. A rate of 0 is no limit.
#[derive(Clone, Debug)]
pub struct AccountRates {
    /// Requests of one account that come back each second.
    pub per_second: u32,
    /// Requests of one account available at first.
    pub burst: u32,
    /// Sends to one account, from all others together, that come back each second.
    pub target_per_second: u32,
    /// Sends to one account available at first.
    pub target_burst: u32,
    /// How often an hour one account may fetch the prekey bundles of another.
    pub bundles_per_hour: u32,
    /// How many fetches of an account's bundles, by all others together, spend one-time prekeys in an hour.
    pub one_time_prekeys_per_hour: u32,
    /// Such fetches available at first.
    pub one_time_prekeys_burst: u32,
}

/// How long each part of the readiness check may take, and which are not needed.
#[derive(Clone, Debug)]
pub struct Health {
    /// For the database.
    pub database_timeout: Duration,
    /// For the attachment storage.
    pub storage_timeout: Duration,
    /// For Valkey.
    pub pubsub_timeout: Duration,
    /// Whether the server is ready, and starts, without the attachment storage.
    pub is_storage_optional: bool,
    /// Whether the server is ready without Valkey. It starts without it in any case.
    pub is_pubsub_optional: bool,
}

/// Sends and inboxes.
#[derive(Clone, Debug)]
pub struct Messaging {
    /// Pending messages of one device, at least 1.
    pub max_inbox_size: u32,
    /// Bytes of sealed messages that may wait for one device; 0 is no limit.
    pub inbox_max_bytes: u64,
    /// Per cent of an inbox that one sending account may fill, once the inbox is more than half full, from 1 to 100.
    pub sender_share_percent: u64,
    /// Bytes of sealed messages that an account may queue in a day; 0 is no limit.
    pub sender_bytes_per_day: u64,
    /// Pause between two removals of expired messages.
    pub cleanup_interval: Duration,
    /// Messages in one database read and one frame.
    pub batch_limit: u32,
    /// Recipients, and submissions, of one send.
    pub send_batch_limit: usize,
    /// How long the outcome of a send is kept for a repeat.
    pub idempotency_lifetime: Duration,
    /// How sends come together. No option, since nothing but the default makes sense; tests try the extremes.
    pub grouping: Grouping,
}

/// How sends and acks are stored together.
#[derive(Clone, Copy, Debug)]
pub struct Grouping {
    /// Sends and acks in one group, at least 1; what was left for later may come on top.
    pub max_requests: usize,
    /// How long a group waits for company. `None`: it is what came while the last one was being stored.
    pub linger: Option<Duration>,
}

/// One-time prekeys of a device.
#[derive(Clone, Debug)]
pub struct Prekeys {
    /// With fewer than this left, the device is told; 0 never tells. At most `max`.
    pub refill_threshold: u32,
    /// Stored per device, and accepted in one upload.
    pub max: u32,
}

/// Signals to connected devices and pushes to sleeping ones.
#[derive(Clone, Debug)]
pub struct Notifications {
    /// Pause between two removals of subscriptions that no session uses, and between two looks for devices that should have
    /// been pushed to.
    pub gc_interval: Duration,
    /// Without a meaning here: signals from other nodes are passed on as they come in, so none ever wait.
    pub global_channel_capacity: usize,
    /// Without a meaning here: signals to a device merge, so none ever wait.
    pub user_channel_capacity: usize,
    /// Grace before a push; may be zero.
    pub push_delay: Duration,
    /// Pause between two looks at the push queue.
    pub worker_interval: Duration,
    /// Concurrent pushes, also the jobs leased in one look.
    pub worker_concurrency: usize,
    /// Valkey key of the push queue.
    pub push_queue_key: String,
    /// Valkey pub/sub channel prefix; may be empty.
    pub channel_prefix: String,
    /// Lease of a push job.
    pub visibility_timeout: Duration,
    /// Pause between two removals of dead push tokens.
    pub janitor_interval: Duration,
    /// Dead push tokens removed in one statement.
    pub janitor_batch_size: usize,
    /// Dead push tokens waiting to be removed.
    pub janitor_channel_capacity: usize,
}

/// The wire between nodes.
#[derive(Clone, Debug)]
pub struct Pubsub {
    /// `redis:`, `rediss:`, `valkey:` or `valkeys:`, or one of them with `-cluster`; `local:` is the bus inside this process.
    pub url: Secret,
    /// First pause before reconnecting.
    pub min_backoff: Duration,
    /// Longest pause before reconnecting, at least `min_backoff`.
    pub max_backoff: Duration,
    /// A connection that held this long starts over at `min_backoff` when lost.
    pub stable_after: Duration,
}

/// Open sockets.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// Without a meaning here: one frame of a socket is under way at a time, so none ever wait.
    pub outbound_buffer_size: usize,
    /// Acks waiting per socket.
    pub ack_buffer_size: usize,
    /// Acks in one database write.
    pub ack_batch_size: usize,
    /// Longest time an ack waits for company; never zero.
    pub ack_flush_interval: Duration,
    /// From the first low-prekey event to its frame; never zero.
    pub prekey_debounce: Duration,
    /// Pause between two pings; never zero: a 0 given means a second.
    pub ping_interval: Duration,
    /// Silence allowed beyond the ping interval.
    pub ping_timeout: Duration,
    /// A frame is closed before its envelopes would pass this; one larger envelope travels alone.
    pub max_batch_bytes: usize,
    /// How long failed reads of the inbox are retried; may be zero.
    pub fetch_retry_budget: Duration,
    /// Lifetime of a gateway ticket.
    pub ticket_lifetime: Duration,
    /// A socket whose client accepts no byte for this long is closed.
    pub write_timeout: Duration,
    /// Pause between two looks at the inbox that cover a lost signal.
    pub resync_interval: Duration,
    /// Open sockets of one device; the oldest is closed when passed.
    pub max_connections_per_device: usize,
}

impl Gateway {
    /// At most so long a client that is there says nothing.
    pub fn longest_silence(&self) -> Duration {
        self.ping_interval + self.ping_timeout
    }
}

/// Encrypted attachments and where they are kept.
#[derive(Clone, Debug)]
pub struct Attachments {
    /// Bucket; without meaning for a folder.
    pub bucket: String,
    /// Region of the bucket.
    pub region: String,
    /// `http:` or `https:` URL of an S3-compatible service, `file:PATH` for a folder, `None` for Amazon's own.
    pub endpoint: Option<String>,
    /// Given exactly when `secret_key` is; without both, the surroundings are asked for credentials.
    pub access_key: Option<Secret>,
    /// See `access_key`.
    pub secret_key: Option<Secret>,
    /// The bucket goes into the path instead of the host name; MinIO needs it.
    pub force_path_style: bool,
    /// Makes the bucket at the start if there is none.
    pub create_bucket: bool,
    /// Put before the id to name an object; may be empty.
    pub prefix: String,
    /// Smallest attachment, at most `max_size_bytes`.
    pub min_size_bytes: u64,
    /// Largest attachment.
    pub max_size_bytes: u64,
    /// Pause between two removals of expired attachments.
    pub cleanup_interval: Duration,
    /// Expired attachments removed at a time.
    pub cleanup_batch_size: u32,
    /// From request head to response head of an upload or download.
    pub timeout: Duration,
    /// Stored attachment bytes of one account; 0 means no limit.
    pub quota_bytes: u64,
    /// Bytes that one account may upload in a day; 0 means no limit.
    pub bytes_per_day: u64,
}

impl Attachments {
    /// The folder of a `file:` endpoint, `None` for a bucket. Everything after the scheme is the path, as it stands.
    pub fn folder(&self) -> Option<&Path> {
        self.endpoint.as_deref()?.strip_prefix("file:").map(Path::new)
    }
}

/// Logs, traces and metrics.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// `http:` or `https:` URL of a collector; `None` exports nothing.
    pub otlp_endpoint: Option<String>,
    /// How a log line looks.
    pub log_format: LogFormat,
    /// Share of traces that is kept, from 0 to 1.
    pub trace_sampling_ratio: f64,
    /// Pause between two exports of metrics.
    pub metrics_export_interval: Duration,
    /// Longest time one export may take.
    pub export_timeout: Duration,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object for machines.
    Json,
}

#[cfg(test)]
mod tests;
