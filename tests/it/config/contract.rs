//! The options as they are promised, written out, one a line: flag, variable, default (`-` for none), and where there is one the
//! other spelling of the flag and of the variable.

/// The contract.
pub const CONTRACT: &str = "\
--ttl-days OBSCURA_TTL_DAYS 30
--db-url OBSCURA_DATABASE_URL postgres://user:password@localhost/signal_server
--db-max-connections OBSCURA_DATABASE_MAX_CONNECTIONS 20
--db-min-connections OBSCURA_DATABASE_MIN_CONNECTIONS 5
--db-acquire-timeout-secs OBSCURA_DATABASE_ACQUIRE_TIMEOUT_SECS 3
--db-idle-timeout-secs OBSCURA_DATABASE_IDLE_TIMEOUT_SECS 600
--db-max-lifetime-secs OBSCURA_DATABASE_MAX_LIFETIME_SECS 1800
--server-host OBSCURA_SERVER_HOST 0.0.0.0
--server-port OBSCURA_SERVER_PORT 3000
--mgmt-port OBSCURA_SERVER_MGMT_PORT 9090 --server-mgmt-port
--shutdown-timeout-secs OBSCURA_SERVER_SHUTDOWN_TIMEOUT_SECS 5 --server-shutdown-timeout-secs
--trusted-proxies OBSCURA_SERVER_TRUSTED_PROXIES 10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,127.0.0.1/32
--jwt-secret OBSCURA_AUTH_JWT_SECRET change_me_in_production --auth-jwt-secret
--access-token-ttl-secs OBSCURA_AUTH_TOKEN_TTL_SECS 900 --auth-token-ttl-secs
--refresh-token-ttl-days OBSCURA_AUTH_REFRESH_TOKEN_TTL_DAYS 30 --auth-refresh-token-ttl-days
--rate-limit-per-second OBSCURA_RATE_LIMIT_PER_SECOND 10
--rate-limit-burst OBSCURA_RATE_LIMIT_BURST 20
--auth-rate-limit-per-second OBSCURA_RATE_LIMIT_AUTH_PER_SECOND 1
--auth-rate-limit-burst OBSCURA_RATE_LIMIT_AUTH_BURST 3
--db-timeout-ms OBSCURA_HEALTH_DB_TIMEOUT_MS 2000 --health-db-timeout-ms
--storage-timeout-ms OBSCURA_HEALTH_STORAGE_TIMEOUT_MS 2000 --health-storage-timeout-ms
--pubsub-timeout-ms OBSCURA_HEALTH_PUBSUB_TIMEOUT_MS 2000 --health-pubsub-timeout-ms
--max-inbox-size OBSCURA_MESSAGING_INBOX_MAX_SIZE 1000 --messaging-inbox-max-size
--messaging-cleanup-interval-secs OBSCURA_MESSAGING_CLEANUP_INTERVAL_SECS 300
--batch-limit OBSCURA_MESSAGING_BATCH_LIMIT 50 --ws-message-fetch-batch-size OBSCURA_WS_MESSAGE_FETCH_BATCH_SIZE
--pre-key-refill-threshold OBSCURA_PRE_KEY_REFILL_THRESHOLD 20 --messaging-pre-key-refill-threshold
--max-pre-keys OBSCURA_PRE_KEYS_MAX 100 --messaging-pre-keys-max
--gc-interval-secs OBSCURA_NOTIFICATIONS_GC_INTERVAL_SECS 60 --notifications-cleanup-interval-secs OBSCURA_NOTIFICATIONS_CLEANUP_INTERVAL_SECS
--global-channel-capacity OBSCURA_NOTIFICATIONS_GLOBAL_CHANNEL_CAPACITY 1024 --notifications-global-channel-capacity
--user-channel-capacity OBSCURA_NOTIFICATIONS_USER_CHANNEL_CAPACITY 64 --notifications-device-channel-capacity OBSCURA_NOTIFICATIONS_DEVICE_CHANNEL_CAPACITY
--push-delay-secs OBSCURA_NOTIFICATIONS_PUSH_DELAY_SECS 10 --notifications-push-delay-secs
--worker-interval-secs OBSCURA_NOTIFICATIONS_WORKER_INTERVAL_SECS 1 --notifications-worker-interval-secs
--worker-concurrency OBSCURA_NOTIFICATIONS_WORKER_CONCURRENCY 100 --notifications-worker-concurrency
--push-queue-key OBSCURA_NOTIFICATIONS_PUSH_QUEUE_KEY jobs:push_notifications --notifications-push-queue-key
--channel-prefix OBSCURA_NOTIFICATIONS_CHANNEL_PREFIX user: --notifications-channel-prefix
--visibility-timeout-secs OBSCURA_NOTIFICATIONS_VISIBILITY_TIMEOUT_SECS 30 --notifications-visibility-timeout-secs
--janitor-interval-secs OBSCURA_NOTIFICATIONS_JANITOR_INTERVAL_SECS 5 --notifications-invalid-token-cleanup-interval-secs OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_INTERVAL_SECS
--janitor-batch-size OBSCURA_NOTIFICATIONS_JANITOR_BATCH_SIZE 50 --notifications-invalid-token-cleanup-batch-size OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_BATCH_SIZE
--janitor-channel-capacity OBSCURA_NOTIFICATIONS_JANITOR_CHANNEL_CAPACITY 256 --notifications-invalid-token-cleanup-channel-capacity OBSCURA_NOTIFICATIONS_INVALID_TOKEN_CLEANUP_CHANNEL_CAPACITY
--pubsub-url OBSCURA_PUBSUB_URL redis://localhost:6379
--pubsub-min-backoff-secs OBSCURA_PUBSUB_MIN_BACKOFF_SECS 1
--pubsub-max-backoff-secs OBSCURA_PUBSUB_MAX_BACKOFF_SECS 30
--ws-outbound-buffer-size OBSCURA_WS_OUTBOUND_BUFFER_SIZE 32
--ws-ack-buffer-size OBSCURA_WS_ACK_BUFFER_SIZE 100
--ws-ack-batch-size OBSCURA_WS_ACK_BATCH_SIZE 50
--ws-ack-flush-interval-ms OBSCURA_WS_ACK_FLUSH_INTERVAL_MS 500
--storage-bucket OBSCURA_STORAGE_BUCKET obscura-attachments
--storage-region OBSCURA_STORAGE_REGION us-east-1
--storage-endpoint OBSCURA_STORAGE_ENDPOINT -
--storage-access-key OBSCURA_STORAGE_ACCESS_KEY -
--storage-secret-key OBSCURA_STORAGE_SECRET_KEY -
--storage-force-path-style OBSCURA_STORAGE_FORCE_PATH_STYLE false
--storage-max-size-bytes OBSCURA_STORAGE_MAX_SIZE_BYTES 52428800 --attachment-max-size-bytes OBSCURA_ATTACHMENT_MAX_SIZE_BYTES
--storage-cleanup-interval-secs OBSCURA_STORAGE_CLEANUP_INTERVAL_SECS 3600 --attachment-cleanup-interval-secs OBSCURA_ATTACHMENT_CLEANUP_INTERVAL_SECS
--storage-cleanup-batch-size OBSCURA_STORAGE_CLEANUP_BATCH_SIZE 100 --attachment-cleanup-batch-size OBSCURA_ATTACHMENT_CLEANUP_BATCH_SIZE
--otlp-endpoint OBSCURA_TELEMETRY_OTLP_ENDPOINT - --telemetry-otlp-endpoint
--log-format OBSCURA_TELEMETRY_LOG_FORMAT text --telemetry-log-format
--trace-sampling-ratio OBSCURA_TELEMETRY_TRACE_SAMPLING_RATIO 1.0 --telemetry-trace-sampling-ratio
--metrics-export-interval-secs OBSCURA_TELEMETRY_METRICS_EXPORT_INTERVAL_SECS 60 --telemetry-metrics-export-interval-secs
--export-timeout-secs OBSCURA_TELEMETRY_EXPORT_TIMEOUT_SECS 10 --telemetry-export-timeout-secs
";

