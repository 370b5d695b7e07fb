use super::*;

fn read(arguments: &[&str]) -> Result<Config, String> {
    let loaded = Config::parse_from([&["obscura-server"], arguments].concat(), |_| None);
    loaded.map(|loaded| loaded.config).map_err(|error| error.to_string())
}

#[test]
fn the_command_line_holds_together() {
    Config::command().subcommand(Command::new("after-restore")).debug_assert();
}

#[test]
fn options_stand_before_or_behind_a_subcommand() {
    let command = Config::command().subcommand(Command::new("after-restore"));
    for arguments in [["x", "--ttl-days", "2", "after-restore"], ["x", "after-restore", "--ttl-days", "2"]] {
        let matches = command.clone().try_get_matches_from(arguments).unwrap();
        let matches = matches.subcommand_matches("after-restore").unwrap();
        assert_eq!(Config::read(matches, |_| None).unwrap().config.retention, Duration::from_hours(48));
    }
}

#[test]
fn a_zero_counts_as_one_where_it_would_spin_and_clients_expect_it_to_work() {
    let zero = ["--ws-ping-interval-secs=0", "--rate-limit-burst=0", "--ws-ack-flush-interval-ms=0"];
    let config = read(&zero).unwrap();
    assert_eq!(config.gateway.ping_interval, Duration::from_secs(1));
    assert_eq!(config.rate_limits.burst, 1);
    assert_eq!(config.gateway.ack_flush_interval, Duration::from_millis(1));
}

#[test]
fn a_minimum_that_was_not_given_gives_way_to_its_maximum() {
    let database = read(&["--db-max-connections", "3"]).unwrap().database;
    assert_eq!((database.min_connections, database.max_connections), (3, 3));
}

#[test]
fn a_minimum_above_its_maximum_is_refused() {
    assert_eq!(
        read(&["--db-min-connections", "30"]).unwrap_err(),
        "--db-min-connections: \"30\" is not allowed; it takes at most the 20 of --db-max-connections"
    );
}

#[test]
fn the_two_ports_differ_unless_both_are_free_ones() {
    assert!(read(&["--server-port", "9090"]).unwrap_err().ends_with("another port than --mgmt-port"));
    assert!(read(&["--mgmt-port", "3000"]).unwrap_err().ends_with("another port than --server-port"));
    read(&["--mgmt-port", "0", "--server-port", "0"]).unwrap();
}

#[test]
fn the_storage_keys_come_together_for_a_bucket() {
    assert_eq!(
        read(&["--storage-access-key", "id"]).unwrap_err(),
        "--storage-access-key: \"***\" is not allowed; it takes --storage-secret-key beside it"
    );
    read(&["--storage-access-key", "id", "--data-dir", "data"]).unwrap();
}

#[test]
fn a_flag_that_means_yes_may_stand_alone() {
    assert!(read(&["--storage-force-path-style"]).unwrap().attachments.force_path_style);
    assert!(!read(&["--storage-force-path-style=false"]).unwrap().attachments.force_path_style);
}

#[test]
fn a_folder_url_may_have_slashes_before_an_absolute_path() {
    for url in ["file:/var/data", "file:///var/data"] {
        let attachments = read(&["--storage-endpoint", url]).unwrap().attachments;
        assert_eq!(attachments.folder(), Some(Path::new("/var/data")));
    }
}
