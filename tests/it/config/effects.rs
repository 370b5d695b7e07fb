//! Where each option's effect is shown, in embedded and in distributed mode, or why it has none there. That a value is read
//! is no effect. The tests of both modes are the same functions, which run once in each (`OBSCURA_TEST_DEPLOYMENT`).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::options;

/// Where an effect is shown.
enum Shown {
    /// By these tests, `file:function`, the file below `tests/it` or beginning with `src/`.
    By(&'static [&'static str]),
    /// Nowhere, for this reason.
    Not(&'static str),
}

use Shown::{By, Not};

struct Effect {
    option: &'static str,
    embedded: Shown,
    distributed: Shown,
}

/// The same tests in both modes.
const fn both(option: &'static str, tests: &'static [&'static str]) -> Effect {
    Effect { option, embedded: By(tests), distributed: By(tests) }
}

/// No effect in embedded mode.
const fn distributed(option: &'static str, reason: &'static str, tests: &'static [&'static str]) -> Effect {
    Effect { option, embedded: Not(reason), distributed: By(tests) }
}

/// No effect in either mode.
const fn neither(option: &'static str, reason: &'static str) -> Effect {
    Effect { option, embedded: Not(reason), distributed: Not(reason) }
}

const READERS: &str = "SQLite has one writer and a fixed number of readers, which are never replaced";
const NO_SERVER: &str = "it is a setting of connections to PostgreSQL";
const NO_BROKER: &str = "signals stay in the process; with --pubsub-url it is as in distributed mode";
const IN_MEMORY: &str = "the queue is in memory; with --pubsub-url it is as in distributed mode";
const AT_ONCE: &str = "a folder answers at once, or says why not; with a bucket it is as in distributed mode";
const MERGED: &str = "accepted for compatibility: signals merge and are passed on at once, so none ever wait";
const ONE_FRAME: &str = "accepted for compatibility: one frame of a socket is under way at a time, so none ever wait";

