//! Takes dead tokens out of the database, some at a time.

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::config::Notifications;
use crate::model::ids::DeviceNo;
use crate::store::Store;
use crate::tasks::Tasks;
use crate::telemetry::metrics::Metrics;

/// A token that its provider has called dead, and whose it was.
type DeadToken = (DeviceNo, String);

/// The way to the janitor. When too many tokens wait, the next one is not taken: its device stays in the queue, and the
/// provider says the same again.
pub(super) struct Janitor {
    dead: mpsc::Sender<DeadToken>,
}

impl Janitor {
    pub(super) fn start(config: &Notifications, store: Store, metrics: Metrics, tasks: &Tasks) -> Self {
        let (dead, incoming) = mpsc::channel(config.janitor_channel_capacity);
        let (batch, period) = (config.janitor_batch_size, config.janitor_interval);
        let stopping = tasks.clone();
        tasks.spawn("push janitor", async move {
            let mut round = Round { incoming, store, metrics, batch, under_way: Vec::new() };
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stopping.stopping() => break,
                }
                round.run().await;
            }
            round.run().await;
        });
        Self { dead }
    }

    /// Whether the token will be removed.
    pub(super) fn submit(&self, device: DeviceNo, token: &str) -> bool {
        self.dead.try_send((device, token.to_owned())).is_ok()
    }
}

struct Round {
    incoming: mpsc::Receiver<DeadToken>,
    store: Store,
    metrics: Metrics,
    batch: usize,
    /// Taken out of the channel, and not removed yet.
    under_way: Vec<DeadToken>,
}

impl Round {
    /// Removes everything that waits. What could not be removed is tried again in the next round.
    async fn run(&mut self) {
        loop {
            while self.under_way.len() < self.batch {
                let Ok(dead) = self.incoming.try_recv() else { break };
                self.under_way.push(dead);
            }
            if self.under_way.is_empty() {
                return;
            }
            match self.store.delete_dead_tokens(&self.under_way).await {
                Ok(count) => {
                    self.metrics.dead_tokens.add((), count);
                    info!(count, "dead push tokens removed");
                }
                Err(error) => {
                    warn!(%error, "dead push tokens could not be removed; it will be tried again");
                    return;
                }
            }
            self.under_way.clear();
        }
    }
}