/// Published for the same protocol, or for embedded mode.
pub const FURTHER: &str = "\
--data-dir OBSCURA_DATA_DIR -
--server-request-timeout-secs OBSCURA_SERVER_REQUEST_TIMEOUT_SECS 30
--server-global-timeout-secs OBSCURA_SERVER_GLOBAL_TIMEOUT_SECS 600
--auth-refresh-token-cleanup-interval-secs OBSCURA_AUTH_REFRESH_TOKEN_CLEANUP_INTERVAL_SECS 86400
--auth-max-devices-per-user OBSCURA_AUTH_MAX_DEVICES_PER_USER 10
--messaging-send-batch-limit OBSCURA_MESSAGING_SEND_BATCH_LIMIT 100
--messaging-idempotency-ttl-secs OBSCURA_MESSAGING_IDEMPOTENCY_TTL_SECS 86400
--attachment-prefix OBSCURA_ATTACHMENT_PREFIX attachments/
--attachment-min-size-bytes OBSCURA_ATTACHMENT_MIN_SIZE_BYTES 1
--attachment-timeout-secs OBSCURA_ATTACHMENT_TIMEOUT_SECS 120
--ws-prekey-debounce-interval-ms OBSCURA_WS_PREKEY_DEBOUNCE_INTERVAL_MS 500
--ws-ping-interval-secs OBSCURA_WS_PING_INTERVAL_SECS 30
--ws-ping-timeout-secs OBSCURA_WS_PING_TIMEOUT_SECS 10
--ws-max-batch-bytes OBSCURA_WS_MAX_BATCH_BYTES 8388608
--ws-fetch-retry-budget-ms OBSCURA_WS_FETCH_RETRY_BUDGET_MS 10000
--ws-ticket-ttl-secs OBSCURA_WS_TICKET_TTL_SECS 30
--pubsub-stable-after-secs OBSCURA_PUBSUB_STABLE_AFTER_SECS 30
--fcm-project-id OBSCURA_FCM_PROJECT_ID -
--fcm-credentials-file OBSCURA_FCM_CREDENTIALS_FILE -
--fcm-ttl-secs OBSCURA_FCM_TTL_SECS 604800
";

