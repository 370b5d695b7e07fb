//! Durable sends through the mailroom in process, without HTTP, beside a bare loop of gathered inserts into the same
//! tables: what of the database's speed is left for whoever sends?
//!
//! ```text
//! cargo run --release --example mailroom
//! OBSCURA_LOAD_POSTGRES=postgres://… cargo run --release --example mailroom
//! ```
//!
//! Each round has a folder (or database) of its own and does first one, then the others, for equally long. The bare loops
//! insert as many messages in one statement as the mailroom had in a group on average, each group a transaction: one
//! loop nothing but messages, the other one also the rows by which a repeated send is known, as the mailroom has to.
//! Neither looks anything up.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::{Arg, Command, value_parser};
use obscura_server::clock::Clock;
use obscura_server::config::Config;
use obscura_server::delivery::MessageWriter;
use obscura_server::model::ids::{DeviceId, IdempotencyKey, UserId};
use obscura_server::model::keys::{KeyId, PreKeys, PublicKey, RegistrationId, Signature, SignedPreKey};
use obscura_server::model::message::{Outcome, Recipient, Sealed, SendRequest, Sender};
use obscura_server::server::Server;
use obscura_server::store::{NewAccount, NewDevice, Registered, SessionGrant, Store};
use obscura_server::telemetry::Telemetry;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, SqliteConnection};
use tokio::task::JoinSet;

/// Devices written to.
const RECIPIENTS: usize = 200;
/// What is done before the counting starts.
const WARM_UP: Duration = Duration::from_secs(1);

struct Options {
    tasks: usize,
    size: usize,
    duration: Duration,
    rounds: usize,
    postgres: Option<String>,
}

/// What one round found, in messages a second.
struct Round {
    message_writer: f64,
    bare: Bare,
    group: usize,
}

struct Bare {
    messages: f64,
    /// With the outcome of each send.
    sends: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = options();
    let (mut to_messages, mut to_sends) = (Vec::new(), Vec::new());
    println!("messages a second    in a group    mailroom    bare, messages alone    bare, messages and outcomes");
    for n in 1..=options.rounds {
        let Round { message_writer, bare, group } = match &options.postgres {
            None => in_sqlite(&options).await?,
            Some(url) => in_postgres(&options, url).await?,
        };
        println!("round {n:<11}{group:>14}{message_writer:>12.0}{:>24.0}{:>30.0}", bare.messages, bare.sends);
        to_messages.push(message_writer / bare.messages);
        to_sends.push(message_writer / bare.sends);
    }
    let median = |mut ratios: Vec<f64>| {
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    println!("mailroom to bare, medians{:>42.2}{:>30.2}", median(to_messages), median(to_sends));
    Ok(())
}

fn options() -> Options {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("N").default_value(default).help(help).value_parser(value_parser!(usize))
    };
    let given = Command::new("mailroom")
        .about("Compares durable sends in process with a bare loop of inserts")
        .args([
            number("tasks", "64", "Tasks that send, each the next message as soon as the last one is durable"),
            number("size", "1024", "Bytes of a message"),
            number("seconds", "5", "How long each of the three goes on"),
            number("rounds", "5", "How often"),
            Arg::new("postgres")
                .long("postgres")
                .value_name("URL")
                .env("OBSCURA_LOAD_POSTGRES")
                .hide_env_values(true)
                .help("A PostgreSQL, in which each round makes a database [SQLite in a temporary folder]"),
        ])
        .get_matches();
    let number = |name: &str| given.get_one::<usize>(name).copied().unwrap_or(1).max(1);
    Options {
        tasks: number("tasks"),
        size: number("size"),
        duration: Duration::from_secs(number("seconds") as u64),
        rounds: number("rounds"),
        postgres: given.get_one::<String>("postgres").cloned(),
    }
}

async fn in_sqlite(options: &Options) -> Result<Round> {
    let folder = tempfile::tempdir()?;
    let message_writer = through_the_message_writer(options, folder.path(), None).await?;
    let file = folder.path().join("obscura.db");
    let mut database = SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "4000")
        .pragma("cache_size", "-65536")
        .connect()
        .await?;
    // A group commits at one time of receipt, so there are about as many of these.
    let count = "SELECT COUNT(*), COUNT(DISTINCT received_at) FROM messages";
    let (messages, groups): (i64, i64) = sqlx::query_as(count).fetch_one(&mut database).await?;
    let group = group(messages, groups);
    let mut position: i64 =
        sqlx::query_scalar("SELECT COALESCE(MAX(position), 0) FROM messages").fetch_one(&mut database).await?;
    let bytes = vec![0xa5; group * (48 + options.size)];
    let mut rates = [0.0; 2];
    for (rate, with_outcomes) in rates.iter_mut().zip([false, true]) {
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < options.duration {
            insert_into_sqlite(&mut database, &bytes, group, options.size, position + 1, with_outcomes).await?;
            position += group as i64;
            done += group;
        }
        *rate = done as f64 / began.elapsed().as_secs_f64();
    }
    database.close().await?;
    Ok(Round { message_writer, bare: Bare { messages: rates[0], sends: rates[1] }, group })
}

