//! Signals to other nodes that Valkey has not confirmed yet. Equal ones merge, so nobody waits for Valkey and the set
//! stays small; past its bound it becomes one "look at everything" to everybody.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::bus::Signals;
use crate::bus::message::Entries;
use crate::model::ids::{Address, DeviceNo, UserId};
use crate::telemetry::traces::Trail;

/// Devices for which signals may wait.
const BOUND: usize = 65_536;
/// Traces that may wait. Further ones are dropped.
const TRAILS: usize = 512;

#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Default)]
struct State {
    waiting: Letters,
    /// Handed out, and neither confirmed nor put back.
    under_way: Letters,
}

/// Signals by account, since each account has a channel of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Letters {
    accounts: BTreeMap<UserId, Entries>,
    /// All nodes should look at everything; it stands for whatever could have been in `accounts`.
    pub(super) everybody: bool,
    devices: usize,
    /// Go before the signals, and are lost with the connection.
    pub(super) trails: Vec<(Address, Trail)>,
}

impl Letters {
    fn is_empty(&self) -> bool {
        self.accounts.is_empty() && !self.everybody
    }

    fn add(&mut self, address: Address, signals: Signals) {
        if self.everybody {
            return;
        }
        let entries = self.accounts.entry(address.user).or_default();
        match entries.iter_mut().find(|(device, _)| *device == address.device) {
            Some((_, waiting)) => *waiting = waiting.and(signals),
            None => {
                entries.push((address.device, signals));
                self.devices += 1;
            }
        }
        if self.devices > BOUND {
            *self = Self { everybody: true, ..Self::default() };
        }
    }

    /// Each account with its devices.
    pub(super) fn messages(&self) -> impl Iterator<Item = (UserId, &[(DeviceNo, Signals)])> {
        self.accounts.iter().map(|(user, entries)| (*user, entries.as_slice()))
    }
}

impl Outbox {
    pub(super) fn add(&self, addresses: &[Address], signals: Signals) {
        if addresses.is_empty() {
            return;
        }
        let mut state = self.state();
        addresses.iter().for_each(|address| state.waiting.add(*address, signals));
        drop(state);
        self.filled.notify_one();
    }

    /// Nobody is told by this alone that something waits: a signal follows.
    pub(super) fn lay_trail(&self, addresses: &[Address], trail: Trail) {
        let trails = &mut self.state().waiting.trails;
        let room = TRAILS - trails.len();
        trails.extend(addresses.iter().take(room).map(|address| (*address, trail)));
    }

    /// Ends when something waits.
    pub(super) async fn filled(&self) {
        loop {
            let filled = self.filled.notified();
            if !self.state().waiting.is_empty() {
                return;
            }
            filled.await;
        }
    }

    /// Hands out what waits for at most so many accounts. It counts as unconfirmed until [`Outbox::confirm`].
    pub(super) fn take(&self, accounts: usize) -> Letters {
        let mut state = self.state();
        let mut letters = Letters { everybody: std::mem::take(&mut state.waiting.everybody), ..Letters::default() };
        while letters.accounts.len() < accounts {
            let Some((user, entries)) = state.waiting.accounts.pop_first() else { break };
            letters.devices += entries.len();
            letters.accounts.insert(user, entries);
        }
        state.waiting.devices -= letters.devices;
        state.under_way = letters.clone();
        letters.trails = std::mem::take(&mut state.waiting.trails);
        letters
    }

    /// What was handed out is with Valkey.
    pub(super) fn confirm(&self) {
        self.state().under_way = Letters::default();
    }

    /// What was handed out and not confirmed waits again.
    pub(super) fn put_back(&self) {
        let mut state = self.state();
        let letters = std::mem::take(&mut state.under_way);
        if letters.everybody {
            state.waiting = Letters { everybody: true, ..Letters::default() };
        }
        for (user, entries) in letters.accounts {
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
        let outbox = Outbox::default();
        let one = address(1);
        let other = Address { device: DeviceNo(2), ..one };
        outbox.add(&[one, other, one], Signal::NewMessages.into());
        outbox.add(&[one], Signal::KeysLow.into());
        let letters = outbox.take(10);
        let both = Signals::from(Signal::NewMessages).and(Signal::KeysLow.into());
        assert_eq!(letters.accounts[&one.user], [(DeviceNo(1), both), (DeviceNo(2), Signal::NewMessages.into())]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn what_is_not_confirmed_waits_again_with_what_came_meanwhile() {
        let outbox = Outbox::default();
        let (one, other) = (address(1), address(2));
        outbox.add(&[one], Signal::NewMessages.into());
        outbox.take(10);
        outbox.add(&[one, other], Signal::AuthChanged.into());
        outbox.put_back();
        let letters = outbox.take(10);
        let both = Signals::from(Signal::NewMessages).and(Signal::AuthChanged.into());
        assert_eq!(letters.accounts[&one.user], [(DeviceNo(1), both)]);
        assert_eq!(letters.accounts[&other.user], [(DeviceNo(2), Signal::AuthChanged.into())]);
    }

    #[test]
    fn what_is_confirmed_does_not_come_back() {
        let outbox = Outbox::default();
        outbox.add(&[address(1)], Signal::NewMessages.into());
        outbox.take(10);
        outbox.confirm();
        outbox.put_back();
        assert!(outbox.is_empty());
    }

    #[test]
    fn it_is_handed_out_in_parts() {
        let outbox = Outbox::default();
        (0..25).for_each(|device| outbox.add(&[address(device)], Signal::NewMessages.into()));
        let sizes = [(); 4].map(|()| {
            let letters = outbox.take(10);
            outbox.confirm();
            letters.messages().count()
        });
        assert_eq!(sizes, [10, 10, 5, 0]);
    }

    #[test]
    fn past_its_bound_it_becomes_one_word_to_everybody() {
        let outbox = Outbox::default();
        (0..BOUND as i64).for_each(|device| outbox.add(&[address(device)], Signal::NewMessages.into()));
        assert!(!outbox.take(1).everybody);
        outbox.put_back();
        let one = address(-1);
        outbox.add(&[one], Signal::NewMessages.into());
        let letters = outbox.take(10);
        assert!(letters.everybody && letters.accounts.is_empty());
        // And it is not forgotten before it is confirmed.
        outbox.add(&[one], Signal::NewMessages.into());
        outbox.put_back();
        assert!(outbox.take(10).everybody);
        outbox.confirm();
        outbox.add(&[one], Signal::NewMessages.into());
        assert_eq!(outbox.take(10).messages().count(), 1);
    }

    #[test]
    fn traces_go_once_and_a_bounded_number_of_them() {
        let outbox = Outbox::default();
        let (one, trail) = (address(1), Trail::from_bytes(&[7; Trail::BYTES]).unwrap());
        (0..2 * TRAILS).for_each(|_| outbox.lay_trail(&[one, one], trail));
        assert!(outbox.is_empty(), "a trace alone is no reason to send");
        outbox.add(&[one], Signal::NewMessages.into());
        assert_eq!(outbox.take(10).trails.len(), TRAILS);
        outbox.put_back();
        let letters = outbox.take(10);
        assert_eq!((letters.trails.len(), letters.messages().count()), (0, 1));
    }

    #[tokio::test]
    async fn whoever_waits_for_it_is_told_when_it_fills() {
        let outbox = Outbox::default();
        assert!(outbox.filled().now_or_never().is_none());
        let mut filled = Box::pin(outbox.filled());
        assert!(futures_util::poll!(&mut filled).is_pending());
        outbox.add(&[address(1)], Signal::NewMessages.into());
        filled.await;
        outbox.filled().await;
    }
}
