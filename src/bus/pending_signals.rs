//! Signals to other nodes that Valkey has not confirmed yet. Equal ones merge, so no caller waits for Valkey and the set
//! stays small; past its bound it becomes one "read everything" to all sessions.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::bus::Signals;
use crate::bus::message::Entries;
use crate::model::ids::{Address, DeviceNo, UserId};
use crate::telemetry::traces::TraceLink;

/// Devices for which signals may wait.
const MAX_DEVICES: usize = 65_536;
/// Traces that may wait. Further ones are dropped.
const MAX_TRACE_LINKS: usize = 512;

#[derive(Default)]
pub(super) struct PendingSignals {
    state: Mutex<State>,
    not_empty: Notify,
}

#[derive(Default)]
struct State {
    waiting: SignalBatch,
    /// Handed out, and neither confirmed nor put back.
    in_flight: SignalBatch,
}

/// Signals by account, since each account has a channel of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SignalBatch {
    accounts: BTreeMap<UserId, Entries>,
    /// All nodes should look at everything; it stands for whatever could have been in `accounts`.
    pub(super) resync_all: bool,
    devices: usize,
    /// Go before the signals, and are lost with the connection.
    pub(super) trace_links: Vec<(Address, TraceLink)>,
}

impl SignalBatch {
    fn is_empty(&self) -> bool {
        self.accounts.is_empty() && !self.resync_all
    }

    fn add(&mut self, address: Address, signals: Signals) {
        if self.resync_all {
            return;
        }
        let entries = self.accounts.entry(address.user).or_default();
        match entries.iter_mut().find(|(device, _)| *device == address.device) {
            Some((_, waiting)) => *waiting = waiting.union(signals),
            None => {
                entries.push((address.device, signals));
                self.devices += 1;
            }
        }
        if self.devices > MAX_DEVICES {
            *self = Self { resync_all: true, ..Self::default() };
        }
    }

    /// Each account with its devices.
    pub(super) fn messages(&self) -> impl Iterator<Item = (UserId, &[(DeviceNo, Signals)])> {
        self.accounts.iter().map(|(user, entries)| (*user, entries.as_slice()))
    }
}

impl PendingSignals {
    pub(super) fn add(&self, addresses: &[Address], signals: Signals) {
        if addresses.is_empty() {
            return;
        }
        let mut state = self.state();
        addresses.iter().for_each(|address| state.waiting.add(*address, signals));
        drop(state);
        self.not_empty.notify_one();
    }

    /// This alone tells no session that something waits: a signal follows.
    pub(super) fn send_trace_link(&self, addresses: &[Address], trace_link: TraceLink) {
        let trace_links = &mut self.state().waiting.trace_links;
        let room = MAX_TRACE_LINKS - trace_links.len();
        trace_links.extend(addresses.iter().take(room).map(|address| (*address, trace_link)));
    }

    /// Ends when something waits.
    pub(super) async fn not_empty(&self) {
        loop {
            let not_empty = self.not_empty.notified();
            if !self.state().waiting.is_empty() {
                return;
            }
            not_empty.await;
        }
    }

    /// Hands out what waits for at most so many accounts. It counts as unconfirmed until [`PendingSignals::confirm`].
    pub(super) fn take(&self, accounts: usize) -> SignalBatch {
        let mut state = self.state();
        let mut batch =
            SignalBatch { resync_all: std::mem::take(&mut state.waiting.resync_all), ..SignalBatch::default() };
        while batch.accounts.len() < accounts {
            let Some((user, entries)) = state.waiting.accounts.pop_first() else { break };
            batch.devices += entries.len();
            batch.accounts.insert(user, entries);
        }
        state.waiting.devices -= batch.devices;
        state.in_flight = batch.clone();
        batch.trace_links = std::mem::take(&mut state.waiting.trace_links);
        batch
    }

    /// What was handed out is with Valkey.
    pub(super) fn confirm(&self) {
        self.state().in_flight = SignalBatch::default();
    }

