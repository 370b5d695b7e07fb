//! Questions of one kind that come at the same time are asked in one statement, as sends are stored in groups. While some
//! are being answered the next ones gather, so none waits for company.
//!
//! There is no task for it: a caller that finds a free query slot asks for all that wait, once, and then leaves the slot to
//! the first of those who have come meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::store::{Result, StoreError};

/// What those who wait have in common.
pub(super) struct QueryBatcher<Q, A> {
    state: Mutex<State<Q, A>>,
    /// Statements under way at the same time.
    concurrency: usize,
    /// Questions in one statement.
    max_batch: usize,
}

struct State<Q, A> {
    /// As many as there are requests and sockets at most.
    pending: VecDeque<PendingQuery<Q, A>>,
    running: usize,
}

struct PendingQuery<Q, A> {
    query: Q,
    reply: oneshot::Sender<Reply<Q, A>>,
}

enum Reply<Q, A> {
    Answer(Result<A>),
    /// The slot is yours: ask yourself, and for the others.
    Run(Q, BatchPermit<Q, A>),
}

impl<Q: Clone, A> QueryBatcher<Q, A> {
    /// At most `concurrency` statements at the same time, each with at most `max_batch` questions.
    pub(super) fn new(concurrency: usize, max_batch: usize) -> Self {
        Self { state: Mutex::new(State { pending: VecDeque::new(), running: 0 }), concurrency, max_batch }
    }

    /// The answer to `query`. `run` answers many at once, in their order. Dropping the future harms no other caller.
    pub(super) async fn run(self: &Arc<Self>, query: Q, run: impl AsyncFnOnce(&[Q]) -> Result<Vec<A>>) -> Result<A> {
        loop {
            if let Some(permit) = self.try_acquire() {
                return permit.run(query, run).await;
            }
            let (reply, replied) = oneshot::channel();
            if !self.enqueue(PendingQuery { query: query.clone(), reply }) {
                continue;
            }
            match replied.await {
                Ok(Reply::Answer(answer)) => return answer,
                Ok(Reply::Run(query, permit)) => return permit.run(query, run).await,
                // The caller that asked for us has given up.
                Err(_) => {}
            }
        }
    }

    fn try_acquire(self: &Arc<Self>) -> Option<BatchPermit<Q, A>> {
        let mut state = self.state();
        if state.running >= self.concurrency {
            return None;
        }
        state.running += 1;
        Some(BatchPermit { batcher: Some(self.clone()) })
    }

    /// False when a query slot has become free in between.
    fn enqueue(&self, pending: PendingQuery<Q, A>) -> bool {
        let mut state = self.state();
        let has_to_wait = state.running >= self.concurrency;
        if has_to_wait {
            state.pending.push_back(pending);
        }
        has_to_wait
    }
}

impl<Q, A> QueryBatcher<Q, A> {
    /// No code panics while it holds the state.
    fn state(&self) -> MutexGuard<'_, State<Q, A>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The others who wait, as many as one statement takes.
    fn take_batch(&self) -> Vec<PendingQuery<Q, A>> {
        let mut state = self.state();
        let count = state.pending.len().min(self.max_batch - 1);
        state.pending.drain(..count).filter(|pending| !pending.reply.is_closed()).collect()
    }

    fn take_all(&self) -> Vec<oneshot::Sender<Reply<Q, A>>> {
        self.state().pending.drain(..).map(|pending| pending.reply).collect()
    }

    fn take_first(&self) -> Option<PendingQuery<Q, A>> {
        let mut state = self.state();
        let first = state.pending.pop_front();
        if first.is_none() {
            state.running -= 1;
        }
        first
    }
}

/// The right to have a statement under way. Dropping it passes it on, wherever it is at that moment.
struct BatchPermit<Q, A> {
    /// Taken out when the slot has been passed on.
    batcher: Option<Arc<QueryBatcher<Q, A>>>,
}

impl<Q: Clone, A> BatchPermit<Q, A> {
    async fn run(self, query: Q, run: impl AsyncFnOnce(&[Q]) -> Result<Vec<A>>) -> Result<A> {
        let (mut queries, mut replies) = (vec![query], Vec::new());
        for pending in self.batcher.iter().flat_map(|batcher| batcher.take_batch()) {
            queries.push(pending.query);
            replies.push(pending.reply);
        }
        let answered = run(&queries).await;
        if answered.as_ref().is_err_and(StoreError::is_lost_connection) {
            // Those that wait would wait for the same.
            replies.extend(self.batcher.iter().flat_map(|batcher| batcher.take_all()));
        }
        drop(self);
        let mut answers = match answered {
            Ok(answers) => answers.into_iter(),
            Err(error) => {
                for reply in replies {
                    // Fails when the caller is gone.
                    let _ = reply.send(Reply::Answer(Err(error.duplicate())));
                }
                return Err(error);
            }
        };
        let own = answers.next().ok_or_else(|| sqlx::Error::Protocol("a question without an answer".into()))?;
        for (reply, answer) in replies.into_iter().zip(answers) {
            let _ = reply.send(Reply::Answer(Ok(answer)));
        }
        Ok(own)
    }
}

impl<Q, A> Drop for BatchPermit<Q, A> {
    fn drop(&mut self) {
        while let Some(batcher) = self.batcher.take() {
            let Some(PendingQuery { query, reply }) = batcher.take_first() else { return };
            // Comes back when the caller is gone.
            if let Err(Reply::Run(_, mut permit)) =
                reply.send(Reply::Run(query, BatchPermit { batcher: Some(batcher) }))
            {
                self.batcher = permit.batcher.take();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use futures_util::{FutureExt, poll};

    use super::*;

    #[tokio::test]
    async fn each_query_gets_its_own_answer_and_few_statements_are_needed() {
        let (batcher, statements) = (Arc::new(QueryBatcher::new(1, 64)), AtomicUsize::new(0));
        let run = async |query: u32| {
            batcher
                .run(query, async |queries: &[u32]| {
                    statements.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    Ok(queries.iter().map(|query| query * 10).collect())
                })
                .await
        };
        let answers = join_all((0..100).map(run)).await;
        assert!(answers.into_iter().map(Result::unwrap).eq((0..100).map(|query| query * 10)));
        assert_eq!(statements.load(Ordering::Relaxed), 3, "one alone, then 64, then the rest");
    }

    #[tokio::test]
    async fn an_error_is_everybodys() {
        let batcher: Arc<QueryBatcher<u32, u32>> = Arc::new(QueryBatcher::new(1, 64));
        let run = async |query| {
            let fail = async |_: &[u32]| {
                tokio::task::yield_now().await;
                Err(sqlx::Error::PoolTimedOut.into())
            };
            batcher.run(query, fail).await
        };
        assert!(join_all((0..10).map(run)).await.into_iter().all(|answer: Result<u32>| answer.is_err()));
    }

    #[tokio::test]
    async fn a_cancelled_query_leaves_no_other_query_behind() {
        let batcher = Arc::new(QueryBatcher::new(1, 64));
        let never = async |_: &[u32]| std::future::pending::<Result<Vec<u32>>>().await;
        let same = async |queries: &[u32]| Ok(queries.to_vec());
        let mut first = Box::pin(batcher.run(1, never));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(batcher.run(2, same));
        let mut third = Box::pin(batcher.run(3, same));
        assert!(poll!(&mut second).is_pending() && poll!(&mut third).is_pending());
        drop(first);
        drop(second);
        assert_eq!(third.now_or_never().expect("the lane is free").unwrap(), 3);
        assert_eq!(batcher.state().running, 0);
    }
}
