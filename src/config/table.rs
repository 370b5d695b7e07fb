//! The one list of all options. The command line, the typed groups' values, the reference page and the tests follow it.

use crate::config::option::{
    Group,
    Takes::{
        Address, AnyText, Bytes, Choice, Count, Days, File, Folder, Milliseconds, Networks, Port, Ratio, Seconds, Text,
        Url, YesNo,
    },
    option, optional,
};

/// Ten years: no timer of ours needs more, and no sum with the time of day overflows.
const MAX_SECONDS: u64 = 315_360_000;
const MAX_MILLISECONDS: u64 = 86_400_000;
const MAX_COUNT: u64 = 1_000_000;
/// What S3 takes in one piece, 5 GiB.
const MAX_ATTACHMENT_BYTES: u64 = 5_368_709_120;
/// A pebibyte: twice that still fits every integer we use.
const MAX_STORE_BYTES: u64 = 1 << 50;
/// What the protocol allows in one WebSocket message, 64 MiB.
const MAX_FRAME_BYTES: u64 = 67_108_864;
/// FCM refuses more than four weeks.
const MAX_FCM_SECONDS: u64 = 2_419_200;

/// The published default of `--db-url`.
pub(super) const SAMPLE_DATABASE: &str = "postgres://user:password@localhost/signal_server";
const DATABASES: &[&str] = &["postgres://", "postgresql://", "sqlite:"];
const BUSES: &[&str] = &[
    "redis://",
    "rediss://",
    "valkey://",
    "valkeys://",
    "redis-cluster://",
    "rediss-cluster://",
    "valkey-cluster://",
    "valkeys-cluster://",
    "local:",
];
const STORAGES: &[&str] = &["http://", "https://", "file:"];
const COLLECTORS: &[&str] = &["http://", "https://"];
const PROXIES: &str = "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,127.0.0.1/32";

