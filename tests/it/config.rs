//! The options: how they are spelled, what holds without them, what they change, what is refused.

mod contract;
mod effects;

use std::{ffi::OsString, fs, path::Path};

use contract::{CONTRACT, FURTHER, OURS};
use obscura_server::config::{Config, GROUPS, Loaded, Opt, Takes, reference_page};

/// The option as a line of the contract.
fn line(option: &Opt) -> String {
    let mut line = format!("--{} {} {}", option.flag, option.variable, option.default.unwrap_or("-"));
    line.extend(option.alias_flag.map(|flag| format!(" --{flag}")));
    line.extend(option.alias_variable.map(|variable| format!(" {variable}")));
    line
}

fn options() -> impl Iterator<Item = &'static Opt> {
    GROUPS.iter().flat_map(|group| group.options)
}

fn load(arguments: &[String], variables: &[(&str, &str)]) -> Result<Loaded, String> {
    let arguments = std::iter::once("obscura-server").chain(arguments.iter().map(String::as_str));
    let variable =
        |name: &str| variables.iter().find(|(variable, _)| *variable == name).map(|(_, text)| OsString::from(text));
    Config::parse_from(arguments, variable).map_err(|error| error.to_string())
}

fn flag(flag: &str, text: &str) -> Vec<String> {
    vec![format!("--{flag}={text}")]
}

/// Everything there is to know about a configuration, the secrets included.
fn all_of(config: &Config) -> String {
    let keys = [&config.attachments.access_key, &config.attachments.secret_key];
    let keys = keys.map(|key| key.as_ref().map(|key| key.expose().to_owned()));
    let secrets = [&config.database.url, &config.auth.jwt_secret, &config.pubsub.url].map(|secret| secret.expose());
    format!("{config:?} {keys:?} {secrets:?}")
}

/// A value that is allowed and is not the default.
fn sample(option: &Opt) -> String {
    match option.takes {
        Takes::Ratio => "0.5".into(),
        Takes::YesNo => "true".into(),
        Takes::Choice(words) => words[1].into(),
        Takes::Words(words) => words.join(","),
        Takes::Address => "127.0.0.7".into(),
        Takes::Networks => "192.0.2.0/24".into(),
        Takes::Url(schemes) => format!("{}sample", schemes[0]),
        Takes::Text | Takes::AnyText | Takes::File | Takes::Folder => "sample".into(),
        _ => {
            let number: u64 = option.default.and_then(|number| number.parse().ok()).expect("numbers have a default");
            (number + 1).to_string()
        }
    }
}

/// The two storage keys are only good together; with a folder nobody asks.
fn beside(option: &Opt) -> Vec<(&'static str, &'static str)> {
    match option.flag {
        "storage-access-key" | "storage-secret-key" => vec![("OBSCURA_STORAGE_ENDPOINT", "file:somewhere")],
        _ => vec![],
    }
}

#[test]
fn the_options_are_those_of_the_contract_and_our_own() {
    let mut expected: Vec<&str> = [CONTRACT, FURTHER, OURS].into_iter().flat_map(str::lines).collect();
    let mut found: Vec<String> = options().map(line).collect();
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);

    let mut own: Vec<String> = options().filter(|option| option.ours).map(line).collect();
    own.sort_unstable();
    let mut expected: Vec<&str> = OURS.lines().collect();
    expected.sort_unstable();
    assert_eq!(own, expected);
}

#[test]
fn no_spelling_means_two_things() {
    let mut spellings: Vec<String> = options()
        .flat_map(|option| {
            let files = option.file_variable();
            let names = [Some(option.flag), Some(option.variable), option.alias_flag, option.alias_variable];
            names.into_iter().flatten().map(str::to_owned).chain(files)
        })
        .collect();
    let count = spellings.len();
    spellings.sort_unstable();
    spellings.dedup();
    assert_eq!(spellings.len(), count);
}

