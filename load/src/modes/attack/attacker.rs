//! The attacker: a thread of its own, so that the honest clients don't wait for it, and one only, so that the server has
//! something left of the machine.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::{Barrier, watch};
use tokio::task::JoinSet;

use super::report;
use super::scene::Scene;
use crate::http::Connection;
use crate::origin::Origin;
use crate::people::{Device, Registrar};

/// Before a connection that was refused or closed is opened again.
const PAUSE: Duration = Duration::from_millis(5);
/// How long the runtime of an attacker may take to end.
const ENDING: Duration = Duration::from_secs(5);
/// Sign-ups of attackers at a time.
const AT_ONCE: usize = 4;

/// What an attack does, until it is dropped.
pub type Strike = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// What the tasks of an attack have in common.
#[derive(Clone)]
pub struct Attacker {
    pub scene: Arc<Scene>,
    counts: Arc<Counts>,
    start: Arc<Barrier>,
}

#[derive(Default)]
struct Counts {
    attempts: AtomicU64,
    answers: Mutex<BTreeMap<&'static str, u64>>,
    /// Number of answers by status, for the statuses that a verdict looks at.
    statuses: Mutex<BTreeMap<u16, u64>>,
}

/// A request that is made again and again.
#[derive(Clone)]
pub struct Request {
    pub method: &'static str,
    pub path: String,
    /// Whole header lines.
    pub fields: String,
    pub body: Arc<[u8]>,
}

impl Request {
    pub fn get(path: impl Into<String>, fields: impl Into<String>) -> Self {
        Self { method: "GET", path: path.into(), fields: fields.into(), body: Arc::default() }
    }

    pub fn post(path: impl Into<String>, fields: impl Into<String>, body: impl Into<Arc<[u8]>>) -> Self {
        Self { method: "POST", path: path.into(), fields: fields.into(), body: body.into() }
    }

    pub fn post_json(path: impl Into<String>, body: &serde_json::Value) -> Self {
        Self::post(path, "content-type: application/json\r\n", body.to_string().into_bytes())
    }
}

impl Attacker {
    pub fn new(scene: Arc<Scene>, start: Arc<Barrier>) -> Self {
        Self { scene, counts: Arc::default(), start }
    }

    /// Where the API is.
    pub fn api(&self) -> SocketAddr {
        self.scene.api
    }

    /// Everything is prepared: waits until the measurement begins.
    pub async fn begin(&self) {
        self.start.wait().await;
    }

