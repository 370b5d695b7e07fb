//! Questions of one kind that come at the same time are asked in one statement, as sends are stored in groups. While some
//! are being answered the next ones gather, so nobody waits for company.
//!
//! There is no task for it: whoever asks while a lane is free asks for all that wait, once, and then leaves the lane to
//! the first of those who have come meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::store::{Result, StoreError};

/// What those who wait have in common.
pub(super) struct Gather<Q, A> {
    state: Mutex<State<Q, A>>,
    /// Statements under way at the same time.
    lanes: usize,
    /// Questions in one statement.
    most: usize,
}

struct State<Q, A> {
    /// As many as there are requests and sockets at the most.
    waiting: VecDeque<Waiting<Q, A>>,
    busy: usize,
}

struct Waiting<Q, A> {
    question: Q,
    reply: oneshot::Sender<Reply<Q, A>>,
}

enum Reply<Q, A> {
    Answer(Result<A>),
    /// The lane is yours: ask yourself, and for the others.
    Ask(Q, Lane<Q, A>),
}

impl<Q: Clone, A> Gather<Q, A> {
    /// At most `lanes` statements at the same time, each with at most `most` questions.
    pub(super) fn new(lanes: usize, most: usize) -> Self {
        Self { state: Mutex::new(State { waiting: VecDeque::new(), busy: 0 }), lanes, most }
    }

    /// The answer to `question`. `ask` answers many at once, in their order. Dropping the future harms nobody else.
    pub(super) async fn ask(self: &Arc<Self>, question: Q, ask: impl AsyncFnOnce(&[Q]) -> Result<Vec<A>>) -> Result<A> {
        loop {
            if let Some(lane) = self.take_lane() {
                return lane.ask(question, ask).await;
            }
            let (reply, replied) = oneshot::channel();
            if !self.wait(Waiting { question: question.clone(), reply }) {
                continue;
            }
            match replied.await {
                Ok(Reply::Answer(answer)) => return answer,
                Ok(Reply::Ask(question, lane)) => return lane.ask(question, ask).await,
                // Whoever asked for us has given up.
                Err(_) => {}
            }
        }
    }

    fn take_lane(self: &Arc<Self>) -> Option<Lane<Q, A>> {
        let mut state = self.state();
        if state.busy >= self.lanes {
            return None;
        }
        state.busy += 1;
        Some(Lane { gather: Some(self.clone()) })
    }

    /// False when a lane has become free in between.
    fn wait(&self, waiting: Waiting<Q, A>) -> bool {
        let mut state = self.state();
        let has_to_wait = state.busy >= self.lanes;
        if has_to_wait {
            state.waiting.push_back(waiting);
        }
        has_to_wait
    }
}

impl<Q, A> Gather<Q, A> {
    /// No code panics while it holds the state.
    fn state(&self) -> MutexGuard<'_, State<Q, A>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The others who wait, as many as one statement takes.
    fn take_others(&self) -> Vec<Waiting<Q, A>> {
        let mut state = self.state();
        let count = state.waiting.len().min(self.most - 1);
        state.waiting.drain(..count).filter(|waiting| !waiting.reply.is_closed()).collect()
    }

    fn take_all(&self) -> Vec<oneshot::Sender<Reply<Q, A>>> {
        self.state().waiting.drain(..).map(|waiting| waiting.reply).collect()
    }

    fn take_first(&self) -> Option<Waiting<Q, A>> {
        let mut state = self.state();
        let first = state.waiting.pop_front();
        if first.is_none() {
            state.busy -= 1;
        }
        first
    }
}

/// The right to have a statement under way. Dropping it passes it on, wherever it is at that moment.
struct Lane<Q, A> {
    /// Taken out when the lane has been passed on.
    gather: Option<Arc<Gather<Q, A>>>,
}

impl<Q: Clone, A> Lane<Q, A> {
    async fn ask(self, question: Q, ask: impl AsyncFnOnce(&[Q]) -> Result<Vec<A>>) -> Result<A> {
        let (mut questions, mut replies) = (vec![question], Vec::new());
        for waiting in self.gather.iter().flat_map(|gather| gather.take_others()) {
            questions.push(waiting.question);
            replies.push(waiting.reply);
        }
        let answered = ask(&questions).await;
        if answered.as_ref().is_err_and(StoreError::is_lost_connection) {
            // Whoever waits would wait for the same.
            replies.extend(self.gather.iter().flat_map(|gather| gather.take_all()));
        }
        drop(self);
        let mut answers = match answered {
            Ok(answers) => answers.into_iter(),
            Err(error) => {
                for reply in replies {
                    // Fails when nobody waits any more.
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

impl<Q, A> Drop for Lane<Q, A> {
    fn drop(&mut self) {
        while let Some(gather) = self.gather.take() {
            let Some(Waiting { question, reply }) = gather.take_first() else { return };
            // Comes back when nobody waits there any more.
            if let Err(Reply::Ask(_, mut lane)) = reply.send(Reply::Ask(question, Lane { gather: Some(gather) })) {
                self.gather = lane.gather.take();
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
    async fn everybody_gets_their_own_answer_and_few_statements_are_needed() {
        let (gather, statements) = (Arc::new(Gather::new(1, 64)), AtomicUsize::new(0));
        let ask = async |question: u32| {
            gather
                .ask(question, async |questions: &[u32]| {
                    statements.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    Ok(questions.iter().map(|question| question * 10).collect())
                })
                .await
        };
        let answers = join_all((0..100).map(ask)).await;
        assert!(answers.into_iter().map(Result::unwrap).eq((0..100).map(|question| question * 10)));
        assert_eq!(statements.load(Ordering::Relaxed), 3, "one alone, then 64, then the rest");
    }

    #[tokio::test]
    async fn an_error_is_everybodys() {
        let gather: Arc<Gather<u32, u32>> = Arc::new(Gather::new(1, 64));
        let ask = async |question| {
            let fail = async |_: &[u32]| {
                tokio::task::yield_now().await;
                Err(sqlx::Error::PoolTimedOut.into())
            };
            gather.ask(question, fail).await
        };
        assert!(join_all((0..10).map(ask)).await.into_iter().all(|answer: Result<u32>| answer.is_err()));
    }

    #[tokio::test]
    async fn whoever_gives_up_while_asking_for_others_or_waiting_leaves_nobody_behind() {
        let gather = Arc::new(Gather::new(1, 64));
        let never = async |_: &[u32]| std::future::pending::<Result<Vec<u32>>>().await;
        let same = async |questions: &[u32]| Ok(questions.to_vec());
        let mut first = Box::pin(gather.ask(1, never));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(gather.ask(2, same));
        let mut third = Box::pin(gather.ask(3, same));
        assert!(poll!(&mut second).is_pending() && poll!(&mut third).is_pending());
        drop(first);
        drop(second);
        assert_eq!(third.now_or_never().expect("the lane is free").unwrap(), 3);
        assert_eq!(gather.state().busy, 0);
    }
}