/// The server's own statements: a list of devices and offsets, and one blob of ids and bodies.
async fn insert_into_sqlite(
    database: &mut SqliteConnection,
    bytes: &[u8],
    group: usize,
    size: usize,
    first: i64,
    with_outcomes: bool,
) -> Result<()> {
    let row = |n: usize| format!("[{},{},{size}]", n % RECIPIENTS + 1, n * (48 + size) + 1);
    let list = format!("[{}]", (0..group).map(row).collect::<Vec<_>>().join(","));
    // As the server does: all in one trip to the connection's thread, with arguments that the statements share.
    let messages = "
        BEGIN IMMEDIATE;
        INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
        SELECT $3 + row.key, row.value ->> 0, substr($2, row.value ->> 1, 16), substr($2, (row.value ->> 1) + 16, 16),
               substr($2, (row.value ->> 1) + 32, 16), $3, substr($2, (row.value ->> 1) + 48, row.value ->> 2)
        FROM json_each($1) row;";
    let outcomes = "
        INSERT OR REPLACE INTO sends
            (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
        SELECT row.key % 64 + 1, substr($4, row.key * 16 + 1, 16), zeroblob(16), x'', $3, $3, $3 + row.key, $3 + row.key
        FROM json_each($1) row;";
    let keys: Vec<u8> = (0..group).flat_map(|_| rand::random::<[u8; 16]>()).collect();
    let text = format!("{messages}{} COMMIT", if with_outcomes { outcomes } else { "" });
    sqlx::query(AssertSqlSafe(text)).bind(list).bind(bytes).bind(first).bind(keys).execute(database).await?;
    Ok(())
}

async fn in_postgres(options: &Options, url: &str) -> Result<Round> {
    let name = format!("obscura_mailroom_{:x}", rand::random::<u64>());
    let (server, _) = url.rsplit_once('/').context("the URL of PostgreSQL names no database")?;
    let own = format!("{server}/{name}");
    let mut admin = PgConnection::connect(url).await?;
    sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut admin).await?;
    let round = in_this_postgres(options, &own).await;
    sqlx::query(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).execute(&mut admin).await?;
    round
}

async fn in_this_postgres(options: &Options, url: &str) -> Result<Round> {
    let folder = tempfile::tempdir()?;
    let message_writer = through_the_message_writer(options, folder.path(), Some(url)).await?;
    let mut database = url.parse::<PgConnectOptions>()?.options([("synchronous_commit", "on")]).connect().await?;
    let count = "SELECT COUNT(*), COUNT(DISTINCT received_at) FROM messages";
    let (messages, groups): (i64, i64) = sqlx::query_as(count).fetch_one(&mut database).await?;
    let group = group(messages, groups);
    let bytes = vec![0xa5; options.size];
    let devices: Vec<i64> = (0..group).map(|n| (n % RECIPIENTS) as i64 + 1).collect();
    let bodies = vec![&bytes[..]; group];
    // The server's own statements in one, but for ids that the database makes.
    let messages = "
        INSERT INTO messages (position, device_no, id, sender_user, sender_device, body, received_at)
        SELECT block + n, device, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), body, 1800000000000
        FROM nextval('message_blocks') AS block, unnest($1, $2) WITH ORDINALITY AS row (device, body, n)";
    let sends = format!(
        "WITH inserted AS ({messages} RETURNING position)
         INSERT INTO sends (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
         SELECT position % 64 + 1, gen_random_uuid(), '\\x00000000000000000000000000000000', '', 1800000000000,
                1800086400000, position, position FROM inserted
         ON CONFLICT DO NOTHING"
    );
    let mut rates = [0.0; 2];
    for (rate, statement) in rates.iter_mut().zip([messages, &sends]) {
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < options.duration {
            let statement = sqlx::query(AssertSqlSafe(statement)).bind(&devices).bind(&bodies);
            statement.execute(&mut database).await?;
            done += group;
        }
        *rate = done as f64 / began.elapsed().as_secs_f64();
    }
    database.close().await?;
    Ok(Round { message_writer, bare: Bare { messages: rates[0], sends: rates[1] }, group })
}

