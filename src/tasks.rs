//! Background work that has an owner: it is stopped and awaited at shutdown, and it never dies unnoticed.

use std::future::Future;
use std::time::Duration;

use rand::Rng;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::error;

/// What one round of a repeated job answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// All done; come again after the period.
    Done,
    /// The batch came back full; come again at once.
    More,
}

/// The tasks of the server. Cloning gives the same set.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stopping: CancellationToken,
    failed: CancellationToken,
}

impl Tasks {
    /// No tasks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` until shutdown, for which it has to watch [`Tasks::stopping`] itself. If it ends or panics before,
    /// the server stops.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let guard = EndGuard { name, stopping: self.stopping.clone(), failed: self.failed.clone() };
        self.tracker.spawn(async move {
            let _guard = guard;
            future.await;
        });
    }

    /// Runs what one client asked for, such as a connection, until it ends. A panic ends only that.
    pub fn spawn_tracked(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(future);
    }

    /// Runs `future` to its end even if the caller is dropped meanwhile, as happens when a client hangs up.
    pub async fn run_to_end<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        match self.tracker.spawn(future).await {
            Ok(value) => value,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Runs `job` every `period` (give or take a tenth), until shutdown. A job that failed waits for its next turn,
    /// and one that has [`Round::More`] to do goes on at once, with a pause in which others get theirs.
    pub fn every<J, F, E>(&self, name: &'static str, period: Duration, job: J)
    where
        J: Fn() -> F + Send + 'static,
        F: Future<Output = Result<Round, E>> + Send,
        E: std::fmt::Display,
    {
        let tasks = self.clone();
        self.spawn(name, async move {
            let mut pause = jittered(period.min(FIRST_PAUSE));
            loop {
                tokio::select! {
                    () = tasks.stopping() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = match job().await {
                    Ok(Round::More) => BETWEEN_BATCHES,
                    Ok(Round::Done) => jittered(period),
                    Err(error) => {
                        error!(job = name, %error, "a repeated job failed; it will be tried again");
                        jittered(period.clamp(AFTER_FAILURE, LONGEST_AFTER_FAILURE))
                    }
                };
            }
        });
    }

    /// Ends when shutdown begins.
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// True once shutdown has begun.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Ends when a task has died; the server then has to stop.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Asks all tasks to end. Await them with [`Tasks::ended`].
    pub fn stop(&self) {
        self.stopping.cancel();
        self.tracker.close();
    }

    /// Ends when all tasks have ended.
    pub async fn ended(&self) {
        self.tracker.wait().await;
    }
}

/// Jobs first run soon after the start, not a whole period later.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// So that a long clean-up leaves the writer to others in between.
const BETWEEN_BATCHES: Duration = Duration::from_millis(10);
/// A job whose period is shorter still waits this long after a failure, so that it never spins.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// A job whose period is longer waits only this long after a failure.
const LONGEST_AFTER_FAILURE: Duration = Duration::from_mins(5);

/// `period`, give or take a tenth, so that the nodes of a deployment drift apart.
pub fn jittered(period: Duration) -> Duration {
    period.mul_f64(rand::rng().random_range(0.9..1.1))
}

struct EndGuard {
    name: &'static str,
    stopping: CancellationToken,
    failed: CancellationToken,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() || !self.stopping.is_cancelled() {
            error!(task = self.name, "a background task died");
            self.failed.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn work_handed_over_finishes_though_its_caller_is_gone() {
        let tasks = Tasks::new();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, finished) = tokio::sync::oneshot::channel();
        let mut call = Box::pin(tasks.run_to_end(async move {
            wait.await.unwrap();
            done.send(()).unwrap();
        }));
        assert!(futures_util::poll!(&mut call).is_pending());
        drop(call);
        go.send(()).unwrap();
        finished.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_with_more_to_do_runs_again_at_once_and_a_failing_one_waits() {
        let tasks = Tasks::new();
        let rounds = Arc::new(AtomicU32::new(0));
        let seen = rounds.clone();
        tasks.every("test", Duration::from_secs(600), move || {
            let round = seen.fetch_add(1, Ordering::Relaxed);
            async move {
                match round {
                    0..=3 => Ok(Round::More),
                    4 => Err("away"),
                    _ => Ok(Round::Done),
                }
            }
        });
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(rounds.load(Ordering::Relaxed), 5);
        tokio::time::sleep(Duration::from_secs(340)).await;
        assert_eq!(rounds.load(Ordering::Relaxed), 6, "sooner than after its long period");
        tasks.stop();
        tasks.ended().await;
    }

    #[tokio::test]
    async fn a_task_that_panics_or_ends_too_early_is_noticed() {
        for early_end in [true, false] {
            let tasks = Tasks::new();
            tasks.spawn("test", async move { assert!(early_end, "on purpose") });
            tokio::time::timeout(Duration::from_secs(5), tasks.failed()).await.unwrap();
        }
    }
}