/// Of this server alone.
pub const OURS: &str = "\
--require-link-proof OBSCURA_AUTH_REQUIRE_LINK_PROOF false
--jwt-secret-previous OBSCURA_AUTH_JWT_SECRET_PREVIOUS -
--account-idle-days OBSCURA_ACCOUNT_IDLE_DAYS 0
--account-unused-days OBSCURA_ACCOUNT_UNUSED_DAYS 30
--sign-ups-per-hour OBSCURA_RATE_LIMIT_SIGN_UPS_PER_HOUR 1000
--sign-ups-per-day-per-address OBSCURA_RATE_LIMIT_SIGN_UPS_PER_DAY_PER_ADDRESS 50
--sign-ups-per-day-per-network OBSCURA_RATE_LIMIT_SIGN_UPS_PER_DAY_PER_NETWORK 200
--wrong-passwords-per-hour OBSCURA_RATE_LIMIT_WRONG_PASSWORDS_PER_HOUR 60
--wrong-passwords-burst OBSCURA_RATE_LIMIT_WRONG_PASSWORDS_BURST 10
--upload-rate-limit-per-second OBSCURA_RATE_LIMIT_UPLOADS_PER_SECOND 5
--upload-rate-limit-burst OBSCURA_RATE_LIMIT_UPLOADS_BURST 300
--mgmt-host OBSCURA_SERVER_MGMT_HOST -
--attachment-quota-bytes OBSCURA_ATTACHMENT_QUOTA_BYTES 1073741824
--account-rate-limit-per-second OBSCURA_RATE_LIMIT_ACCOUNT_PER_SECOND 30
--account-rate-limit-burst OBSCURA_RATE_LIMIT_ACCOUNT_BURST 300
--target-rate-limit-per-second OBSCURA_RATE_LIMIT_TARGET_PER_SECOND 50
--target-rate-limit-burst OBSCURA_RATE_LIMIT_TARGET_BURST 2000
--prekey-fetches-per-hour OBSCURA_RATE_LIMIT_PREKEY_FETCHES_PER_HOUR 60
--one-time-prekeys-per-hour OBSCURA_RATE_LIMIT_ONE_TIME_PREKEYS_PER_HOUR 10
--one-time-prekeys-burst OBSCURA_RATE_LIMIT_ONE_TIME_PREKEYS_BURST 50
--attachment-bytes-per-day OBSCURA_ATTACHMENT_BYTES_PER_DAY 1073741824
--inbox-max-bytes OBSCURA_MESSAGING_INBOX_MAX_BYTES 67108864
--inbox-sender-share-percent OBSCURA_MESSAGING_INBOX_SENDER_SHARE_PERCENT 25
--sender-bytes-per-day OBSCURA_MESSAGING_SENDER_BYTES_PER_DAY 1073741824
--db-max-size-bytes OBSCURA_DATABASE_MAX_SIZE_BYTES 0
--disk-reserve-bytes OBSCURA_DISK_RESERVE_BYTES 268435456
--db-statement-timeout-ms OBSCURA_DATABASE_STATEMENT_TIMEOUT_MS 10000
--db-lock-timeout-ms OBSCURA_DATABASE_LOCK_TIMEOUT_MS 5000
--storage-create-bucket OBSCURA_STORAGE_CREATE_BUCKET false
--shutdown-drain-delay-secs OBSCURA_SERVER_SHUTDOWN_DRAIN_DELAY_SECS 0
--health-optional OBSCURA_HEALTH_OPTIONAL -
--server-header-timeout-secs OBSCURA_SERVER_HEADER_TIMEOUT_SECS 75
--server-max-connections OBSCURA_SERVER_MAX_CONNECTIONS 65536
--server-max-connections-per-address OBSCURA_SERVER_MAX_CONNECTIONS_PER_ADDRESS 512
--ws-write-timeout-secs OBSCURA_WS_WRITE_TIMEOUT_SECS 20
--ws-max-connections-per-device OBSCURA_WS_MAX_CONNECTIONS_PER_DEVICE 8
--ws-look-interval-secs OBSCURA_WS_LOOK_INTERVAL_SECS 300
--fcm-endpoint OBSCURA_FCM_ENDPOINT https://fcm.googleapis.com
--apns-key-file OBSCURA_APNS_KEY_FILE -
--apns-key-id OBSCURA_APNS_KEY_ID -
--apns-team-id OBSCURA_APNS_TEAM_ID -
--apns-topic OBSCURA_APNS_TOPIC -
--apns-endpoint OBSCURA_APNS_ENDPOINT https://api.push.apple.com
--webpush-contact OBSCURA_WEBPUSH_CONTACT -
--webpush-allowed-networks OBSCURA_WEBPUSH_ALLOWED_NETWORKS -
--push-ca-file OBSCURA_PUSH_CA_FILE -
";
