//! What the writer remembers of the inboxes between two groups.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::SqlitePool;

use crate::model::ids::DeviceNo;
use crate::store::outcome::Queued;

/// Devices whose inbox size is remembered. Past that all are forgotten, and counted again when they get mail.
const REMEMBERED_INBOXES: usize = 100_000;

/// What the writer remembers between groups. There is one writer, so nobody else changes it.
pub(super) struct Inboxes {
    state: Mutex<InboxState>,
}

#[derive(Default)]
struct InboxState {
    last_position: i64,
    /// At most so many messages wait for a device. Acks don't lower it, so it may be too high, never too low; a
    /// device that seems to pass its limit is counted afresh. So the inbox that is emptied in time costs nothing.
    at_most: HashMap<DeviceNo, u32>,
}

impl Inboxes {
    pub(super) async fn load(pool: &SqlitePool) -> std::result::Result<Self, sqlx::Error> {
        let last: Option<i64> =
            sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetch_optional(pool).await?;
        Ok(Self { state: Mutex::new(InboxState { last_position: last.unwrap_or_default(), at_most: HashMap::new() }) })
    }

    fn state(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves `count` positions and answers the first. They are lost if the transaction fails, which does no harm.
    pub(super) fn take_positions(&self, count: usize) -> i64 {
        let mut state = self.state();
        let first = state.last_position + 1;
        state.last_position += i64::try_from(count).unwrap_or(i64::MAX);
        first
    }

    /// Counts new mail in, and answers the devices that have to be counted because they may have passed `max`.
    pub(super) fn add(&self, queued: &[Queued<'_>], max: u32) -> Vec<DeviceNo> {
        let mut state = self.state();
        if state.at_most.len() > REMEMBERED_INBOXES {
            state.at_most.clear();
        }
        let mut unsure = HashSet::new();
        for message in queued {
            let at_most = state.at_most.entry(message.device).or_insert(u32::MAX);
            *at_most = at_most.saturating_add(1);
            if *at_most > max {
                unsure.insert(message.device);
            }
        }
        unsure.into_iter().collect()
    }

    pub(super) fn set(&self, device: DeviceNo, count: u32) {
        self.state().at_most.insert(device, count);
    }
}