#[test]
fn every_spelling_of_every_option_has_the_same_effect() {
    for option in options() {
        let (sample, beside) = (sample(option), beside(option));
        let before = all_of(&load(&[], &beside).unwrap().config);
        let after = all_of(&load(&flag(option.flag, &sample), &beside).unwrap().config);
        assert_ne!(before, after, "--{} changes nothing", option.flag);

        if let Some(alias) = option.alias_flag {
            let loaded = load(&flag(alias, &sample), &beside).unwrap();
            assert_eq!((all_of(&loaded.config), loaded.warnings), (after.clone(), vec![]), "--{alias}");
        }
        for variable in [Some(option.variable), option.alias_variable].into_iter().flatten() {
            let loaded = load(&[], &[&beside[..], &[(variable, &sample)]].concat()).unwrap();
            assert_eq!((all_of(&loaded.config), loaded.warnings), (after.clone(), vec![]), "{variable}");
        }
        if let Some(variable) = option.file_variable() {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("secret");
            fs::write(&file, format!("{sample}\n")).unwrap();
            let file = file.to_str().unwrap();
            let loaded = load(&[], &[&beside[..], &[(variable.as_str(), file)]].concat()).unwrap();
            assert_eq!(all_of(&loaded.config), after, "{variable}");
        }
    }
}

#[test]
fn a_flag_wins_over_every_variable() {
    for option in options() {
        let (sample, beside) = (sample(option), beside(option));
        let alone = all_of(&load(&flag(option.flag, &sample), &beside).unwrap().config);
        let file_variable = option.file_variable();
        let unread = [Some(option.variable), option.alias_variable, file_variable.as_deref()];
        let unread: Vec<_> = unread.into_iter().flatten().map(|variable| (variable, "/not/even/read")).collect();
        for spelling in [Some(option.flag), option.alias_flag].into_iter().flatten() {
            let loaded = load(&flag(spelling, &sample), &[&beside[..], &unread].concat()).unwrap();
            assert_eq!((all_of(&loaded.config), loaded.warnings), (alone.clone(), vec![]), "--{spelling}");
        }
    }
}

#[test]
fn of_two_flags_for_one_option_the_first_spelling_wins_with_a_warning() {
    for option in options() {
        let Some(alias) = option.alias_flag else { continue };
        let main = flag(option.flag, &sample(option));
        let loaded = load(&[flag(alias, "unread"), main.clone()].concat(), &[]).unwrap();
        assert_eq!(all_of(&loaded.config), all_of(&load(&main, &[]).unwrap().config));
        let (main, alias) = (option.flag, alias);
        let warning =
            format!("--{main} and --{alias} are two names of one option: --{main} is used, --{alias} is ignored");
        assert_eq!(loaded.warnings, [warning]);
    }
}

#[test]
fn of_two_variables_for_one_option_the_first_spelling_wins_with_a_warning() {
    for option in options() {
        let Some(alias) = option.alias_variable else { continue };
        let sample = sample(option);
        let main = (option.variable, sample.as_str());
        let loaded = load(&[], &[(alias, "unread"), main]).unwrap();
        assert_eq!(all_of(&loaded.config), all_of(&load(&[], &[main]).unwrap().config));
        let main = option.variable;
        assert_eq!(
            loaded.warnings,
            [format!("{main} and {alias} are two names of one option: {main} is used, {alias} is ignored")]
        );
    }
}

#[test]
fn an_alias_flag_wins_over_the_main_variable() {
    let loaded = load(&flag("server-mgmt-port", "1"), &[("OBSCURA_SERVER_MGMT_PORT", "2")]).unwrap();
    assert_eq!((loaded.config.server.management_port, loaded.warnings), (1, vec![]));
}