    /// What was handed out and not confirmed waits again.
    pub(super) fn requeue(&self) {
        let mut state = self.state();
        let batch = std::mem::take(&mut state.in_flight);
        if batch.resync_all {
            state.waiting = SignalBatch { resync_all: true, ..SignalBatch::default() };
        }
        for (user, entries) in batch.accounts {
            for (device, signals) in entries {
                state.waiting.add(Address { user, device }, signals);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().waiting.is_empty()
    }

    /// No code panics while it holds the state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::bus::Signal;

    fn address(device: i64) -> Address {
        Address { user: UserId::random(), device: DeviceNo(device) }
    }

    #[test]
    fn equal_signals_merge_and_different_ones_share_a_message() {
        let pending = PendingSignals::default();
        let one = address(1);
        let other = Address { device: DeviceNo(2), ..one };
        pending.add(&[one, other, one], Signal::NewMessages.into());
        pending.add(&[one], Signal::KeysLow.into());
        let batch = pending.take(10);
        let both = Signals::from(Signal::NewMessages).union(Signal::KeysLow.into());
        assert_eq!(batch.accounts[&one.user], [(DeviceNo(1), both), (DeviceNo(2), Signal::NewMessages.into())]);
        assert!(pending.is_empty());
    }

    #[test]
    fn what_is_not_confirmed_waits_again_with_what_came_meanwhile() {
        let pending = PendingSignals::default();
        let (one, other) = (address(1), address(2));
        pending.add(&[one], Signal::NewMessages.into());
        pending.take(10);
        pending.add(&[one, other], Signal::AuthChanged.into());
        pending.requeue();
        let batch = pending.take(10);
        let both = Signals::from(Signal::NewMessages).union(Signal::AuthChanged.into());
        assert_eq!(batch.accounts[&one.user], [(DeviceNo(1), both)]);
        assert_eq!(batch.accounts[&other.user], [(DeviceNo(2), Signal::AuthChanged.into())]);
    }

    #[test]
    fn what_is_confirmed_does_not_come_back() {
        let pending = PendingSignals::default();
        pending.add(&[address(1)], Signal::NewMessages.into());
        pending.take(10);
        pending.confirm();
        pending.requeue();
        assert!(pending.is_empty());
    }

    #[test]
    fn it_is_handed_out_in_parts() {
        let pending = PendingSignals::default();
        (0..25).for_each(|device| pending.add(&[address(device)], Signal::NewMessages.into()));
        let sizes = [(); 4].map(|()| {
            let batch = pending.take(10);
            pending.confirm();
            batch.messages().count()
        });
        assert_eq!(sizes, [10, 10, 5, 0]);
    }

    #[test]
    fn above_its_limit_it_becomes_one_resync_of_all_nodes() {
        let pending = PendingSignals::default();
        (0..MAX_DEVICES as i64).for_each(|device| pending.add(&[address(device)], Signal::NewMessages.into()));
        assert!(!pending.take(1).resync_all);
        pending.requeue();
        let one = address(-1);
        pending.add(&[one], Signal::NewMessages.into());
        let batch = pending.take(10);
        assert!(batch.resync_all && batch.accounts.is_empty());
        // And it is not forgotten before it is confirmed.
        pending.add(&[one], Signal::NewMessages.into());
        pending.requeue();
        assert!(pending.take(10).resync_all);
        pending.confirm();
        pending.add(&[one], Signal::NewMessages.into());
        assert_eq!(pending.take(10).messages().count(), 1);
    }

    #[test]
    fn traces_go_once_and_a_bounded_number_of_them() {
        let pending = PendingSignals::default();
        let (one, trace_link) = (address(1), TraceLink::from_bytes(&[7; TraceLink::BYTES]).unwrap());
        (0..2 * MAX_TRACE_LINKS).for_each(|_| pending.send_trace_link(&[one, one], trace_link));
        assert!(pending.is_empty(), "a trace alone is no reason to send");
        pending.add(&[one], Signal::NewMessages.into());
        assert_eq!(pending.take(10).trace_links.len(), MAX_TRACE_LINKS);
        pending.requeue();
        let batch = pending.take(10);
        assert_eq!((batch.trace_links.len(), batch.messages().count()), (0, 1));
    }

    #[tokio::test]
    async fn a_waiting_task_is_woken_when_it_is_no_longer_empty() {
        let pending = PendingSignals::default();
        assert!(pending.not_empty().now_or_never().is_none());
        let mut not_empty = Box::pin(pending.not_empty());
        assert!(futures_util::poll!(&mut not_empty).is_pending());
        pending.add(&[address(1)], Signal::NewMessages.into());
        not_empty.await;
        pending.not_empty().await;
    }
}
