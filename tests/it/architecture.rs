//! Checks the drawing: who may use whom, where SQL and HTTP stop, how long files get, and that every method of the store
//! is tested.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Plain values. They may use each other as far as this says.
const FOUNDATION: &[(&str, &[&str])] = &[
    ("clock", &[]),
    ("model", &["clock"]),
    ("config", &["model", "clock"]),
    ("tasks", &["config", "clock"]),
    ("telemetry", &["config"]),
    ("wire", &["model", "clock"]),
];

/// Rooms that hold something. Each uses the ground; what else it may use is listed.
const SERVICES: &[(&str, &[&str])] = &[
    ("auth", &["limits"]),
    ("blobs", &["limits"]),
    ("limits", &[]),
    ("bus", &[]),
    ("disk", &[]),
    ("files", &[]),
    ("store", &[]),
    ("push", &["store", "bus", "limits"]),
    ("delivery", &["store", "bus", "push"]),
];

/// What starts work. Each uses ground and middle; what else it may use is listed.
const ENTRY_POINTS: &[(&str, &[&str])] = &[
    ("app", &[]),
    ("api", &["app", "gateway"]),
    ("gateway", &["app"]),
    ("sweeps", &["app"]),
    ("listener", &["api", "gateway"]),
    ("server", &["app", "api", "gateway", "sweeps", "listener"]),
    ("commands", &["server"]),
];

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
const LOAD_TOOL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/load");

struct SourceFile {
    path: PathBuf,
    /// The room it belongs to: the first folder or file below `src`.
    module: String,
    text: String,
}

fn sources() -> Vec<SourceFile> {
    let mut files = Vec::new();
    collect(Path::new(SOURCE), &mut files);
    let file = |path: PathBuf| {
        let below = path.strip_prefix(SOURCE).unwrap();
        let module =
            below.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        SourceFile { text: std::fs::read_to_string(&path).unwrap(), module, path }
    };
    files.into_iter().map(file).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

impl SourceFile {
    /// The text without the unit tests at its end and without comments.
    fn code(&self) -> String {
        if self.path.file_name().is_some_and(|name| name == "tests.rs") {
            return String::new();
        }
        let code = self.text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
    }

    /// The rooms that the code mentions as `crate::module`.
    fn uses(&self) -> BTreeSet<String> {
        let code = self.code();
        let mentioned = code.split("crate::").skip(1).flat_map(|rest| match rest.strip_prefix('{') {
            Some(list) => first_segments(list),
            None => vec![segment(rest)],
        });
        mentioned.filter(|module| *module != self.module && !module.is_empty()).collect()
    }
}

/// The names in `{a::b, c::{d, e}}`, without what they are followed by.
fn first_segments(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut name) = (1, Vec::new(), String::new());
    for character in list.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => names.push(std::mem::take(&mut name)),
            other if depth == 1 => name.push(other),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names.push(name);
    names.into_iter().map(|name| segment(name.trim())).collect()
}