#[test]
fn every_option_refuses_what_it_does_not_take_in_one_sentence() {
    for option in options() {
        let bad = match option.takes {
            Takes::AnyText | Takes::Text | Takes::File | Takes::Folder => continue,
            _ => "no such thing",
        };
        let shown = if option.secret { "***" } else { bad };
        let rest = format!("{shown:?} is not allowed; it takes {}", option.takes.allowed());
        let name = format!("--{}", option.flag);
        assert_eq!(load(&flag(option.flag, bad), &[]).unwrap_err(), format!("{name}: {rest}"));
        for variable in [Some(option.variable), option.alias_variable].into_iter().flatten() {
            assert_eq!(load(&[], &[(variable, bad)]).unwrap_err(), format!("{name} ({variable}): {rest}"));
        }
        if let Some(alias) = option.alias_flag {
            assert_eq!(load(&flag(alias, bad), &[]).unwrap_err(), format!("{name} (--{alias}): {rest}"));
        }
    }
}

#[test]
fn a_wrong_value_is_refused_with_a_sentence_that_says_what_is_allowed() {
    for (name, text, allowed) in [
        ("server-port", "99999", "a whole number from 0 to 65535"),
        ("server-port", "-1", "a whole number from 0 to 65535"),
        ("server-host", "localhost", "an IP address such as 0.0.0.0 or ::"),
        ("ttl-days", "0", "a whole number of days from 1 to 36500"),
        ("db-url", "mysql://somewhere", "a URL that begins with postgres:// or postgresql:// or sqlite:"),
        ("otlp-endpoint", "collector:4317", "a URL that begins with http:// or https://"),
        ("log-format", "JSON", "text or json"),
        ("trace-sampling-ratio", "1.5", "a number from 0 to 1"),
        ("trusted-proxies", "10.0.0.0/33", "networks or addresses separated by commas, such as 10.0.0.0/8,fd00::/8"),
        ("storage-bucket", "", "a text that is not empty"),
        ("data-dir", "a#b", "the path of a folder, without any of the characters ? % #"),
        ("storage-max-size-bytes", "50MB", "a whole number of bytes from 1 to 5368709120"),
        ("attachment-min-size-bytes", "52428801", "at most the 52428800 of --storage-max-size-bytes"),
        ("pubsub-min-backoff-secs", "31", "at most the 30 of --pubsub-max-backoff-secs"),
        ("pre-key-refill-threshold", "101", "at most the 100 of --max-pre-keys"),
    ] {
        let shown = if name == "db-url" { "***" } else { text };
        let sentence = format!("--{name}: {shown:?} is not allowed; it takes {allowed}");
        assert_eq!(load(&flag(name, text), &[]).unwrap_err(), sentence);
    }
}

#[test]
fn zero_is_refused_where_a_loop_would_spin_or_a_queue_hold_nothing() {
    for part in ["-interval-secs", "-concurrency", "-capacity", "-batch-size", "-buffer-size", "-max-connections"] {
        let mut tried = 0;
        for option in options().filter(|option| option.flag.ends_with(part) && option.flag != "ws-ping-interval-secs") {
            tried += 1;
            assert!(load(&flag(option.flag, "0"), &[]).is_err(), "--{} takes 0", option.flag);
        }
        assert!(tried > 0, "no option ends with {part}");
    }
}

#[test]
fn a_folder_alone_gives_every_part_its_embedded_form() {
    let config = Config::embedded(Path::new("/var/lib/obscura")).unwrap();
    assert_eq!(config.data_dir.as_deref(), Some(Path::new("/var/lib/obscura")));
    assert_eq!(config.database.url.expose(), "sqlite:/var/lib/obscura/obscura.db");
    assert_eq!(config.pubsub.url.expose(), "local:");
    assert_eq!(config.attachments.folder(), Some(Path::new("/var/lib/obscura/attachments")));
    assert_eq!(config.auth.jwt_secret.expose(), "", "made or read when the folder is opened");
}

