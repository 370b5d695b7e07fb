//! PostgreSQL: a pool of connections to a server that several nodes share.

mod session;

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgArguments, PgConnectOptions, PgRow};
use sqlx::query::QueryAs;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, FromRow, PgConnection, Postgres, Row};
use tracing::debug;

use crate::config;
use crate::store::database::{PostgresTx, timely};
use crate::store::error::migration_error;
use crate::store::pool::{Pool, PoolLimits, PooledConnection};
use crate::store::shares::{Rows, Shares};
use crate::store::{OpenError, Result, StoreError};
use crate::telemetry::metrics::{Metrics, PoolName};

pub(super) use session::Settings;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// PostgreSQL 15. Older ones lack what the statements use, and will soon no longer be maintained.
const OLDEST_VERSION: i32 = 150_000;
/// The encoding that holds every text a client may send.
const ENCODING: &str = "UTF8";
/// No statement reads a whole table where an index will do, or collects all that an index has before it sorts it. None is
/// worth compiling. Statistics are of the past: an empty queue that was analyzed would be read as a whole, and go on to be
/// when a million messages are in it.
const BY_INDEX: [(&str, &str); 3] = [("enable_seqscan", "off"), ("enable_bitmapscan", "off"), ("jit", "off")];
/// A group, for which many requests wait, waits only a moment for others. Its statements find each row by a key; they are
/// planned once for a connection, and nothing is hashed or merged, so that the plan is the same for any statistics.
const BEGIN_GROUP: &str = "
    BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '300ms'; SET LOCAL plan_cache_mode = force_generic_plan;
    SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off";
/// What counts whole tables may read them as is best.
const BEGIN_COUNT: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL enable_seqscan = on";
/// How much longer than the server itself we wait for a statement, before we take the server for frozen.
const MARGIN: Duration = Duration::from_secs(1);

/// The server. Cloning gives the same connections.
#[derive(Clone)]
pub(super) struct PostgresStore {
    pub(super) pool: Pool<Postgres>,
    /// The longest time that one statement may take.
    pub(super) limit: Duration,
    shares: Shares,
    /// Set once another database answers.
    is_lost: Arc<AtomicBool>,
}

impl PostgresStore {
    /// Connects and brings the tables up to date. Several nodes may do so at the same time.
    pub(super) async fn open(config: &config::Database, metrics: &Metrics) -> std::result::Result<Self, OpenError> {
        let options = connect_options(config)?.application_name("obscura-server");
        let (mut connection, address) = connect(&options, &Settings::new([]), config.acquire_timeout).await?;
        refuse_pooled_transactions(&mut connection, &options, &address, config.acquire_timeout).await?;
        migrate(&mut connection, &address).await?;
        refuse_unfinished(&mut connection, &address).await?;
        let _ = connection.close().await;

        let millis = |duration: Duration| duration.as_millis().to_string();
        let settings = [
            ("statement_timeout", millis(config.statement_timeout)),
            ("lock_timeout", millis(config.lock_timeout)),
            // Whatever the server's own setting is: a commit that returns is on disk.
            ("synchronous_commit", "on".to_owned()),
            // A node that has stopped in the middle of a transaction must not hold its locks for longer than others wait.
            ("idle_in_transaction_session_timeout", millis(config.lock_timeout)),
        ];
        let by_index = BY_INDEX.map(|(name, value)| (name, value.to_owned()));
        let settings = Settings::new(settings.into_iter().chain(by_index));
        let limits = PoolLimits {
            max: config.max_connections,
            min: config.min_connections,
            acquire_timeout: config.acquire_timeout,
            idle_timeout: Some(config.idle_timeout),
            max_lifetime: Some(config.max_lifetime),
            reusable_after_cancel: false,
        };
        let pool = Pool::new(options, settings, limits, PoolName::Shared, metrics);
        let store = Self {
            pool,
            limit: config.statement_timeout + MARGIN,
            shares: Shares::new(config.acquire_timeout),
            is_lost: Arc::default(),
        };
        store.check().await.map_err(|StoreError(cause)| OpenError::connecting(address, cause))?;
        Ok(store)
    }

    /// Starts a transaction. Whatever the database's own default is: what is read after a lock was waited for has to be
    /// what holds then.
    pub(super) async fn begin(&self) -> Result<PostgresTx> {
        self.begin_with("BEGIN ISOLATION LEVEL READ COMMITTED").await
    }

    /// Starts a transaction that locks these rows, once it has a share of the pool.
    pub(super) async fn begin_on(&self, rows: Rows) -> Result<PostgresTx> {
        let share = self.shares.take(rows).await?;
        Ok(PostgresTx { _share: Some(share), ..self.begin().await? })
    }

    /// Starts the transaction of a group. See `BEGIN_GROUP`.
    pub(super) async fn begin_group(&self) -> Result<PostgresTx> {
        self.begin_with(BEGIN_GROUP).await
    }

    /// Starts a transaction that counts. See `BEGIN_COUNT`.
    pub(super) async fn begin_count(&self) -> Result<PostgresTx> {
        self.begin_with(BEGIN_COUNT).await
    }

    /// Writes nothing more.
    pub(super) fn stop_writes(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
    }

