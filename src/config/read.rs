//! From arguments and variables to the typed settings.

use std::{ffi::OsString, path::Path, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::config::{
    AccountRates, Accounts, Apns, Attachments, Auth, Config, ConfigError, Database, Fcm, Gateway, Grouping, Health,
    LogFormat, Messaging, Notifications, Prekeys, Pubsub, RateLimits, Secret, Server, Telemetry, WebPush,
    given::Given,
    option::{Opt, Takes},
    table::GROUPS,
};

/// A configuration that was found good.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Sentences to log once logging has started.
    pub warnings: Vec<String>,
}

/// A variable of the real environment. Nothing else in the server reads it.
pub fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl Config {
    /// The grammar of the command line, to which subcommands may be added: they take every option too.
    pub fn command() -> Command {
        let command = Command::new("obscura-server")
            .version(env!("CARGO_PKG_VERSION"))
            .about(env!("CARGO_PKG_DESCRIPTION"))
            .before_help("To try it on this machine alone: obscura-server --data-dir ./data")
            .after_help(
                "Every option is also read from the variable behind `env`; flags win, and a blank variable counts as \
                 not given.\nA variable marked [_FILE] may instead be given with _FILE at the end of its name: it then \
                 names a file with the value.",
            )
            .next_line_help(true);
        GROUPS.iter().fold(command, |command, group| {
            let command = command.next_help_heading(group.title);
            group.options.iter().fold(command, |command, option| {
                let alias = option.alias_flag.map(|flag| argument(option, flag).hide(true));
                command.arg(argument(option, option.flag).help(help(option))).args(alias)
            })
        })
    }

    /// The settings that these arguments, the program's name first, and these variables make.
    pub fn parse_from<T: Into<OsString> + Clone>(
        arguments: impl IntoIterator<Item = T>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Loaded, ConfigError> {
        Self::read(&Self::command().try_get_matches_from(arguments)?, variable)
    }

    /// The settings of a command line that was matched by `Config::command()` or by a subcommand of it.
    pub fn read(matches: &ArgMatches, variable: impl Fn(&str) -> Option<OsString>) -> Result<Loaded, ConfigError> {
        let mut given = Given::find(matches, &variable)?;
        check_together(&mut given)?;
        let config = Self {
            data_dir: given.optional("data-dir").map(Into::into),
            database: database(&given),
            server: server(&given),
            auth: auth(&given),
            rate_limits: rate_limits(&given),
            account_rates: account_rates(&given),
            health: health(&given),
            retention: given.duration("ttl-days"),
            accounts: Accounts {
                sign_ups_per_hour: given.number("sign-ups-per-hour"),
                sign_ups_per_address: given.number("sign-ups-per-day-per-address"),
                sign_ups_per_network: given.number("sign-ups-per-day-per-network"),
                wrong_passwords_per_hour: given.number("wrong-passwords-per-hour"),
                wrong_passwords_burst: given.number("wrong-passwords-burst"),
                uploads_per_second: given.number("upload-rate-limit-per-second"),
                uploads_burst: given.number("upload-rate-limit-burst"),
                idle: given.duration("account-idle-days"),
                unused: given.duration("account-unused-days"),
            },
            messaging: messaging(&given),
            prekeys: prekeys(&given),
            notifications: notifications(&given),
            pubsub: pubsub(&given),
            gateway: gateway(&given),
            attachments: attachments(&given),
            fcm: fcm(&given),
            apns: apns(&given),
            web_push: web_push(&given),
            telemetry: telemetry(&given),
            disk_reserve_bytes: given.number("disk-reserve-bytes"),
        };
        Ok(Loaded { config, warnings: given.warnings })
    }

    /// The defaults of embedded mode in this folder. It is not touched before `open_data_dir`.
    pub fn embedded(data_dir: &Path) -> Result<Self, ConfigError> {
        let arguments = ["obscura-server".as_ref(), "--data-dir".as_ref(), data_dir.as_os_str()];
        Ok(Self::parse_from(arguments, |_| None)?.config)
    }
}

/// Both spellings are arguments of their own: only so can it be told which one was used.
fn argument(option: &Opt, flag: &'static str) -> Arg {
    let argument = Arg::new(flag).long(flag).value_name(option.takes.placeholder()).global(true);
    match option.takes {
        Takes::YesNo => argument.num_args(0..=1).default_missing_value("true"),
        Takes::Networks | Takes::Words(_) => argument.action(ArgAction::Append),
        // A negative number then reaches our own check, which says what is allowed.
        _ => argument.allow_negative_numbers(true),
    }
}

fn help(option: &Opt) -> String {
    let mut help = format!("{}\n[env: {}]", option.sentence(), option.variable);
    if option.secret {
        help += " [_FILE]";
    }
    if let Some(default) = option.default {
        help += &format!(" [default: {default}]");
    }
    if let Some(embedded) = option.embedded.filter(|embedded| !embedded.is_empty()) {
        help += &format!(" [with --data-dir: {embedded}]");
    }
    if let Some(alias) = option.alias_flag {
        help += &format!("\n[alias: --{alias}]");
    }
    if let Some(alias) = option.alias_variable {
        help += &format!(" [alias: {alias}]");
    }
    help
}

fn check_together(given: &mut Given) -> Result<(), ConfigError> {
    given.keep_order("db-min-connections", "db-max-connections")?;
    given.keep_order("pre-key-refill-threshold", "max-pre-keys")?;
    given.keep_order("pubsub-min-backoff-secs", "pubsub-max-backoff-secs")?;
    given.keep_order("attachment-min-size-bytes", "storage-max-size-bytes")?;

    let ports = ["server-port", "mgmt-port"].map(|flag| given.number::<u16>(flag));
    if ports[0] == ports[1] && ports[0] != 0 {
        let (flag, other) =
            if given.is_written("mgmt-port") { ("mgmt-port", "server-port") } else { ("server-port", "mgmt-port") };
        return Err(given.refuse(flag, &format!("another port than --{other}")));
    }
    let is_bucket = !given.optional("storage-endpoint").is_some_and(|url| url.starts_with("file:"));
    for (one, other) in [("storage-access-key", "storage-secret-key"), ("storage-secret-key", "storage-access-key")] {
        if is_bucket && given.is_written(one) && !given.is_written(other) {
            return Err(given.refuse(one, &format!("--{other} beside it")));
        }
    }
    Ok(())
}

fn database(given: &Given) -> Database {
    Database {
        url: given.secret("db-url"),
        max_connections: given.number("db-max-connections"),
        min_connections: given.number("db-min-connections"),
        acquire_timeout: given.duration("db-acquire-timeout-secs"),
        idle_timeout: given.duration("db-idle-timeout-secs"),
        max_lifetime: given.duration("db-max-lifetime-secs"),
        statement_timeout: given.duration("db-statement-timeout-ms"),
        lock_timeout: given.duration("db-lock-timeout-ms"),
        max_size_bytes: given.number("db-max-size-bytes"),
    }
}

fn server(given: &Given) -> Server {
    let host = given.address("server-host");
    Server {
        host,
        management_host: given.optional_address("mgmt-host").unwrap_or(host),
        port: given.number("server-port"),
        management_port: given.number("mgmt-port"),
        shutdown_timeout: given.duration("shutdown-timeout-secs"),
        drain_delay: given.duration("shutdown-drain-delay-secs"),
        request_timeout: given.duration("server-request-timeout-secs"),
        global_timeout: given.duration("server-global-timeout-secs"),
        header_timeout: given.duration("server-header-timeout-secs"),
        trusted_proxies: given.networks("trusted-proxies"),
        max_connections: given.number("server-max-connections"),
        max_connections_per_address: given.number("server-max-connections-per-address"),
    }
}

fn auth(given: &Given) -> Auth {
    Auth {
        jwt_secret: given.secret("jwt-secret"),
        jwt_secret_previous: given.optional("jwt-secret-previous").map(Secret::new),
        access_token_lifetime: given.duration("access-token-ttl-secs"),
        refresh_token_lifetime: given.duration("refresh-token-ttl-days"),
        refresh_token_cleanup_interval: given.duration("auth-refresh-token-cleanup-interval-secs"),
        max_devices_per_user: given.number("auth-max-devices-per-user"),
        require_link_proof: given.is_on("require-link-proof"),
    }
}

fn rate_limits(given: &Given) -> RateLimits {
    let at_least_one = |flag| given.number::<u32>(flag).max(1);
    RateLimits {
        per_second: at_least_one("rate-limit-per-second"),
        burst: at_least_one("rate-limit-burst"),
        auth_per_second: at_least_one("auth-rate-limit-per-second"),
        auth_burst: at_least_one("auth-rate-limit-burst"),
    }
}

fn account_rates(given: &Given) -> AccountRates {
    AccountRates {
        per_second: given.number("account-rate-limit-per-second"),
        burst: given.number("account-rate-limit-burst"),
        target_per_second: given.number("target-rate-limit-per-second"),
        target_burst: given.number("target-rate-limit-burst"),
        bundles_per_hour: given.number("prekey-fetches-per-hour"),
        one_time_prekeys_per_hour: given.number("one-time-prekeys-per-hour"),
        one_time_prekeys_burst: given.number("one-time-prekeys-burst"),
    }
}

fn health(given: &Given) -> Health {
    Health {
        database_timeout: given.duration("db-timeout-ms"),
        storage_timeout: given.duration("storage-timeout-ms"),
        pubsub_timeout: given.duration("pubsub-timeout-ms"),
        is_storage_optional: given.has_word("health-optional", "storage"),
        is_pubsub_optional: given.has_word("health-optional", "pubsub"),
    }
}

fn messaging(given: &Given) -> Messaging {
    Messaging {
        max_inbox_size: given.number("max-inbox-size"),
        inbox_max_bytes: given.number("inbox-max-bytes"),
        sender_share_percent: given.number("inbox-sender-share-percent"),
        sender_bytes_per_day: given.number("sender-bytes-per-day"),
        cleanup_interval: given.duration("messaging-cleanup-interval-secs"),
        batch_limit: given.number("batch-limit"),
        send_batch_limit: given.number("messaging-send-batch-limit"),
        idempotency_lifetime: given.duration("messaging-idempotency-ttl-secs"),
        grouping: Grouping { max_requests: 512, linger: None },
    }
}

fn prekeys(given: &Given) -> Prekeys {
    Prekeys { refill_threshold: given.number("pre-key-refill-threshold"), max: given.number("max-pre-keys") }
}

fn notifications(given: &Given) -> Notifications {
    Notifications {
        gc_interval: given.duration("gc-interval-secs"),
        global_channel_capacity: given.number("global-channel-capacity"),
        user_channel_capacity: given.number("user-channel-capacity"),
        push_delay: given.duration("push-delay-secs"),
        worker_interval: given.duration("worker-interval-secs"),
        worker_concurrency: given.number("worker-concurrency"),
        push_queue_key: given.text("push-queue-key"),
        channel_prefix: given.text("channel-prefix"),
        visibility_timeout: given.duration("visibility-timeout-secs"),
        janitor_interval: given.duration("janitor-interval-secs"),
        janitor_batch_size: given.number("janitor-batch-size"),
        janitor_channel_capacity: given.number("janitor-channel-capacity"),
    }
}

fn pubsub(given: &Given) -> Pubsub {
    Pubsub {
        url: given.secret("pubsub-url"),
        min_backoff: given.duration("pubsub-min-backoff-secs"),
        max_backoff: given.duration("pubsub-max-backoff-secs"),
        stable_after: given.duration("pubsub-stable-after-secs"),
    }
}

fn gateway(given: &Given) -> Gateway {
    Gateway {
        outbound_buffer_size: given.number("ws-outbound-buffer-size"),
        ack_buffer_size: given.number("ws-ack-buffer-size"),
        ack_batch_size: given.number("ws-ack-batch-size"),
        ack_flush_interval: given.duration("ws-ack-flush-interval-ms").max(Duration::from_millis(1)),
        prekey_debounce: given.duration("ws-prekey-debounce-interval-ms").max(Duration::from_millis(1)),
        ping_interval: given.duration("ws-ping-interval-secs").max(Duration::from_secs(1)),
        ping_timeout: given.duration("ws-ping-timeout-secs"),
        max_batch_bytes: given.number("ws-max-batch-bytes"),
        fetch_retry_budget: given.duration("ws-fetch-retry-budget-ms"),
        ticket_lifetime: given.duration("ws-ticket-ttl-secs"),
        write_timeout: given.duration("ws-write-timeout-secs"),
        resync_interval: given.duration("ws-look-interval-secs"),
        max_connections_per_device: given.number("ws-max-connections-per-device"),
    }
}

fn attachments(given: &Given) -> Attachments {
    Attachments {
        bucket: given.text("storage-bucket"),
        region: given.text("storage-region"),
        endpoint: given.optional("storage-endpoint").map(|url| match url.strip_prefix("file://") {
            Some(path) => format!("file:{path}"),
            None => url,
        }),
        access_key: given.optional("storage-access-key").map(Secret::new),
        secret_key: given.optional("storage-secret-key").map(Secret::new),
        force_path_style: given.is_on("storage-force-path-style"),
        create_bucket: given.is_on("storage-create-bucket"),
        prefix: given.text("attachment-prefix"),
        min_size_bytes: given.number("attachment-min-size-bytes"),
        max_size_bytes: given.number("storage-max-size-bytes"),
        cleanup_interval: given.duration("storage-cleanup-interval-secs"),
        cleanup_batch_size: given.number("storage-cleanup-batch-size"),
        timeout: given.duration("attachment-timeout-secs"),
        quota_bytes: given.number("attachment-quota-bytes"),
        bytes_per_day: given.number("attachment-bytes-per-day"),
    }
}

fn fcm(given: &Given) -> Fcm {
    Fcm {
        project_id: given.optional("fcm-project-id"),
        credentials_file: given.optional("fcm-credentials-file").map(Into::into),
        ttl: given.duration("fcm-ttl-secs"),
        endpoint: given.text("fcm-endpoint"),
    }
}

fn apns(given: &Given) -> Apns {
    Apns {
        key_file: given.optional("apns-key-file").map(Into::into),
        key_id: given.optional("apns-key-id"),
        team_id: given.optional("apns-team-id"),
        topic: given.optional("apns-topic"),
        endpoint: given.text("apns-endpoint"),
    }
}

fn web_push(given: &Given) -> WebPush {
    WebPush {
        contact: given.optional("webpush-contact"),
        allowed_networks: given.networks("webpush-allowed-networks"),
        ca_file: given.optional("push-ca-file").map(Into::into),
    }
}

fn telemetry(given: &Given) -> Telemetry {
    Telemetry {
        otlp_endpoint: given.optional("otlp-endpoint"),
        log_format: if given.text("log-format") == "json" { LogFormat::Json } else { LogFormat::Text },
        trace_sampling_ratio: given.ratio("trace-sampling-ratio"),
        metrics_export_interval: given.duration("metrics-export-interval-secs"),
        export_timeout: given.duration("export-timeout-secs"),
    }
}

#[cfg(test)]
mod tests;