fn segment(text: &str) -> String {
    text.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

fn names(modules: &[(&'static str, &[&str])]) -> Vec<&'static str> {
    modules.iter().map(|(module, _)| *module).collect()
}

/// Who may use whom.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let (foundation, services) = (names(FOUNDATION), names(SERVICES));
    let below = |modules: &[(&'static str, &'static [&'static str])], base: Vec<&'static str>| {
        let rule = |(module, more): &(&'static str, &'static [&'static str])| {
            (*module, base.iter().chain(*more).copied().collect::<BTreeSet<_>>())
        };
        modules.iter().map(rule).collect::<Vec<_>>()
    };
    let everything_below = foundation.iter().chain(&services).copied().collect::<Vec<_>>();
    // The protobuf types stop at `wire`, which only the entrances use.
    let without_wire = foundation.iter().filter(|module| **module != "wire").copied().collect();
    let rules = [below(FOUNDATION, Vec::new()), below(SERVICES, without_wire), below(ENTRY_POINTS, everything_below)];
    rules.into_iter().flatten().collect()
}

#[test]
fn modules_use_only_the_modules_below_them() {
    let allowed = allowed();
    let mut broken = Vec::new();
    for file in sources() {
        if ["main", "lib"].contains(&file.module.as_str()) {
            continue;
        }
        let Some(may) = allowed.get(file.module.as_str()) else {
            broken.push(format!("{} is in a room that tests/it/architecture.rs doesn't know", file.path.display()));
            continue;
        };
        for used in file.uses() {
            if !may.contains(used.as_str()) {
                broken.push(format!("{} uses {used}", file.path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Fails when one of these words is in the code of a room that isn't listed.
fn assert_confined(words: &[&str], modules: &[&str]) {
    for file in sources() {
        let code = file.code();
        for word in words {
            let is_allowed = modules.contains(&file.module.as_str());
            assert!(is_allowed || !code.contains(word), "{} mentions {word}", file.path.display());
        }
    }
}

#[test]
fn sql_stops_at_the_store() {
    let statements = ["SELECT ", "INSERT INTO", "DELETE FROM", "UPDATE ", "sqlx::query"];
    assert_confined(&statements, &["store"]);
    // Others may derive how their types are stored, and nothing else.
    assert_confined(&["SqlitePool", "Transaction<", "fetch_all", "fetch_one"], &["store"]);
}

/// Whether a commit outlives a power cut can't be seen by a test, only that it is asked for.
#[test]
fn every_connection_is_told_to_flush_its_commits() {
    let text = |file: &str| std::fs::read_to_string(Path::new(SOURCE).join(file)).unwrap();
    // Which files make options of a connection, each in one place.
    let makers = |ways: &[&str]| {
        let mut makers = Vec::new();
        for file in sources() {
            let code = file.code();
            let times = ways.iter().map(|way| code.matches(way).count()).sum::<usize>();
            makers.extend(vec![file.path.strip_prefix(SOURCE).unwrap().to_string_lossy().into_owned(); times]);
        }
        makers
    };
    // The transfer's source is only read, so there is nothing to flush.
    let sqlite = makers(&["SqliteConnectOptions::", "SqlitePool::connect", "SqliteConnection::connect"]);
    assert_eq!(sqlite, ["store/sqlite.rs", "store/transfer/source.rs"]);
    assert!(text("store/transfer/source.rs").contains("SqliteConnectOptions::new().read_only(true)"));
    let sqlite = text("store/sqlite.rs");
    assert!(sqlite.contains(".synchronous(SqliteSynchronous::Full)") && sqlite.contains("SqliteJournalMode::Wal"));
    let postgres = makers(&["PgConnectOptions::", "PgPool::connect", "PgConnection::connect"]);
    assert_eq!(postgres, ["store/postgres.rs"]);
    // Whatever the server's own setting is. The transfer gives its connection options of its own.
    for file in ["store/postgres.rs", "store/transfer/target.rs"] {
        assert!(text(file).contains(r#"("synchronous_commit", "on".to_owned())"#), "{file}");
    }
}

#[test]
fn http_stops_at_the_entry_points() {
    assert_confined(&["axum"], &["api", "listener", "server"]);
    // Telemetry names it among those whose log lines are not exported.
    assert_confined(&["hyper"], &["api", "listener", "server", "telemetry"]);
    assert_confined(&["prost"], &["wire", "api"]);
}

#[test]
fn the_types_of_telemetry_stop_at_its_module() {
    assert_confined(&["opentelemetry", "prometheus::"], &["telemetry"]);
}

#[test]
fn only_the_clock_reads_the_clock_and_only_the_configuration_the_environment() {
    assert_confined(&["SystemTime::now", "Uuid::now_v7"], &["clock"]);
    assert_confined(&["env::var"], &["config"]);
    // Credentials may come from the surroundings, by the names that the library knows.
    assert_confined(&["from_env()"], &["blobs"]);
    // The level of the log comes from `RUST_LOG`, which is read by the library that everybody knows.
    assert_confined(&["try_from_default_env"], &["telemetry"]);
    assert_confined(&["tokio::spawn", "task::spawn("], &["tasks"]);
}

#[test]
fn no_file_is_longer_than_four_hundred_lines() {
    for file in sources() {
        let lines = file.text.lines().count();
        assert!(lines <= 400, "{} has {lines} lines", file.path.display());
    }
}

/// It measures any relay of the protocol, so it knows none, and the server doesn't know it.
#[test]
fn the_load_tool_is_by_itself() {
    let mut files = Vec::new();
    ["src", "tests"].iter().for_each(|module| collect(&Path::new(LOAD_TOOL).join(module), &mut files));
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(concat!("obscura_", "server::")), "{} uses the server", path.display());
        assert!(text.starts_with("//! "), "{} has no first line that says what it is", path.display());
        let lines = text.lines().count();
        assert!(lines <= 400, "{} has {lines} lines", path.display());
    }
    let manifest = |folder: &str| std::fs::read_to_string(Path::new(folder).join("Cargo.toml")).unwrap();
    assert!(!manifest(LOAD_TOOL).contains("obscura-server") && manifest(LOAD_TOOL).contains("publish = false"));
    assert!(manifest(env!("CARGO_MANIFEST_DIR")).contains("default-members = [\".\"]"));
}

#[test]
fn every_method_of_the_store_is_named_in_a_contract_test() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/store");
    let mut tests = Vec::new();
    collect(Path::new(folder), &mut tests);
    let tests: String = tests.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    for file in sources().iter().filter(|file| file.module == "store") {
        let code = file.code();
        for method in code.split("pub async fn ").skip(1).map(segment) {
            assert!(tests.contains(&format!("{method}(")), "no test calls {method} of {}", file.path.display());
        }
    }
}

#[test]
fn every_file_of_the_source_says_what_it_is() {
    for file in sources().iter().filter(|file| !file.path.ends_with("tests.rs")) {
        assert!(file.text.starts_with("//! "), "{} has no first line that says what it is", file.path.display());
    }
}

/// What can't be tested for want of something fails; it is not left out.
#[test]
fn no_test_is_skipped() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    ["src", "tests/it", "load"].iter().for_each(|module| collect(&folder.join(module), &mut files));
    let scripts = std::fs::read_dir(folder.join("tests/libsignal")).unwrap().map(|entry| entry.unwrap().path());
    files.extend(scripts.filter(|path| path.to_string_lossy().ends_with(".test.mjs")));
    for path in files {
        let ways: &[&str] = match path.extension().is_some_and(|kind| kind == "mjs") {
            true => &["skip(", "skip: ", "todo(", "todo: "],
            // In two parts, because this file is looked at too.
            false => &[concat!("#[", "ignore")],
        };
        let text = std::fs::read_to_string(&path).unwrap();
        for way in ways {
            assert!(!text.contains(way), "{} has {way}", path.display());
        }
    }
}

/// What `store/device_auth_cache.rs` remembers of devices is right only if each change of them is registered.
#[test]
fn every_change_of_device_auth_is_registered() {
    let changing = ["SET tokens_void_to", "DELETE FROM devices ", "SET is_primary", "REPLACE INTO devices"];
    let store = sources().into_iter().filter(|file| file.module == "store");
    let changers: Vec<_> = store.filter(|file| changing.iter().any(|text| file.text.contains(text))).collect();
    assert_eq!(changers.len(), 2, "sessions and devices");
    for file in changers {
        assert!(file.text.contains("tx.register_auth_change("), "{}", file.path.display());
    }
}