#[rustfmt::skip] // One option is one row.
static EFFECTS: &[Effect] = &[
    Effect {
        option: "data-dir",
        embedded: By(&["start.rs:a_generated_secret_is_for_the_owner_only_and_is_kept", "start.rs:two_servers_do_not_share_a_folder"]),
        distributed: Not("it is what makes a server an embedded one"),
    },
    Effect {
        option: "disk-reserve-bytes",
        embedded: By(&["disk.rs:a_full_disk_refuses_sends_and_uploads_and_lets_everything_else_go_on", "disk.rs:a_full_disk_refuses_accounts_devices_and_keys"]),
        distributed: Not("a node keeps nothing on a disk of its own; --db-max-size-bytes bounds the database"),
    },
    both("ttl-days", &["options.rs:a_message_lives_as_many_days_as_the_option_says", "api/attachments.rs:an_attachment_is_gone_from_the_announced_second_on"]),
    both("account-idle-days", &["sweeps.rs:an_account_that_is_not_used_any_more_goes_with_its_mail_and_its_name_is_free"]),
    both("account-unused-days", &["sweeps.rs:an_account_that_was_never_used_goes_by_default_and_one_that_was_used_stays"]),

    both("db-url", &["start.rs:a_database_of_a_newer_version_is_left_alone", "crash.rs:what_was_answered_survives_twenty_crashes"]),
    distributed("db-max-connections", READERS, &["cluster/connections.rs:there_are_never_more_connections_than_the_maximum"]),
    distributed("db-min-connections", READERS, &["cluster/connections.rs:idle_connections_go_down_to_the_minimum_and_old_ones_are_replaced"]),
    Effect {
        option: "db-acquire-timeout-secs",
        embedded: By(&["api/repeats.rs:a_send_that_the_database_could_not_take_leaves_nothing_and_may_be_repeated"]),
        distributed: By(&["cluster/connections.rs:who_gets_no_connection_in_time_is_told_and_a_statement_or_lock_that_takes_too_long_is_given_up"]),
    },
    distributed("db-idle-timeout-secs", READERS, &["cluster/connections.rs:idle_connections_go_down_to_the_minimum_and_old_ones_are_replaced"]),
    distributed("db-max-lifetime-secs", READERS, &["cluster/connections.rs:idle_connections_go_down_to_the_minimum_and_old_ones_are_replaced"]),
    distributed("db-statement-timeout-ms", NO_SERVER, &["cluster/faults.rs:while_postgresql_is_frozen_sends_are_refused_in_time_and_afterwards_they_go_on"]),
    distributed("db-lock-timeout-ms", NO_SERVER, &["cluster/connections.rs:who_gets_no_connection_in_time_is_told_and_a_statement_or_lock_that_takes_too_long_is_given_up"]),
    both("db-max-size-bytes", &["disk.rs:a_database_above_its_bound_grows_no_more_and_its_messages_are_delivered"]),

    both("server-host", &["options.rs:both_ports_are_where_the_options_say"]),
    both("server-port", &["options.rs:both_ports_are_where_the_options_say", "start.rs:a_port_in_use_is_named"]),
    both("mgmt-port", &["options.rs:both_ports_are_where_the_options_say", "commands.rs:a_health_check_reads_the_same_variables_as_the_server"]),
    both("mgmt-host", &["management.rs:the_management_port_has_an_address_of_its_own", "management.rs:a_health_check_asks_at_the_management_address"]),
    both("shutdown-timeout-secs", &["shutdown.rs:clients_that_do_not_let_go_do_not_hold_it_up", "shutdown.rs:a_second_signal_ends_it_at_once"]),
    both("shutdown-drain-delay-secs", &["health.rs:readiness_goes_down_before_anything_else_does"]),
    both("server-request-timeout-secs", &["api/timeouts.rs:an_upload_that_stalls_gets_408"]),
    both("server-global-timeout-secs", &["api/timeouts.rs:the_timeout_on_top_of_all_others_holds_for_attachments_too"]),
    both("server-header-timeout-secs", &["api/timeouts.rs:a_connection_whose_request_head_does_not_come_is_closed"]),
    both("trusted-proxies", &["api/limits.rs:clients_behind_a_trusted_proxy_are_told_apart", "api/limits.rs:a_forwarded_address_from_a_stranger_is_not_believed"]),
    both("server-max-connections", &["api/limits.rs:a_trusted_proxy_has_all_connections_but_no_more"]),
    both("server-max-connections-per-address", &["api/limits.rs:one_address_has_a_share_of_the_connections"]),

    Effect {
        option: "jwt-secret",
        embedded: By(&["start.rs:a_published_or_short_secret_is_refused_and_never_repeated", "src/config/secret.rs:a_given_secret_is_used_and_not_kept"]),
        distributed: By(&["api/tokens.rs:all_claims_are_needed_and_have_to_fit_each_other", "cluster/nodes.rs:a_device_joins_over_three_nodes"]),
    },
    Effect {
        option: "jwt-secret-previous",
        embedded: By(&["api/refresh.rs:a_refresh_that_is_repeated_across_a_change_of_the_signing_secret_gets_its_answer"]),
        distributed: By(&["cluster/secrets.rs:nodes_restarted_one_by_one_accept_each_others_tokens_and_repeat_each_others_refreshes"]),
    },
    both("access-token-ttl-secs", &["options.rs:an_access_token_lives_as_long_as_the_option_says"]),
    both("refresh-token-ttl-days", &["api/refresh.rs:with_a_lifetime_of_zero_a_refresh_token_is_dead_on_arrival"]),
    both("auth-refresh-token-cleanup-interval-secs", &["options.rs:the_sweeps_come_again_after_the_pauses_that_the_options_say"]),
    both("auth-max-devices-per-user", &["api/devices.rs:the_device_limit_names_its_number_and_leaves_the_session_usable"]),
    both("require-link-proof", &["api/link_proofs.rs:an_option_makes_the_proof_mandatory_for_all"]),

    both("rate-limit-per-second", &["src/limits/tests.rs:a_burst_is_there_at_first_and_a_token_comes_back_each_time", "api/limits.rs:the_tiers_do_not_share_their_tokens"]),
    both("rate-limit-burst", &["api/limits.rs:a_request_too_many_is_told_when_to_come_again"]),
    both("auth-rate-limit-per-second", &["src/limits/tests.rs:a_burst_is_there_at_first_and_a_token_comes_back_each_time", "api/limits.rs:waiting_as_long_as_told_suffices"]),
    both("auth-rate-limit-burst", &["api/limits.rs:the_tiers_do_not_share_their_tokens"]),
    both("account-rate-limit-per-second", &["src/limits/rate_limit/tests.rs:a_subject_has_a_burst_at_first_and_waiting_as_long_as_stated_suffices"]),
    both("account-rate-limit-burst", &["api/account_limits.rs:an_account_is_limited_whatever_addresses_it_comes_from"]),
    both("target-rate-limit-per-second", &["src/limits/tests.rs:a_flood_at_one_account_is_slowed_and_others_still_reach_it"]),
    both("target-rate-limit-burst", &["api/account_limits.rs:a_flood_at_one_account_is_slowed_and_its_friends_still_reach_it"]),
    both("prekey-fetches-per-hour", &["api/account_limits.rs:an_account_cannot_drain_the_prekeys_of_another"]),
    both("one-time-prekeys-per-hour", &["src/limits/tests.rs:all_askers_share_the_one_time_prekeys_of_an_account"]),
    both("one-time-prekeys-burst", &["api/account_limits.rs:many_askers_do_not_drain_the_one_time_prekeys_of_an_account"]),
    both("sign-ups-per-hour", &["src/limits/accounts.rs:sign_ups_have_a_share_for_each_address_and_network_and_a_total"]),
    both("sign-ups-per-day-per-address", &["api/intake.rs:sign_ups_from_one_address_and_its_neighbours_have_a_limit_and_others_go_on"]),
    both("sign-ups-per-day-per-network", &["api/intake.rs:sign_ups_from_one_address_and_its_neighbours_have_a_limit_and_others_go_on"]),
    both("wrong-passwords-per-hour", &["src/limits/accounts.rs:wrong_passwords_slow_an_account_and_right_ones_cost_nothing"]),
    both("wrong-passwords-burst", &["api/intake.rs:guesses_at_one_account_are_slowed_whether_or_not_it_exists"]),
    both("upload-rate-limit-per-second", &["src/limits/accounts.rs:uploads_of_an_account_have_a_rate_and_a_number_under_way"]),
    both("upload-rate-limit-burst", &["api/intake.rs:an_album_of_a_hundred_pictures_passes_and_a_flood_of_uploads_does_not"]),

    Effect {
        option: "db-timeout-ms",
        embedded: By(&["health.rs:a_database_that_is_busy_for_too_long_is_not_ready_in_embedded_mode_either"]),
        distributed: By(&["health.rs:each_part_is_asked_within_a_limit_of_its_own_that_holds_up_no_other"]),
    },
    distributed("storage-timeout-ms", AT_ONCE, &["health.rs:each_part_is_asked_within_a_limit_of_its_own_that_holds_up_no_other"]),
    distributed("pubsub-timeout-ms", NO_BROKER, &["health.rs:each_part_is_asked_within_a_limit_of_its_own_that_holds_up_no_other"]),
    Effect {
        option: "health-optional",
        embedded: By(&["health.rs:a_node_that_may_do_without_its_storage_starts_without_it_and_uses_it_once_it_is_there"]),
        distributed: By(&["health.rs:optional_parts_degrade_a_node_and_the_database_is_never_one"]),
    },

    both("max-inbox-size", &["api/inbox.rs:a_repeat_after_acks_queues_only_the_rest"]),
    both("inbox-max-bytes", &["store/inbox_limits.rs:bytes_fill_an_inbox_as_messages_do"]),
    both("inbox-sender-share-percent", &["store/inbox_limits.rs:a_sender_has_its_share_only_above_half_and_own_devices_have_all"]),
    both("sender-bytes-per-day", &["store/inbox_limits.rs:an_account_queues_so_many_bytes_in_a_day_also_after_a_restart"]),
    both("messaging-cleanup-interval-secs", &["options.rs:the_sweeps_come_again_after_the_pauses_that_the_options_say"]),
    both("batch-limit", &["gateway/delivery.rs:the_number_of_messages_in_a_frame_can_be_configured"]),
    both("messaging-send-batch-limit", &["options.rs:a_send_has_as_many_recipients_and_submissions_as_the_option_says"]),
    both("messaging-idempotency-ttl-secs", &["options.rs:the_outcome_of_a_send_is_kept_as_long_as_the_option_says"]),

    both("pre-key-refill-threshold", &["gateway/prekeys.rs:the_threshold_can_be_configured"]),
    both("max-pre-keys", &["api/keys/refilling.rs:the_oldest_keys_make_room_so_that_the_total_is_the_maximum"]),

    Effect {
        option: "gc-interval-secs",
        embedded: By(&["push/rebuilt.rs:the_inboxes_are_looked_through_once_in_an_interval"]),
        distributed: By(&["push/rebuilt.rs:a_valkey_that_was_emptied_costs_time_and_no_push", "bus/crossing.rs:a_node_subscribes_the_channels_of_its_own_accounts_only_and_leaves_them_later"]),
    },
    neither("global-channel-capacity", MERGED),
    neither("user-channel-capacity", MERGED),
    both("push-delay-secs", &["push/timing.rs:no_push_comes_before_the_grace_is_over"]),
    both("worker-interval-secs", &["push/options.rs:the_queue_is_looked_at_once_in_an_interval"]),
    both("worker-concurrency", &["push/answers.rs:a_provider_that_hangs_does_not_stop_another"]),
    distributed("push-queue-key", IN_MEMORY, &["push/rebuilt.rs:the_queue_in_valkey_wakes_once_and_is_empty_then"]),
    distributed("channel-prefix", NO_BROKER, &["bus/crossing.rs:a_node_subscribes_the_channels_of_its_own_accounts_only_and_leaves_them_later"]),
    both("visibility-timeout-secs", &["push/answers.rs:a_failed_push_is_tried_again_when_its_lease_is_over_and_then_no_more", "push/rebuilt.rs:a_lease_that_was_lost_runs_out"]),
    both("janitor-interval-secs", &["push/options.rs:the_janitor_comes_once_in_an_interval"]),
    both("janitor-batch-size", &["push/options.rs:the_janitor_removes_so_many_tokens_at_a_time"]),
    both("janitor-channel-capacity", &["push/options.rs:a_dead_token_that_the_janitor_has_no_room_for_is_asked_for_again"]),

    Effect {
        option: "pubsub-url",
        embedded: By(&["bus/readiness.rs:an_outage_is_told_once_and_its_end_too_and_waiting_for_it_costs_nothing"]),
        distributed: By(&["cluster/nodes.rs:a_message_sent_at_one_node_reaches_a_socket_at_another"]),
    },
    distributed("pubsub-min-backoff-secs", NO_BROKER, &["bus/faults.rs:a_valkey_that_stays_away_is_asked_ever_more_rarely"]),
    distributed("pubsub-max-backoff-secs", NO_BROKER, &["bus/faults.rs:a_valkey_that_stays_away_is_asked_ever_more_rarely"]),
    distributed("pubsub-stable-after-secs", NO_BROKER, &["src/bus/backoff.rs:it_grows_by_half_up_to_its_limit_and_starts_over_after_a_good_connection"]),

    neither("ws-outbound-buffer-size", ONE_FRAME),
    both("ws-ack-buffer-size", &["options.rs:a_socket_is_read_no_further_while_as_many_acks_wait_as_may"]),
    both("ws-ack-batch-size", &["gateway/acks.rs:acks_wait_for_company_and_are_written_when_there_is_enough"]),
    both("ws-ack-flush-interval-ms", &["gateway/acks.rs:acks_wait_for_company_and_are_written_when_there_is_enough"]),
    both("ws-prekey-debounce-interval-ms", &["gateway/prekeys.rs:a_burst_of_fetches_is_told_once_with_the_final_count"]),
    both("ws-ping-interval-secs", &["gateway/liveness.rs:a_silent_client_is_pinged_and_then_closed_with_an_empty_frame"]),
    both("ws-ping-timeout-secs", &["gateway/liveness.rs:a_silent_client_is_pinged_and_then_closed_with_an_empty_frame"]),
    both("ws-max-batch-bytes", &["gateway/delivery.rs:a_frame_is_closed_before_it_grows_too_large_and_a_larger_message_travels_alone"]),
    both("ws-fetch-retry-budget-ms", &["options.rs:failed_reads_of_an_inbox_are_retried_quickly_only_within_the_budget"]),
    both("ws-ticket-ttl-secs", &["options.rs:a_ticket_lives_as_long_as_the_option_says"]),
    both("ws-write-timeout-secs", &["gateway/slow.rs:a_client_that_takes_no_byte_is_closed_at_the_write_deadline"]),
    both("ws-max-connections-per-device", &["gateway/delivery.rs:one_socket_too_many_closes_the_oldest"]),
    both("ws-look-interval-secs", &["options.rs:a_lost_signal_is_made_up_for_by_a_resync_after_the_interval"]),

    // A folder has none of the five, but an embedded server may have its attachments in a bucket, as in these tests.
    both("storage-bucket", &["blobs/opening.rs:a_missing_bucket_is_told_with_its_name_its_place_and_the_way_out"]),
    both("storage-region", &["src/blobs/s3.rs:the_bucket_goes_into_the_host_or_the_path", "blobs/opening.rs:a_bucket_is_made_on_request_and_one_that_is_there_is_fine"]),
    both("storage-endpoint", &["blobs/server.rs:an_attachment_in_a_bucket_is_served_whole_and_in_part"]),
    both("storage-access-key", &["blobs/opening.rs:wrong_keys_are_told_and_not_repeated"]),
    both("storage-secret-key", &["blobs/opening.rs:wrong_keys_are_told_and_not_repeated"]),
    both("storage-force-path-style", &["src/blobs/s3.rs:the_bucket_goes_into_the_host_or_the_path"]),
    both("storage-create-bucket", &["blobs/opening.rs:a_bucket_is_made_on_request_and_one_that_is_there_is_fine"]),
    both("attachment-prefix", &["blobs/contract.rs:a_prefix_begins_the_name_of_an_object"]),
    both("attachment-min-size-bytes", &["api/attachments.rs:an_upload_is_checked_in_the_order_of_the_contract"]),
    both("storage-max-size-bytes", &["api/attachments.rs:the_sizes_at_the_limits_are_allowed"]),
    both("attachment-quota-bytes", &["api/attachments.rs:an_account_has_a_quota_of_its_own"]),
    both("attachment-bytes-per-day", &["api/account_limits.rs:an_account_uploads_so_many_bytes_in_a_day_on_any_node_and_after_any_restart"]),
    both("attachment-timeout-secs", &["api/timeouts.rs:an_upload_that_stalls_gets_408"]),
    both("storage-cleanup-interval-secs", &["options.rs:the_sweeps_come_again_after_the_pauses_that_the_options_say"]),
    both("storage-cleanup-batch-size", &["options.rs:expired_attachments_are_removed_so_many_at_a_time"]),

    both("fcm-project-id", &["push/options.rs:a_push_goes_to_the_project_and_lives_as_long_as_the_options_say"]),
    both("fcm-credentials-file", &["push/fcm.rs:the_access_token_is_asked_for_once_with_a_signed_assertion"]),
    both("fcm-ttl-secs", &["push/options.rs:a_push_goes_to_the_project_and_lives_as_long_as_the_options_say"]),
    both("fcm-endpoint", &["push/fcm.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("apns-key-file", &["push/apns.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("apns-key-id", &["push/apns.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("apns-team-id", &["push/apns.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("apns-topic", &["push/apns.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("apns-endpoint", &["push/apns.rs:a_push_says_that_it_is_time_to_connect_and_nothing_else"]),
    both("webpush-contact", &["push/webpush.rs:a_browser_can_read_its_push_and_knows_who_sent_it"]),
    both("webpush-allowed-networks", &["push/webpush.rs:an_endpoint_in_our_own_network_is_not_called", "push/webpush.rs:a_browser_can_read_its_push_and_knows_who_sent_it"]),
    both("push-ca-file", &["push/webpush.rs:a_browser_can_read_its_push_and_knows_who_sent_it"]),

    both("otlp-endpoint", &["telemetry/export.rs:traces_metrics_and_logs_arrive_to_the_last_of_them"]),
    both("log-format", &["options.rs:log_lines_are_objects_when_they_are_for_machines"]),
    both("trace-sampling-ratio", &["telemetry/requests.rs:a_client_cannot_have_more_traces_recorded_than_the_ratio_says", "telemetry/requests.rs:with_a_ratio_of_zero_no_trace_is_kept"]),
    both("metrics-export-interval-secs", &["telemetry/export.rs:metrics_come_as_often_as_asked_and_once_more_at_the_end"]),
    both("export-timeout-secs", &["telemetry/export.rs:a_call_to_the_collector_takes_as_long_as_the_timeout_says"]),
];

#[test]
fn every_option_has_a_test_that_shows_its_effect_or_a_reason_why_none_does() {
    let expected: Vec<&str> = options().map(|option| option.flag).collect();
    let listed: Vec<&str> = EFFECTS.iter().map(|effect| effect.option).collect();
    assert_eq!(listed, expected, "the rows are the options, in their order");
    for Effect { option, embedded, distributed } in EFFECTS {
        for shown in [embedded, distributed] {
            match shown {
                By(tests) => assert!(!tests.is_empty(), "--{option}: no test"),
                Not(reason) => assert!(reason.len() > 20, "--{option}: no reason"),
            }
        }
    }
}

#[test]
fn the_tests_that_show_effects_exist_and_run_in_their_mode() {
    for effect in EFFECTS {
        for (shown, elsewhere) in [(&effect.embedded, "start_node"), (&effect.distributed, "start_embedded")] {
            let By(tests) = shown else { continue };
            for test in *tests {
                let body = body_of(test);
                assert!(!body.contains(elsewhere), "--{}: {test} does not run in this mode", effect.option);
            }
        }
    }
}

#[test]
fn a_test_that_shows_an_effect_is_named_once_for_an_option() {
    for effect in EFFECTS {
        for shown in [&effect.embedded, &effect.distributed] {
            let By(tests) = shown else { continue };
            assert_eq!(tests.iter().collect::<BTreeSet<_>>().len(), tests.len(), "--{}", effect.option);
        }
    }
}

/// The text of a test.
fn body_of(test: &str) -> String {
    let (file, name) = test.split_once(':').expect("file:function");
    let folder = if file.starts_with("src/") { "" } else { "tests/it" };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{test}: {error}"));
    let (before, after) = text.split_once(&format!("fn {name}(")).unwrap_or_else(|| panic!("{test} is no function"));
    let attribute = before.lines().rev().nth(1).unwrap_or_default().trim();
    assert!(attribute.starts_with("#[test]") || attribute.starts_with("#[tokio::test"), "{test} is no test");
    after.split("#[test]").next().and_then(|text| text.split("#[tokio::test").next()).unwrap_or_default().to_owned()
}