/// Every option, in the order of `--help` and of the reference page.
#[rustfmt::skip] // One option is one row: two lines, name and meaning.
pub static GROUPS: &[Group] = &[
    Group { title: "One machine", options: &[
        optional("data-dir", "OBSCURA_DATA_DIR", Folder,
            "embedded mode: database, attachments and the signing secret are kept in this folder, and no other service is needed"),
        option("disk-reserve-bytes", "OBSCURA_DISK_RESERVE_BYTES", "268435456", Bytes(0, MAX_STORE_BYTES),
            "new messages are refused when the data folder's disk has less free space than this, new attachments below twice that; 0 turns it off").ours(),
    ] },
    Group { title: "Retention", options: &[
        option("ttl-days", "OBSCURA_TTL_DAYS", "30", Days(1, 36_500),
            "days until messages and attachments are deleted"),
    ] },
    Group { title: "Database", options: &[
        option("db-url", "OBSCURA_DATABASE_URL", SAMPLE_DATABASE, Url(DATABASES),
            "database; `sqlite:PATH` selects the embedded store").secret().embedded("sqlite:DIR/obscura.db"),
        option("db-max-connections", "OBSCURA_DATABASE_MAX_CONNECTIONS", "20", Count(1, 10_000),
            "largest number of connections"),
        option("db-min-connections", "OBSCURA_DATABASE_MIN_CONNECTIONS", "5", Count(0, 10_000),
            "idle connections kept"),
        option("db-acquire-timeout-secs", "OBSCURA_DATABASE_ACQUIRE_TIMEOUT_SECS", "3", Seconds(1, 3600),
            "longest wait for a connection"),
        option("db-idle-timeout-secs", "OBSCURA_DATABASE_IDLE_TIMEOUT_SECS", "600", Seconds(1, MAX_SECONDS),
            "a connection idle for this long is closed"),
        option("db-max-lifetime-secs", "OBSCURA_DATABASE_MAX_LIFETIME_SECS", "1800", Seconds(1, MAX_SECONDS),
            "a connection this old is replaced"),
        option("db-statement-timeout-ms", "OBSCURA_DATABASE_STATEMENT_TIMEOUT_MS", "10000", Milliseconds(100, MAX_MILLISECONDS),
            "PostgreSQL: a statement that takes longer is given up").ours(),
        option("db-lock-timeout-ms", "OBSCURA_DATABASE_LOCK_TIMEOUT_MS", "5000", Milliseconds(100, MAX_MILLISECONDS),
            "PostgreSQL: longest wait for another transaction's lock, and longest time that a node which stops in the middle of a transaction holds its own").ours(),
    ] },
    Group { title: "Server", options: &[
        option("server-host", "OBSCURA_SERVER_HOST", "0.0.0.0", Address,
            "bind address of both ports"),
        option("server-port", "OBSCURA_SERVER_PORT", "3000", Port,
            "API and WebSocket; 0 takes any free port"),
        option("mgmt-port", "OBSCURA_SERVER_MGMT_PORT", "9090", Port,
            "health; 0 takes any free port").or("server-mgmt-port"),
        option("shutdown-timeout-secs", "OBSCURA_SERVER_SHUTDOWN_TIMEOUT_SECS", "5", Seconds(0, 3600),
            "time for tasks to finish at shutdown").or("server-shutdown-timeout-secs"),
        option("server-request-timeout-secs", "OBSCURA_SERVER_REQUEST_TIMEOUT_SECS", "30", Seconds(1, 86_400),
            "an answer that takes longer becomes 408; attachments have a timeout of their own"),
        option("server-global-timeout-secs", "OBSCURA_SERVER_GLOBAL_TIMEOUT_SECS", "600", Seconds(1, 86_400),
            "the same for every route, on top of the narrower timeouts"),
        option("server-header-timeout-secs", "OBSCURA_SERVER_HEADER_TIMEOUT_SECS", "75", Seconds(1, 3600),
            "time for a request head, and the pause before it; longer than proxies keep idle connections").ours(),
        option("trusted-proxies", "OBSCURA_SERVER_TRUSTED_PROXIES", PROXIES, Networks,
            "networks whose forwarded addresses are believed, separated by commas; empty trusts nobody"),
        option("server-max-connections", "OBSCURA_SERVER_MAX_CONNECTIONS", "65536", Count(1, MAX_COUNT),
            "open connections on the API port").ours(),
        option("server-max-connections-per-address", "OBSCURA_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "512", Count(1, MAX_COUNT),
            "open connections of one client address (IPv6: of one /64); trusted proxies are exempt").ours(),
    ] },
    Group { title: "Authentication", options: &[
        option("jwt-secret", "OBSCURA_AUTH_JWT_SECRET", "change_me_in_production", AnyText,
            "signs access tokens, at least 16 bytes; the server does not start with the default; without it, embedded mode makes a secret and keeps it in `DIR/jwt-secret`")
            .secret().embedded("").or("auth-jwt-secret"),
        option("access-token-ttl-secs", "OBSCURA_AUTH_TOKEN_TTL_SECS", "900", Seconds(0, MAX_SECONDS),
            "lifetime of an access token").or("auth-token-ttl-secs"),
        option("refresh-token-ttl-days", "OBSCURA_AUTH_REFRESH_TOKEN_TTL_DAYS", "30", Days(0, 36_500),
            "lifetime of a refresh token; with 0 it is dead on arrival").or("auth-refresh-token-ttl-days"),
        option("auth-refresh-token-cleanup-interval-secs", "OBSCURA_AUTH_REFRESH_TOKEN_CLEANUP_INTERVAL_SECS", "86400", Seconds(1, MAX_SECONDS),
            "pause between two removals of expired refresh tokens"),
        option("auth-max-devices-per-user", "OBSCURA_AUTH_MAX_DEVICES_PER_USER", "10", Count(1, 1000),
            "devices of one account, the primary included"),
    ] },
    Group { title: "Rate limits", options: &[
        option("rate-limit-per-second", "OBSCURA_RATE_LIMIT_PER_SECOND", "10", Count(0, MAX_COUNT),
            "API requests per client address; 0 counts as 1"),
        option("rate-limit-burst", "OBSCURA_RATE_LIMIT_BURST", "20", Count(0, MAX_COUNT),
            "API requests of one client address at once; 0 counts as 1"),
        option("auth-rate-limit-per-second", "OBSCURA_RATE_LIMIT_AUTH_PER_SECOND", "1", Count(0, MAX_COUNT),
            "sign-up and log-in requests per client address; 0 counts as 1"),
        option("auth-rate-limit-burst", "OBSCURA_RATE_LIMIT_AUTH_BURST", "3", Count(0, MAX_COUNT),
            "sign-up and log-in requests of one client address at once; 0 counts as 1"),
    ] },
    Group { title: "Health", options: &[
        option("db-timeout-ms", "OBSCURA_HEALTH_DB_TIMEOUT_MS", "2000", Milliseconds(1, MAX_MILLISECONDS),
            "readiness check of the database").or("health-db-timeout-ms"),
        option("storage-timeout-ms", "OBSCURA_HEALTH_STORAGE_TIMEOUT_MS", "2000", Milliseconds(1, MAX_MILLISECONDS),
            "readiness check of the attachment storage").or("health-storage-timeout-ms"),
        option("pubsub-timeout-ms", "OBSCURA_HEALTH_PUBSUB_TIMEOUT_MS", "2000", Milliseconds(1, MAX_MILLISECONDS),
            "readiness check of Valkey").or("health-pubsub-timeout-ms"),
    ] },
    Group { title: "Messages", options: &[
        option("max-inbox-size", "OBSCURA_MESSAGING_INBOX_MAX_SIZE", "1000", Count(1, MAX_COUNT),
            "pending messages per device").or("messaging-inbox-max-size"),
        option("messaging-cleanup-interval-secs", "OBSCURA_MESSAGING_CLEANUP_INTERVAL_SECS", "300", Seconds(1, MAX_SECONDS),
            "pause between two removals of expired messages"),
        option("batch-limit", "OBSCURA_MESSAGING_BATCH_LIMIT", "50", Count(1, 10_000),
            "messages in one database read and one frame").or("ws-message-fetch-batch-size").or_variable("OBSCURA_WS_MESSAGE_FETCH_BATCH_SIZE"),
        option("messaging-send-batch-limit", "OBSCURA_MESSAGING_SEND_BATCH_LIMIT", "100", Count(1, 10_000),
            "recipients, and submissions, of one send"),
        option("messaging-idempotency-ttl-secs", "OBSCURA_MESSAGING_IDEMPOTENCY_TTL_SECS", "86400", Seconds(1, MAX_SECONDS),
            "how long the outcome of a send is kept for a repeat"),
    ] },
    Group { title: "Prekeys", options: &[
        option("pre-key-refill-threshold", "OBSCURA_PRE_KEY_REFILL_THRESHOLD", "20", Count(0, MAX_COUNT),
            "with fewer one-time prekeys than this the device is told; 0 never tells").or("messaging-pre-key-refill-threshold"),
        option("max-pre-keys", "OBSCURA_PRE_KEYS_MAX", "100", Count(1, MAX_COUNT),
            "one-time prekeys per device").or("messaging-pre-keys-max"),
    ] },
    Group { title: "Notifications", options: &[
        option("gc-interval-secs", "OBSCURA_NOTIFICATIONS_GC_INTERVAL_SECS", "60", Seconds(1, MAX_SECONDS),
            "pause between two removals of subscriptions nobody listens to")
            .or("notifications-cleanup-interval-secs").or_variable("OBSCURA_NOTIFICATIONS_CLEANUP_INTERVAL_SECS"),
        option("global-channel-capacity", "OBSCURA_NOTIFICATIONS_GLOBAL_CHANNEL_CAPACITY", "1024", Count(1, MAX_COUNT),
            "accepted for compatibility: signals from other nodes are passed on as they come in, so none ever wait").or("notifications-global-channel-capacity"),
        option("user-channel-capacity", "OBSCURA_NOTIFICATIONS_USER_CHANNEL_CAPACITY", "64", Count(1, MAX_COUNT),
            "accepted for compatibility: signals to a device merge, so none ever wait")
            .or("notifications-device-channel-capacity").or_variable("OBSCURA_NOTIFICATIONS_DEVICE_CHANNEL_CAPACITY"),
        option("push-delay-secs", "OBSCURA_NOTIFICATIONS_PUSH_DELAY_SECS", "10", Seconds(0, 86_400),
            "grace before a push").or("notifications-push-delay-secs"),
        option("worker-interval-secs", "OBSCURA_NOTIFICATIONS_WORKER_INTERVAL_SECS", "1", Seconds(1, 86_400),
            "pause between two looks at the push queue").or("notifications-worker-interval-secs"),
        option("worker-concurrency", "OBSCURA_NOTIFICATIONS_WORKER_CONCURRENCY", "100", Count(1, 10_000),
            "concurrent pushes, also the jobs leased in one look").or("notifications-worker-concurrency"),
        option("push-queue-key", "OBSCURA_NOTIFICATIONS_PUSH_QUEUE_KEY", "jobs:push_notifications", Text,
            "Valkey key of the push queue").or("notifications-push-queue-key"),
        option("channel-prefix", "OBSCURA_NOTIFICATIONS_CHANNEL_PREFIX", "user:", AnyText,
            "Valkey pub/sub channel prefix").or("notifications-channel-prefix"),
        option("visibility-timeout-secs", "OBSCURA_NOTIFICATIONS_VISIBILITY_TIMEOUT_SECS", "30", Seconds(1, 86_400),
            "lease of a push job").or("notifications-visibility-timeout-secs"),
        option("janitor-interval-secs", "OBSCURA_NOTIFICATIONS_JANITOR_INTERVAL_SECS", "5", Seconds(1, MAX_SECONDS),
            "pause between two removals of dead push tokens")
            .or("notifications-invalid-token-cleanup-interval-secs").or_variable("OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_INTERVAL_SECS"),
        option("janitor-batch-size", "OBSCURA_NOTIFICATIONS_JANITOR_BATCH_SIZE", "50", Count(1, 10_000),
            "dead push tokens removed at a time")
            .or("notifications-invalid-token-cleanup-batch-size").or_variable("OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_BATCH_SIZE"),
        option("janitor-channel-capacity", "OBSCURA_NOTIFICATIONS_JANITOR_CHANNEL_CAPACITY", "256", Count(1, MAX_COUNT),
            "dead push tokens waiting to be removed")
            .or("notifications-invalid-token-cleanup-channel-capacity").or_variable("OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_CHANNEL_CAPACITY"),
    ] },
    Group { title: "Wire between nodes", options: &[
        option("pubsub-url", "OBSCURA_PUBSUB_URL", "redis://localhost:6379", Url(BUSES),
            "Valkey or Redis, a cluster's hosts separated by commas; `local:` is the bus inside this process").secret().embedded("local:"),
        option("pubsub-min-backoff-secs", "OBSCURA_PUBSUB_MIN_BACKOFF_SECS", "1", Seconds(1, 86_400),
            "first pause before reconnecting"),
        option("pubsub-max-backoff-secs", "OBSCURA_PUBSUB_MAX_BACKOFF_SECS", "30", Seconds(1, 86_400),
            "longest pause before reconnecting"),
        option("pubsub-stable-after-secs", "OBSCURA_PUBSUB_STABLE_AFTER_SECS", "30", Seconds(0, 86_400),
            "a connection that held this long starts over at the first pause when lost"),
    ] },
    Group { title: "WebSockets", options: &[
        option("ws-outbound-buffer-size", "OBSCURA_WS_OUTBOUND_BUFFER_SIZE", "32", Count(1, MAX_COUNT),
            "frames waiting to be written to one socket"),
        option("ws-ack-buffer-size", "OBSCURA_WS_ACK_BUFFER_SIZE", "100", Count(1, MAX_COUNT),
            "acks waiting per socket"),
        option("ws-ack-batch-size", "OBSCURA_WS_ACK_BATCH_SIZE", "50", Count(1, MAX_COUNT),
            "acks in one database write"),
        option("ws-ack-flush-interval-ms", "OBSCURA_WS_ACK_FLUSH_INTERVAL_MS", "500", Milliseconds(0, MAX_MILLISECONDS),
            "longest time an ack waits for company; 0 counts as 1"),
        option("ws-prekey-debounce-interval-ms", "OBSCURA_WS_PREKEY_DEBOUNCE_INTERVAL_MS", "500", Milliseconds(0, MAX_MILLISECONDS),
            "pause between noticing that prekeys run low and telling the device; 0 counts as 1"),
        option("ws-ping-interval-secs", "OBSCURA_WS_PING_INTERVAL_SECS", "30", Seconds(0, 86_400),
            "pause between two pings; 0 counts as 1"),
        option("ws-ping-timeout-secs", "OBSCURA_WS_PING_TIMEOUT_SECS", "10", Seconds(0, 86_400),
            "a socket silent for longer than the ping interval and this together is closed"),
        option("ws-max-batch-bytes", "OBSCURA_WS_MAX_BATCH_BYTES", "8388608", Bytes(1, MAX_FRAME_BYTES),
            "a frame is closed before its envelopes would pass this; one larger envelope travels alone"),
        option("ws-fetch-retry-budget-ms", "OBSCURA_WS_FETCH_RETRY_BUDGET_MS", "10000", Milliseconds(0, MAX_MILLISECONDS),
            "how long failed reads of the inbox are retried"),
        option("ws-ticket-ttl-secs", "OBSCURA_WS_TICKET_TTL_SECS", "30", Seconds(1, 86_400),
            "lifetime of a gateway ticket"),
        option("ws-write-timeout-secs", "OBSCURA_WS_WRITE_TIMEOUT_SECS", "20", Seconds(1, 3600),
            "a connection whose client accepts no byte for this long is closed").ours(),
        option("ws-max-connections-per-device", "OBSCURA_WS_MAX_CONNECTIONS_PER_DEVICE", "8", Count(1, 1000),
            "open sockets of one device; the oldest is closed when passed").ours(),
        option("ws-look-interval-secs", "OBSCURA_WS_LOOK_INTERVAL_SECS", "300", Seconds(1, 86_400),
            "pause between two looks at the inbox that cover a lost signal").ours(),
    ] },
    Group { title: "Attachments", options: &[
        option("storage-bucket", "OBSCURA_STORAGE_BUCKET", "obscura-attachments", Text,
            "bucket"),
        option("storage-region", "OBSCURA_STORAGE_REGION", "us-east-1", Text,
            "region of the bucket"),
        optional("storage-endpoint", "OBSCURA_STORAGE_ENDPOINT", Url(STORAGES),
            "URL of an S3-compatible service such as MinIO; `file:PATH` is a folder; none is Amazon's own").embedded("file:DIR/attachments"),
        optional("storage-access-key", "OBSCURA_STORAGE_ACCESS_KEY", Text,
            "access key id, together with the secret key").secret(),
        optional("storage-secret-key", "OBSCURA_STORAGE_SECRET_KEY", Text,
            "secret key, together with the access key id").secret(),
        option("storage-force-path-style", "OBSCURA_STORAGE_FORCE_PATH_STYLE", "false", YesNo,
            "the bucket goes into the path instead of the host name; MinIO needs it"),
        option("storage-create-bucket", "OBSCURA_STORAGE_CREATE_BUCKET", "false", YesNo,
            "makes the bucket at the start if there is none").ours(),
        option("attachment-prefix", "OBSCURA_ATTACHMENT_PREFIX", "attachments/", AnyText,
            "put before the id to name an object"),
        option("attachment-min-size-bytes", "OBSCURA_ATTACHMENT_MIN_SIZE_BYTES", "1", Bytes(0, MAX_ATTACHMENT_BYTES),
            "smallest attachment"),
        option("storage-max-size-bytes", "OBSCURA_STORAGE_MAX_SIZE_BYTES", "52428800", Bytes(1, MAX_ATTACHMENT_BYTES),
            "largest attachment").or("attachment-max-size-bytes").or_variable("OBSCURA_ATTACHMENT_MAX_SIZE_BYTES"),
        option("attachment-quota-bytes", "OBSCURA_ATTACHMENT_QUOTA_BYTES", "1073741824", Bytes(0, MAX_STORE_BYTES),
            "stored attachment bytes per account; 0 means no limit").ours(),
        option("attachment-timeout-secs", "OBSCURA_ATTACHMENT_TIMEOUT_SECS", "120", Seconds(1, 86_400),
            "an upload or download that is not answered in this time becomes 408"),
        option("storage-cleanup-interval-secs", "OBSCURA_STORAGE_CLEANUP_INTERVAL_SECS", "3600", Seconds(1, MAX_SECONDS),
            "pause between two removals of expired attachments")
            .or("attachment-cleanup-interval-secs").or_variable("OBSCURA_ATTACHMENT_CLEANUP_INTERVAL_SECS"),
        option("storage-cleanup-batch-size", "OBSCURA_STORAGE_CLEANUP_BATCH_SIZE", "100", Count(1, 10_000),
            "expired attachments removed at a time").or("attachment-cleanup-batch-size").or_variable("OBSCURA_ATTACHMENT_CLEANUP_BATCH_SIZE"),
    ] },
    Group { title: "Firebase Cloud Messaging", options: &[
        optional("fcm-project-id", "OBSCURA_FCM_PROJECT_ID", Text,
            "project; without credentials pushes are only logged"),
        optional("fcm-credentials-file", "OBSCURA_FCM_CREDENTIALS_FILE", File,
            "service account key, a JSON file"),
        option("fcm-ttl-secs", "OBSCURA_FCM_TTL_SECS", "604800", Seconds(0, MAX_FCM_SECONDS),
            "how long the provider keeps a push for a phone it cannot reach"),
    ] },
    Group { title: "Telemetry", options: &[
        optional("otlp-endpoint", "OBSCURA_TELEMETRY_OTLP_ENDPOINT", Url(COLLECTORS),
            "URL of an OpenTelemetry collector").or("telemetry-otlp-endpoint"),
        option("log-format", "OBSCURA_TELEMETRY_LOG_FORMAT", "text", Choice(&["text", "json"]),
            "`text` for people, `json` for machines").or("telemetry-log-format"),
        option("trace-sampling-ratio", "OBSCURA_TELEMETRY_TRACE_SAMPLING_RATIO", "1.0", Ratio,
            "share of traces that is kept").or("telemetry-trace-sampling-ratio"),
        option("metrics-export-interval-secs", "OBSCURA_TELEMETRY_METRICS_EXPORT_INTERVAL_SECS", "60", Seconds(1, MAX_SECONDS),
            "pause between two exports of metrics").or("telemetry-metrics-export-interval-secs"),
        option("export-timeout-secs", "OBSCURA_TELEMETRY_EXPORT_TIMEOUT_SECS", "10", Seconds(1, 3600),
            "longest time one export may take").or("telemetry-export-timeout-secs"),
    ] },
];