    /// Counts something that was tried and has no answer of its own.
    pub fn attempts(&self, count: u64) {
        self.counts.attempts.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts the answer to an attempt; `None` if there was none.
    pub fn answer(&self, status: Option<u16>) {
        let mut answers = self.counts.answers.lock().unwrap_or_else(PoisonError::into_inner);
        *answers.entry(class(status)).or_default() += 1;
        drop(answers);
        if let Some(status) = status {
            *self.counts.statuses.lock().unwrap_or_else(PoisonError::into_inner).entry(status).or_default() += 1;
        }
    }

    /// How many answers had this status.
    pub fn answered_with(&self, status: u16) -> u64 {
        let statuses = self.counts.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        statuses.get(&status).copied().unwrap_or_default()
    }

    /// What was done in this many seconds.
    pub fn report(&self, seconds: f64) -> report::Attacker {
        let answers = self.counts.answers.lock().unwrap_or_else(PoisonError::into_inner);
        report::Attacker {
            attempts: self.counts.attempts.load(Ordering::Relaxed),
            seconds,
            answers: answers.iter().map(|(class, count)| ((*class).to_owned(), *count)).collect(),
        }
    }

    /// Makes requests for ever, each worker over a connection of its own with a pause after each answer.
    pub async fn hammer<F>(&self, origins: Vec<Origin>, pause: Duration, request: F) -> Result<()>
    where
        F: Fn(usize) -> Request + Clone + Send + 'static,
    {
        let mut work = JoinSet::new();
        for (worker, origin) in origins.into_iter().enumerate() {
            let (attacker, request) = (self.clone(), request.clone());
            work.spawn(async move {
                // Spread, so that many workers with a pause don't all come in the same moment.
                tokio::time::sleep(pause.mul_f64(rand::random::<f64>())).await;
                loop {
                    if let Ok(mut connection) = Connection::open_from(attacker.api(), &origin).await {
                        while attacker.ask(&mut connection, &request(worker)).await {
                            tokio::time::sleep(pause).await;
                        }
                    } else {
                        attacker.attempts(1);
                        attacker.answer(None);
                    }
                    tokio::time::sleep(PAUSE.max(pause)).await;
                }
            });
        }
        while work.join_next().await.is_some() {}
        Ok(())
    }

    /// One request. False if the connection can't be used any more.
    async fn ask(&self, connection: &mut Connection, request: &Request) -> bool {
        self.attempts(1);
        let answer = connection.request(request.method, &request.path, &request.fields, &request.body).await;
        let status = answer.ok().map(|answer| answer.status);
        self.answer(status);
        status.is_some()
    }

    /// Many workers at the same time, each of which gets its number and begins again whenever it is done or has failed.
    pub async fn many<F, Doing>(&self, workers: usize, doing: F) -> Result<()>
    where
        F: Fn(Self, usize) -> Doing + Clone + Send + 'static,
        Doing: Future<Output = Result<()>> + Send + 'static,
    {
        let mut work = JoinSet::new();
        for worker in 0..workers {
            let (attacker, doing) = (self.clone(), doing.clone());
            work.spawn(async move {
                loop {
                    if doing(attacker.clone(), worker).await.is_err() {
                        attacker.answer(None);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        while work.join_next().await.is_some() {}
        Ok(())
    }

    /// Signs up accounts, each from a network of its own, so that limits for addresses don't matter.
    pub async fn sign_up(&self, count: usize) -> Result<Vec<Device>> {
        let registrar = Registrar::new();
        let mut work = JoinSet::new();
        for first in 0..AT_ONCE.min(count) {
            let (registrar, api) = (registrar.clone(), self.api());
            work.spawn(async move {
                let mut devices = Vec::new();
                for n in (first..count).step_by(AT_ONCE) {
                    let mut connection = Connection::open_from(api, &elsewhere(n)).await?;
                    devices.push(registrar.sign_up(&mut connection, n).await.context("an attacker's sign-up")?);
                }
                anyhow::Ok(devices)
            });
        }
        Ok(work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat())
    }
}

/// A client in a network of its own, of which there are many.
pub fn elsewhere(n: usize) -> Origin {
    Origin::behind_proxy(format!("{}.{}.{}.9", 101 + n / 65_536 % 20, n / 256 % 256, n % 256))
}

fn class(status: Option<u16>) -> &'static str {
    match status {
        None => "none",
        Some(429) => "429",
        Some(200..=299) => "2xx",
        Some(400..=499) => "4xx",
        Some(500..=599) => "5xx",
        Some(_) => "other",
    }
}

/// A running attack.
pub struct Thread {
    stop: watch::Sender<bool>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Thread {
    /// Starts it; it prepares itself and then waits in [`Attacker::begin`].
    pub fn start(strike: Strike) -> Result<Self> {
        let (stop, mut stopped) = watch::channel(false);
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let ended = runtime.block_on(async {
                // An attack that has nothing left to do is over when the measurement is.
                let mut striking = Box::pin(async {
                    strike.await?;
                    std::future::pending::<Result<()>>().await
                });
                tokio::select! {
                    failed = &mut striking => failed,
                    _ = stopped.wait_for(|stop| *stop) => Ok(()),
                }
            });
            runtime.shutdown_timeout(ENDING);
            ended
        };
        let thread = std::thread::Builder::new().name("attacker".to_owned()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    /// True if it ended by itself, which it only does when it fails.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Stops it and waits for its end.
    pub async fn stop(self) -> Result<()> {
        let _ = self.stop.send(true);
        let thread = self.thread;
        let joined = tokio::task::spawn_blocking(move || thread.join()).await?;
        joined.map_err(|_| anyhow!("the attacker's thread panicked"))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart_by_class() {
        let classes = [None, Some(204), Some(401), Some(429), Some(507), Some(101)].map(class);
        assert_eq!(classes, ["none", "2xx", "4xx", "429", "5xx", "other"]);
    }

    #[test]
    fn each_of_many_clients_is_in_a_network_of_its_own() {
        let networks: std::collections::BTreeSet<String> =
            (0..1000).map(|n| elsewhere(n).forwarded().unwrap().rsplit_once('.').unwrap().0.to_owned()).collect();
        assert_eq!(networks.len(), 1000);
    }
}
