//! Acks on their way from one socket to the database. None is ever dropped: what can't be written is tried again, and
//! while too many wait the socket isn't read.

use std::time::Duration;

use futures_util::future::{BoxFuture, pending};
use tokio::time::Instant;
use tracing::warn;

use crate::app::App;
use crate::config;
use crate::model::ids::{DeviceNo, MessageId, Position};
use crate::store::Notice;
use crate::telemetry::traces::Span;

/// The pause after a failed write.
const RETRY: Duration = Duration::from_millis(500);
/// How long acks of a socket that has ended are kept trying.
const FINAL_RETRY_TIME: Duration = Duration::from_secs(30);

/// What became of a write: whether it is durable.
pub(super) type Stored = bool;

/// The acks of one socket.
#[derive(Default)]
pub(super) struct Acks {
    waiting: Vec<Ack>,
    /// A notice that the client has acknowledged.
    notice: Option<Box<Notice>>,
    due: Option<Instant>,
    /// Set after a failed write: nothing is tried before.
    retry_at: Option<Instant>,
    /// The write under way, and what it writes in case it fails.
    storing: Option<(Batch, BoxFuture<'static, Stored>)>,
    /// Of those that wait and belong to traces.
    spans: Vec<Span>,
}

/// What is written at once.
#[derive(Clone, Default)]
struct Batch {
    acks: Vec<Ack>,
    notice: Option<Box<Notice>>,
}

#[derive(Clone, Copy)]
struct Ack {
    id: MessageId,
    /// Unknown when this socket didn't send the message, or has forgotten that it did.
    position: Option<Position>,
}

impl Acks {
    /// Takes an ack in; it is to be written at `due` at the latest.
    pub(super) fn add(&mut self, id: MessageId, position: Option<Position>, due: Instant) {
        self.waiting.push(Ack { id, position });
        self.due.get_or_insert(due);
    }

    /// Takes in that the client has acknowledged a notice.
    pub(super) fn add_notice(&mut self, notice: Notice, due: Instant) {
        self.notice = Some(Box::new(notice));
        self.due.get_or_insert(due);
    }

    /// These spans end with the next write.
    pub(super) fn trace(&mut self, spans: Vec<Span>) {
        // A second batch of a trace that is delivered before the first one's acks are written is seldom.
        if self.spans.is_empty() {
            self.spans = spans;
        }
    }

    /// True when the socket should not be read until some have been written.
    pub(super) fn are_full(&self, config: &config::Gateway) -> bool {
        self.waiting.len() >= config.ack_buffer_size
    }

    /// True when a write should start.
    pub(super) fn are_due(&self, now: Instant, config: &config::Gateway) -> bool {
        let enough = config.ack_batch_size.min(config.ack_buffer_size);
        let may_try = self.storing.is_none() && self.retry_at.is_none_or(|retry_at| retry_at <= now);
        may_try && (self.waiting.len() >= enough || self.due.is_some_and(|due| due <= now))
    }

    /// When the next write is due, if nothing comes before that.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.storing.is_some() { None } else { self.due }
    }

    /// Starts to write a batch.
    pub(super) fn store(&mut self, app: &App, device: DeviceNo) {
        let batch_size = self.waiting.len().min(app.config.gateway.ack_batch_size);
        let batch = Batch { acks: self.waiting.drain(..batch_size).collect(), notice: self.notice.take() };
        if self.waiting.is_empty() {
            (self.waiting, self.due) = (Vec::new(), None);
        }
        let write = traced(std::mem::take(&mut self.spans), write(app.clone(), device, batch.clone()));
        self.storing = Some((batch, Box::pin(write)));
    }

    /// Waits for the write under way. Dropping the future loses nothing.
    pub(super) async fn stored(&mut self) -> Stored {
        match &mut self.storing {
            Some((_, write)) => write.await,
            None => pending().await,
        }
    }

    /// Takes note of how the write under way has ended. What wasn't written waits again.
    pub(super) fn finish_write(&mut self, stored: Stored) {
        let Some((mut batch, _)) = self.storing.take() else { return };
        self.retry_at = None;
        if !stored {
            batch.acks.append(&mut self.waiting);
            self.waiting = batch.acks;
            self.notice = self.notice.take().or(batch.notice);
            let retry_at = Instant::now() + RETRY;
            (self.due, self.retry_at) = (Some(retry_at), Some(retry_at));
        }
    }

    /// Writes everything, though the socket is gone.
    pub(super) async fn finish(mut self, app: &App, device: DeviceNo) {
        let give_up = Instant::now() + FINAL_RETRY_TIME;
        while Instant::now() < give_up {
            if self.storing.is_none() {
                if self.waiting.is_empty() && self.notice.is_none() {
                    return;
                }
                self.store(app, device);
            }
            let stored = self.stored().await;
            self.finish_write(stored);
            if !stored {
                tokio::time::sleep(RETRY).await;
            }
        }
        warn!(acks = self.waiting.len(), "acks could not be written; their messages will be delivered again");
    }
}

/// A write is a part of one of its traces; the others see how long it took.
async fn traced(spans: Vec<Span>, write: impl Future<Output = Stored>) -> Stored {
    let Some(first) = spans.first() else { return write.await };
    let stored = first.run(write).await;
    if !stored {
        spans.iter().for_each(Span::set_failed);
    }
    stored
}

async fn write(app: App, device: DeviceNo, Batch { acks: batch, notice }: Batch) -> Stored {
    if let Some(notice) = notice
        && let Err(error) = app.store.acknowledge_notice(device, *notice, app.clock.now()).await
    {
        warn!(%error, "an acknowledged notice could not be written down; it will be tried again");
        return false;
    }
    let mut positions: Vec<Position> = batch.iter().filter_map(|ack| ack.position).collect();
    let unknown: Vec<MessageId> = batch.iter().filter(|ack| ack.position.is_none()).map(|ack| ack.id).collect();
    if !unknown.is_empty() {
        match app.store.positions(device, &unknown).await {
            Ok(found) => positions.extend(found),
            Err(error) => {
                warn!(%error, "acks could not be looked up; they will be tried again");
                return false;
            }
        }
    }
    positions.is_empty() || app.message_writer.acknowledge(device, positions).await.is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failed_write_of_a_full_batch_is_not_repeated_at_once() {
        let config = config::Config::embedded(Path::new("unused")).unwrap().gateway;
        let mut acks = Acks::default();
        for _ in 0..2 * config.ack_batch_size {
            acks.add(MessageId::random(), None, Instant::now());
        }
        assert!(acks.are_due(Instant::now(), &config));
        let batch = Batch { acks: acks.waiting.drain(..config.ack_batch_size).collect(), notice: None };
        acks.storing = Some((batch, Box::pin(pending())));
        acks.finish_write(false);
        assert_eq!(acks.waiting.len(), 2 * config.ack_batch_size, "nothing is lost");
        assert!(!acks.are_due(Instant::now(), &config));
        assert!(acks.due().unwrap() > Instant::now());
        assert!(acks.are_due(acks.due().unwrap(), &config));
    }
}