#[test]
fn what_is_given_stays_in_embedded_mode() {
    let arguments = [flag("data-dir", "data"), flag("db-url", "postgres://db/obscura")].concat();
    let variables = [
        ("OBSCURA_PUBSUB_URL", "valkey://bus"),
        ("OBSCURA_STORAGE_ENDPOINT", "https://s3"),
        ("OBSCURA_AUTH_JWT_SECRET", "a secret of sixteen bytes or more"),
    ];
    let config = load(&arguments, &variables).unwrap().config;
    assert_eq!(config.database.url.expose(), "postgres://db/obscura");
    assert_eq!(config.pubsub.url.expose(), "valkey://bus");
    assert_eq!(config.attachments.endpoint.as_deref(), Some("https://s3"));
    assert_eq!(config.auth.jwt_secret.expose(), "a secret of sixteen bytes or more");
}

#[test]
fn parsing_leaves_the_folder_alone() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("data");
    Config::embedded(&folder).unwrap();
    assert!(!folder.exists());
}

#[test]
fn a_secret_file_is_read_without_the_line_break_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    for (content, secret) in [("s e c\n\r\n", "s e c"), (" padded ", " padded ")] {
        fs::write(&file, content).unwrap();
        let loaded = load(&[], &[("OBSCURA_AUTH_JWT_SECRET_FILE", file.to_str().unwrap())]).unwrap();
        assert_eq!(loaded.config.auth.jwt_secret.expose(), secret);
    }
}

#[test]
fn a_secret_file_that_says_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    let variables = [("OBSCURA_DATABASE_URL_FILE", file.to_str().unwrap())];
    let sentence = load(&[], &variables).unwrap_err();
    assert!(sentence.contains("takes a file with the secret in it (No such file"), "{sentence}");
    fs::write(&file, "\n").unwrap();
    let sentence = load(&[], &variables).unwrap_err();
    assert!(sentence.ends_with("takes a file with the secret in it (this one is empty)"), "{sentence}");
    fs::write(&file, "hunter2").unwrap();
    let sentence = load(&[], &variables).unwrap_err();
    assert!(sentence.starts_with("--db-url (OBSCURA_DATABASE_URL_FILE): \"***\" is not allowed"), "{sentence}");
}

#[test]
fn a_secret_is_given_by_its_variable_or_its_file_not_both() {
    for option in options() {
        let Some(file_variable) = option.file_variable() else { continue };
        let sentence = load(&[], &[(option.variable, "x"), (&file_variable, "/x")]).unwrap_err();
        let expected = "it is not allowed beside";
        assert_eq!(
            sentence,
            format!("{file_variable}: {expected} {}; the secret is taken from one of the two", option.variable)
        );
    }
}

#[test]
fn exactly_the_secrets_have_a_file_form() {
    let mut variables: Vec<String> = options().filter_map(Opt::file_variable).collect();
    variables.sort_unstable();
    assert_eq!(
        variables,
        [
            "OBSCURA_AUTH_JWT_SECRET_FILE",
            "OBSCURA_AUTH_JWT_SECRET_PREVIOUS_FILE",
            "OBSCURA_DATABASE_URL_FILE",
            "OBSCURA_PUBSUB_URL_FILE",
            "OBSCURA_STORAGE_ACCESS_KEY_FILE",
            "OBSCURA_STORAGE_SECRET_KEY_FILE",
        ]
    );
}

#[test]
fn help_names_every_option_and_its_variables() {
    let help = Config::command().render_long_help().to_string();
    for option in options() {
        for text in [Some(option.flag), Some(option.variable), option.alias_flag, option.alias_variable, option.default]
        {
            assert!(text.is_none_or(|text| help.contains(text)), "{text:?} is not in the help");
        }
    }
}

/// `OBSCURA_WRITE_REFERENCE=1 cargo test reference_page` writes the page anew.
#[test]
fn the_reference_page_is_what_the_options_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md");
    if std::env::var_os("OBSCURA_WRITE_REFERENCE").is_some() {
        fs::write(&path, reference_page()).unwrap();
    }
    let page = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == reference_page(),
        "docs/CONFIGURATION.md is out of date: run this test with OBSCURA_WRITE_REFERENCE=1"
    );
}
