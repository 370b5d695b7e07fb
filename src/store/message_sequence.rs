//! What a node's writer of messages remembers between two groups.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::SqliteConnection;
use uuid::ContextV7;

use crate::clock::{self, Timestamp};
use crate::model::ids::MessageId;

/// What the writer remembers between groups. A node has one; cloning gives the same.
#[derive(Clone)]
pub(super) struct MessageSequence {
    state: Arc<Mutex<State>>,
}

/// What the messages of one group are given.
pub(super) struct AssignedIds {
    /// When they were received.
    pub(super) received_at: Timestamp,
    /// One for each.
    pub(super) ids: Vec<MessageId>,
}

#[derive(Default)]
struct State {
    last_receipt: Timestamp,
    sequence: ContextV7,
    /// SQLite only: the place of the newest message.
    last_position: i64,
}

impl MessageSequence {
    /// For a database that gives positions itself.
    pub(super) fn new() -> Self {
        Self { state: Arc::default() }
    }

    /// For SQLite, whose only writer we are.
    pub(super) async fn load(db: &mut SqliteConnection) -> std::result::Result<Self, sqlx::Error> {
        let last: Option<i64> = sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'messages'")
            .fetch_optional(&mut *db)
            .await?;
        let newest: Option<Timestamp> =
            sqlx::query_scalar("SELECT received_at FROM messages ORDER BY position DESC LIMIT 1")
                .fetch_optional(db)
                .await?;
        let state = State {
            last_position: last.unwrap_or_default(),
            last_receipt: newest.unwrap_or_default(),
            ..State::default()
        };
        Ok(Self { state: Arc::new(Mutex::new(state)) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `count` new messages their ids, and the time of receipt that they share. All of them ascend from group to
    /// group, except when a clock is set back by more than [`clock::TOLERANCE`].
    pub(super) fn assign_ids(&self, count: usize, now: Timestamp) -> AssignedIds {
        let mut state = self.state();
        // A clock that was set back a little stands still until it has caught up. A larger step ends a doubt, in which the
        // latest time was taken: standing still would tell the time of a wrong clock for hours. Positions keep the order.
        let stands_still = now < state.last_receipt && now + clock::TOLERANCE >= state.last_receipt;
        let received_at = if stands_still { state.last_receipt } else { now };
        if received_at < state.last_receipt {
            state.sequence = ContextV7::default();
        }
        state.last_receipt = received_at;
        let ids = (0..count).map(|_| MessageId::next(received_at, &state.sequence)).collect();
        AssignedIds { received_at, ids }
    }

    /// The first of `count` new places in SQLite's order; the others follow without a gap. What is given to a
    /// transaction that fails is lost, which does no harm.
    pub(super) fn reserve_positions(&self, count: usize) -> i64 {
        let mut state = self.state();
        let first = state.last_position + 1;
        state.last_position += i64::try_from(count).unwrap_or(i64::MAX);
        first
    }
}
