//! The push queue of several nodes: a sorted set in Valkey, whose members are jobs and whose scores are the moments at
//! which they are due, on Valkey's own clock. Each step is one script, so two nodes never get the same job.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, FromRedisValue, RedisError};
use tokio::time::{Instant, timeout};

use crate::bus::{Backoff, BusError, parse_servers};
use crate::config;
use crate::push::queue::{Job, JobOutcome, Leased, QueueError};

/// Valkey is taken for gone when it doesn't answer for so long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Jobs that travel in one request.
const BATCH: usize = 512;

/// `ARGV`: pairs of a job and the milliseconds until it is due.
const SCHEDULE: &str = "\
    local t = redis.call('TIME') \
    local now = t[1] * 1000 + math.floor(t[2] / 1000) \
    for i = 1, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'NX', now + ARGV[i + 1], ARGV[i]) end";

/// `ARGV`: how many, and for how long. Answers when the lease ends, and the jobs.
const LEASE: &str = "\
    local t = redis.call('TIME') \
    local now = t[1] * 1000 + math.floor(t[2] / 1000) \
    local till = now + ARGV[2] \
    local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1]) \
    for _, job in ipairs(due) do redis.call('ZADD', KEYS[1], 'XX', till, job) end \
    return {string.format('%.0f', till), due}";

/// `ARGV`: triples of a job, the end of its lease, and the milliseconds until it is looked at again, or -1.
const FINISH: &str = "\
    local t = redis.call('TIME') \
    local now = t[1] * 1000 + math.floor(t[2] / 1000) \
    for i = 1, #ARGV, 3 do \
        local score = redis.call('ZSCORE', KEYS[1], ARGV[i]) \
        if score and tonumber(score) == tonumber(ARGV[i + 1]) then \
            if ARGV[i + 2] == '-1' then redis.call('ZREM', KEYS[1], ARGV[i]) \
            else redis.call('ZADD', KEYS[1], 'XX', now + ARGV[i + 2], ARGV[i]) end \
        end \
    end";

const LENGTH: &str = "return redis.call('ZCARD', KEYS[1])";

/// A sorted set in Valkey. Its connection is made when it is needed, and again whenever it is lost.
pub struct ValkeyQueue {
    servers: Vec<ConnectionInfo>,
    /// The URL that is tried next.
    server_index: usize,
    key: String,
    connection: Option<MultiplexedConnection>,
    backoff: Backoff,
    /// Not before this moment.
    next_attempt: Instant,
    connected_at: Instant,
}

impl ValkeyQueue {
    pub(super) fn open(pubsub: &config::Pubsub, notifications: &config::Notifications) -> Result<Self, BusError> {
        let servers = parse_servers(pubsub.url.expose())?;
        let now = Instant::now();
        Ok(Self {
            server_index: rand::random_range(0..servers.len()),
            servers,
            key: notifications.push_queue_key.clone(),
            connection: None,
            backoff: Backoff::new(pubsub),
            next_attempt: now,
            connected_at: now,
        })
    }

    pub(super) async fn schedule(&mut self, jobs: &[(Job, Duration)]) -> Result<(), QueueError> {
        for jobs in jobs.chunks(BATCH) {
            let arguments = jobs.iter().flat_map(|(job, after)| [job.name(), after.as_millis().to_string()]);
            self.run::<()>(SCHEDULE, arguments.collect()).await?;
        }
        Ok(())
    }

    pub(super) async fn lease(&mut self, limit: usize, visibility: Duration) -> Result<Vec<Leased>, QueueError> {
        let arguments = vec![limit.to_string(), visibility.as_millis().max(1).to_string()];
        let (until, names): (i64, Vec<Vec<u8>>) = self.run(LEASE, arguments).await?;
        let (mut leased, mut foreign) = (Vec::with_capacity(names.len()), Vec::new());
        for name in names {
            match std::str::from_utf8(&name).ok().and_then(Job::named) {
                Some(job) => leased.push(Leased { job, until }),
                None => foreign.push(name),
            }
        }
        if !foreign.is_empty() {
            self.remove(foreign).await?;
        }
        Ok(leased)
    }

    pub(super) async fn length(&mut self) -> Result<u64, QueueError> {
        self.run(LENGTH, Vec::new()).await
    }