    fn is_ours(&self) -> Result<()> {
        match self.is_lost.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(sqlx::Error::Io(std::io::Error::other("another database answers than at the start")).into()),
        }
    }

    async fn begin_with(&self, statements: &'static str) -> Result<PostgresTx> {
        self.is_ours()?;
        let mut connection = self.pool.get().await?;
        timely(self.limit, sqlx::raw_sql(statements).execute(&mut *connection)).await?;
        Ok(PostgresTx { connection, limit: self.limit, _share: None })
    }

    /// All rows of a question that PostgreSQL alone understands.
    pub(super) async fn all<T>(&self, question: QueryAs<'_, Postgres, T, PgArguments>) -> Result<Vec<T>>
    where
        T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        let mut connection = self.pool.get().await?;
        let answer = timely(self.limit, question.fetch_all(&mut *connection)).await;
        give_back(connection, &answer);
        answer
    }

    /// Answers when the server can be read and written.
    pub(super) async fn check(&self) -> Result<()> {
        self.is_ours()?;
        let mut connection = self.pool.get().await?;
        let question = sqlx::query_scalar(AssertSqlSafe(format!("SELECT {}", session::TAKES_NO_WRITES)));
        let answer: Result<bool> = timely(self.limit, question.fetch_one(&mut *connection)).await;
        // A server that takes no writes is taken for gone, so this connection is closed, and the idle ones are asked.
        let answer = answer.and_then(|is_read_only| if is_read_only { Err(takes_no_writes().into()) } else { Ok(()) });
        give_back(connection, &answer);
        answer
    }
}

/// How to reach the server, without anything that concerns one use of it.
pub(super) fn connect_options(config: &config::Database) -> std::result::Result<PgConnectOptions, OpenError> {
    // The parser's own words might repeat the password.
    let options = PgConnectOptions::from_str(config.url.expose()).map_err(|_| OpenError::Url)?;
    // Nothing is stored as a floating-point number, and PgBouncer refuses this parameter.
    Ok(options.extra_float_digits(None))
}

/// A connection with these settings to a server that is new enough, and its address for sentences.
pub(super) async fn connect(
    options: &PgConnectOptions,
    settings: &Settings,
    acquire_timeout: Duration,
) -> std::result::Result<(PgConnection, String), OpenError> {
    let address = format!("{}:{}", options.get_host(), options.get_port());
    let away = |cause| OpenError::connecting(address.clone(), cause);
    let connecting = async {
        let mut connection = options.connect().await?;
        settings.make(&mut connection).await?;
        sqlx::Result::Ok(connection)
    };
    let timed_out = |_| away(sqlx::Error::PoolTimedOut);
    let mut connection = tokio::time::timeout(acquire_timeout, connecting).await.map_err(timed_out)?.map_err(away)?;
    let facts = format!(
        "SELECT current_setting('server_version_num'), current_setting('server_encoding'), ({})::text",
        session::TAKES_NO_WRITES
    );
    let facts = sqlx::raw_sql(AssertSqlSafe(facts)).fetch_one(&mut connection).await.map_err(away)?;
    let fact = |column: usize| facts.try_get::<String, _>(column).map_err(away);
    let version: i32 = fact(0)?.parse().unwrap_or_default();
    if version < OLDEST_VERSION {
        return Err(OpenError::TooOld { address, found: version / 10_000 });
    }
    let encoding = fact(1)?;
    if encoding != ENCODING {
        return Err(OpenError::Encoding { address, found: encoding });
    }
    if fact(2)? == "true" {
        return Err(away(takes_no_writes()));
    }
    Ok((connection, address))
}

/// A pooler of transactions or statements would lose settings, prepared statements and locks without a word. One that pools
/// sessions is as good as none.
async fn refuse_pooled_transactions(
    first: &mut PgConnection,
    options: &PgConnectOptions,
    address: &str,
    acquire_timeout: Duration,
) -> std::result::Result<(), OpenError> {
    let refusal = || OpenError::PooledTransactions { address: address.to_owned() };
    if !session::can_begin(first).await {
        return Err(refusal());
    }
    let compared = tokio::time::timeout(acquire_timeout, async {
        let mut second = options.connect().await?;
        let are_sessions = session::are_sessions(first, &mut second).await;
        let _ = second.close().await;
        are_sessions
    });
    match compared.await {
        Ok(Ok(false)) => Err(refusal()),
        Ok(Ok(true)) => Ok(()),
        // The pool will say so if there is no second connection to be had.
        Ok(Err(error)) => {
            debug!(%error, "no second connection to compare with");
            Ok(())
        }
        Err(_) => {
            debug!("no second connection to compare with in time");
            Ok(())
        }
    }
}

/// Brings the tables up to date, without limits of time, because a migration may take long, and other nodes wait for it.
pub(super) async fn migrate(connection: &mut PgConnection, address: &str) -> std::result::Result<(), OpenError> {
    MIGRATIONS.run(connection).await.map_err(|cause| match cause {
        MigrateError::Execute(cause @ sqlx::Error::Io(_)) => OpenError::connecting(address.to_owned(), cause),
        cause => migration_error(format!("database at {address}"), &MIGRATIONS, cause),
    })
}

fn takes_no_writes() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::other("it takes no writes at the moment"))
}

/// A database into which a transfer has not finished is not whole.
async fn refuse_unfinished(connection: &mut PgConnection, address: &str) -> std::result::Result<(), OpenError> {
    let unfinished = sqlx::query_scalar("SELECT to_regclass('transfer_progress') IS NOT NULL");
    match unfinished.fetch_one(connection).await {
        Ok(false) => Ok(()),
        Ok(true) => Err(OpenError::Unfinished { address: address.to_owned() }),
        Err(cause) => Err(OpenError::connecting(address.to_owned(), cause)),
    }
}

/// Gives a connection back that was asked something outside of a transaction. A server that answers, even with an
/// error, keeps it.
pub(super) fn give_back<T>(mut connection: PooledConnection<Postgres>, answer: &Result<T>) {
    connection.set_reusable(!answer.as_ref().is_err_and(StoreError::is_lost_connection));
}