fn group(messages: i64, groups: i64) -> usize {
    usize::try_from(messages / groups.max(1)).unwrap_or(1).max(1)
}

/// Messages a second that were durable when the mailroom answered.
async fn through_the_message_writer(options: &Options, folder: &Path, postgres: Option<&str>) -> Result<f64> {
    let folder = folder.to_str().context("a path that is text")?;
    let mut arguments = vec!["obscura-server", "--data-dir", folder, "--server-host=127.0.0.1", "--server-port=0"];
    arguments.extend(["--mgmt-port=0", "--pubsub-url=local:", "--max-inbox-size=1000000"]);
    arguments.extend(["--inbox-max-bytes=0", "--inbox-sender-share-percent=100", "--sender-bytes-per-day=0"]);
    // Given as a variable is, so that the list of processes does not show it.
    let variable = |name: &str| (name == "OBSCURA_DATABASE_URL").then(|| postgres.map(OsString::from)).flatten();
    let config = Config::parse_from(arguments, variable)?.config;
    let telemetry = Telemetry::open(&config.telemetry)?;
    let server = Server::start(config, Clock::system(), telemetry).await?;
    let app = server.app().clone();
    let mut recipients = Vec::new();
    for n in 0..RECIPIENTS {
        recipients.push(register(&app.store, &format!("recipient_{n}")).await?);
    }
    let recipients: Arc<[Sender]> = recipients.into();
    let from = Instant::now() + WARM_UP;
    let until = from + options.duration;
    let mut work = JoinSet::new();
    for n in 0..options.tasks {
        let sender = register(&app.store, &format!("sender_{n}")).await?;
        let (message_writer, recipients, size) = (app.message_writer.clone(), recipients.clone(), options.size);
        work.spawn(async move {
            keep_sending(&message_writer, sender, &recipients[n % RECIPIENTS..], size, from, until).await
        });
    }
    let sent: usize = work.join_all().await.into_iter().sum::<Result<usize>>()?;
    server.stop().await;
    Ok(sent as f64 / options.duration.as_secs_f64())
}

/// Answers how many sends ended between `from` and `until`.
async fn keep_sending(
    message_writer: &MessageWriter,
    sender: Sender,
    recipients: &[Sender],
    size: usize,
    from: Instant,
    until: Instant,
) -> Result<usize> {
    let body = Sealed(Bytes::from(vec![0xa5; size]));
    let mut count = 0;
    for to in recipients.iter().cycle() {
        let mail = SendRequest {
            sender,
            key: IdempotencyKey::random(),
            digest: [0; 16],
            recipients: vec![Recipient {
                user: to.user,
                submissions: vec![(to.device, body.clone())],
                throttled_for: None,
            }],
        };
        let sent = message_writer.send(mail).await?;
        ensure!(sent.outcome == Outcome::default(), "a send was accepted in part only");
        let now = Instant::now();
        if now >= until {
            break;
        }
        count += usize::from(now >= from);
    }
    Ok(count)
}

async fn register(store: &Store, username: &str) -> Result<Sender> {
    let key = PublicKey::from_bytes(&[5; 33]).context("a public key")?;
    let signature = Signature::from_bytes(&[7; 64]).context("a signature")?;
    let now = Clock::system().now();
    let account = NewAccount {
        user: UserId::random(),
        username: username.to_owned(),
        password_hash: "nobody logs in".to_owned(),
        identity: key,
        device: NewDevice {
            id: DeviceId::random(),
            name: None,
            registration_id: RegistrationId(1),
            prekeys: PreKeys {
                signed: SignedPreKey { id: KeyId(1), public_key: key, signature },
                one_time: Vec::new(),
                pq_last_resort: None,
                pq_one_time: Vec::new(),
            },
        },
        session: SessionGrant {
            access_expires_at: now.seconds() + 900,
            family: rand::random(),
            secret_hash: rand::random(),
            expires_at: now + Duration::from_hours(24),
        },
    };
    match store.register(&account).await? {
        Registered::Account(no) => Ok(Sender { user: account.user, device: account.device.id, no }),
        Registered::UsernameTaken => anyhow::bail!("the database is not empty"),
    }
}