    pub(super) async fn finish(&mut self, finished: &[(Leased, JobOutcome)]) -> Result<(), QueueError> {
        for finished in finished.chunks(BATCH) {
            let mut arguments = Vec::with_capacity(finished.len() * 3);
            for (leased, outcome) in finished {
                let again = match outcome {
                    JobOutcome::Done => "-1".to_owned(),
                    JobOutcome::RetryAfter(after) => after.as_millis().to_string(),
                };
                arguments.extend([leased.job.name(), leased.until.to_string(), again]);
            }
            self.run::<()>(FINISH, arguments).await?;
        }
        Ok(())
    }

    /// What another server has left under this key would be in the way for ever.
    async fn remove(&mut self, foreign: Vec<Vec<u8>>) -> Result<(), QueueError> {
        let Some(mut connection) = self.connection.clone() else { return Err(QueueError::Disconnected) };
        let mut remove = redis::cmd("ZREM");
        remove.arg(&self.key).arg(foreign);
        Ok(remove.query_async(&mut connection).await?)
    }

    async fn run<T: FromRedisValue>(&mut self, script: &'static str, arguments: Vec<String>) -> Result<T, QueueError> {
        let mut connection = self.connected().await?;
        match self.invoke(script, &arguments, &mut connection).await {
            Err(QueueError::Valkey(error)) if moved_to(&error).is_some() => {
                // The node of a cluster that has the key: it is asked from now on.
                let Some((host, port)) = moved_to(&error) else { return Err(error.into()) };
                let server = self.servers[self.server_index].clone();
                let connected = connect(elsewhere(&server, host, port)).await;
                let answer = match connected {
                    Ok(mut connection) => {
                        self.connection = Some(connection.clone());
                        self.invoke(script, &arguments, &mut connection).await
                    }
                    Err(error) => Err(error),
                };
                answer.inspect_err(|_| self.lost())
            }
            answer => answer.inspect_err(|_| self.lost()),
        }
    }

    async fn invoke<T: FromRedisValue>(
        &self,
        script: &'static str,
        arguments: &[String],
        connection: &mut MultiplexedConnection,
    ) -> Result<T, QueueError> {
        let mut evaluate = redis::cmd("EVAL");
        evaluate.arg(script).arg(1).arg(&self.key).arg(arguments);
        let answer = timeout(ANSWER_TIMEOUT, evaluate.query_async(connection)).await;
        Ok(answer.map_err(|_| QueueError::Silent)??)
    }

    async fn connected(&mut self) -> Result<MultiplexedConnection, QueueError> {
        if let Some(connection) = &self.connection {
            return Ok(connection.clone());
        }
        if Instant::now() < self.next_attempt {
            return Err(QueueError::Disconnected);
        }
        match connect(self.servers[self.server_index].clone()).await {
            Ok(connection) => {
                self.connected_at = Instant::now();
                self.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                self.try_next_server();
                self.next_attempt = Instant::now() + self.backoff.pause(None);
                Err(error)
            }
        }
    }

    fn try_next_server(&mut self) {
        self.server_index = (self.server_index + 1) % self.servers.len();
    }

    /// Another host is tried next: this one may answer and refuse every write, as a replica does.
    fn lost(&mut self) {
        if self.connection.take().is_some() {
            self.try_next_server();
            self.next_attempt = Instant::now() + self.backoff.pause(Some(self.connected_at.elapsed()));
        }
    }
}

async fn connect(server: ConnectionInfo) -> Result<MultiplexedConnection, QueueError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER_TIMEOUT))
        .set_response_timeout(Some(ANSWER_TIMEOUT));
    let client = Client::open(server)?;
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    Ok(timeout(ANSWER_TIMEOUT, connecting).await.map_err(|_| QueueError::Silent)??)
}

fn moved_to(error: &RedisError) -> Option<(String, u16)> {
    let (address, _slot) = error.redirect_node()?;
    let (host, port) = address.rsplit_once(':')?;
    Some((host.trim_matches(['[', ']']).to_owned(), port.parse().ok()?))
}

/// Another node of the cluster that `server` is of, with the same user, password and encryption.
fn elsewhere(server: &ConnectionInfo, host: String, port: u16) -> ConnectionInfo {
    let address = match server.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => ConnectionAddr::Tcp(host, port),
    };
    server.clone().set_addr(address)
}
