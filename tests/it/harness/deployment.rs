//! Which parts the servers of this run are made of. The same tests run on both: `OBSCURA_TEST_DEPLOYMENT=distributed`
//! puts every server on PostgreSQL, Valkey and S3, each with a database, a channel prefix and a bucket of its own; without
//! it, everything is in the server's folder.
//!
//! The folder stands for the server's state in both: whoever starts again on the same folder finds what was there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use obscura_server::config::{Config, Database as DatabaseConfig, Grouping, Secret};
use obscura_server::store::{Limits, Store};
use obscura_server::telemetry::metrics::Metrics;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions};
use tokio::sync::OnceCell;

/// What servers sign access tokens with that keep nothing in a folder.
pub const SECRET: &str = "the secret of a server under test";

/// What the server on this folder signs access tokens with.
pub fn signing_secret(folder: &Path) -> String {
    if is_distributed() {
        return SECRET.to_owned();
    }
    kept_secret(folder)
}

/// What the embedded server on this folder signs access tokens with.
pub fn kept_secret(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("jwt-secret")).expect("a kept secret").trim().to_owned()
}

/// Whether this run is about the distributed deployment.
pub fn is_distributed() -> bool {
    match std::env::var("OBSCURA_TEST_DEPLOYMENT").as_deref() {
        Ok("distributed") => true,
        Ok("embedded") | Err(_) => false,
        Ok(other) => panic!("OBSCURA_TEST_DEPLOYMENT is {other:?}; it takes embedded or distributed"),
    }
}

/// A setting of the services that `scripts/services` starts.
pub fn service(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set; run the tests under scripts/services"))
}

/// The options that put a server on this folder, or on what belongs to it.
pub async fn options(folder: &Path) -> Vec<String> {
    if is_distributed() { distributed_options(folder).await } else { embedded_options(folder) }
}

/// The options that put a server on the services, whatever this run is about.
pub async fn distributed_options(folder: &Path) -> Vec<String> {
    let name = name_of(folder).await;
    vec![
        format!("--db-url={}", database_url(&name)),
        format!("--pubsub-url={}", service("OBSCURA_TEST_VALKEY_URL")),
        format!("--channel-prefix={name}:"),
        format!("--push-queue-key={name}:jobs"),
        format!("--storage-endpoint={}", service("OBSCURA_TEST_S3_ENDPOINT")),
        format!("--storage-access-key={}", service("OBSCURA_TEST_S3_ACCESS_KEY")),
        format!("--storage-secret-key={}", service("OBSCURA_TEST_S3_SECRET_KEY")),
        format!("--storage-bucket=tests-{}", std::process::id()),
        format!("--attachment-prefix={name}/"),
        "--storage-create-bucket".to_owned(),
        "--storage-force-path-style".to_owned(),
        format!("--jwt-secret={SECRET}"),
    ]
}

/// The options that put a server on this folder alone.
pub fn embedded_options(folder: &Path) -> Vec<String> {
    vec![format!("--data-dir={}", folder.to_str().expect("a path of text"))]
}

/// The settings of a server on this folder, or on what belongs to it.
pub async fn config(folder: &Path) -> Config {
    config_of(&options(folder).await)
}

/// The settings that these options make.
pub fn config_of(options: &[String]) -> Config {
    let arguments = std::iter::once("obscura-server").chain(options.iter().map(String::as_str));
    Config::parse_from(arguments, |_| None).expect("the options are allowed").config
}

/// The settings of the database alone.
pub async fn database_config(folder: &Path) -> DatabaseConfig {
    config(folder).await.database
}

/// Drops the database that belongs to this folder. What is in the bucket stays; the service that has it ends with the run.
pub fn drop_state(folder: &Path) {
    if let Ok(name) = std::fs::read_to_string(name_file(folder)) {
        drop_database(&name);
    }
}

/// Drops a database, whoever uses it.
fn drop_database(name: &str) {
    let statement = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    // Dropping can't await, and may happen on a runtime's thread.
    let dropping = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut admin = admin().await;
            sqlx::query(AssertSqlSafe(statement)).execute(&mut admin).await.expect("the database goes");
        });
    });
    let _ = dropping.join();
}

fn name_file(folder: &Path) -> PathBuf {
    folder.join("name-of-the-database")
}

/// The name of the database that belongs to this folder, made if it is new.
async fn name_of(folder: &Path) -> String {
    match std::fs::read_to_string(name_file(folder)) {
        Ok(name) => name,
        Err(_) => make_database(folder, &format!("TEMPLATE {}", template().await)).await,
    }
}

/// Gives this folder a database in which there is no table yet, and answers its name.
pub async fn make_empty_database(folder: &Path) -> String {
    make_database(folder, "").await
}

async fn make_database(folder: &Path, how: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let name = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    create(&name, how).await;
    std::fs::create_dir_all(folder).expect("the folder");
    std::fs::write(name_file(folder), &name).expect("the name is kept");
    name
}

/// A database with our tables in it, which others are copied from.
async fn template() -> &'static str {
    static TEMPLATE: OnceCell<String> = OnceCell::const_new();
    let make = async || {
        let name = format!("t{}_template", std::process::id());
        create(&name, "").await;
        let mut config = Config::parse_from(["obscura-server"], |_| None).expect("the defaults are allowed").config;
        config.database.url = Secret::new(database_url(&name));
        let store = Store::open(&config.database, Limits::of(&config), &Metrics::unexported())
            .await
            .expect("the tables are made");
        store.close().await;
        name
    };
    TEMPLATE.get_or_init(make).await
}

async fn create(name: &str, how: &str) {
    let statement = format!("CREATE DATABASE {name} {how}");
    sqlx::query(AssertSqlSafe(statement)).execute(&mut admin().await).await.expect("a new database");
}

async fn admin() -> PgConnection {
    let options: PgConnectOptions = service("OBSCURA_TEST_POSTGRES_URL").parse().expect("the URL of PostgreSQL");
    options.connect().await.expect("PostgreSQL answers")
}

/// The URL of a database of the shared PostgreSQL.
pub fn database_url(name: &str) -> String {
    let url = service("OBSCURA_TEST_POSTGRES_URL");
    let (server, _) = url.rsplit_once('/').expect("a URL with the name of a database");
    format!("{server}/{name}")
}

/// How this run has sends stored together: as always; each by itself; or, whenever there is company within a moment,
/// with all the others.
pub fn grouping(usual: Grouping) -> Grouping {
    match std::env::var("OBSCURA_TEST_GROUPS").as_deref() {
        Err(_) => usual,
        Ok("single") => Grouping { max_requests: 1, linger: None },
        Ok("large") => Grouping { linger: Some(Duration::from_millis(20)), ..usual },
        Ok(other) => panic!("OBSCURA_TEST_GROUPS is single or large, not {other}"),
    }
}
