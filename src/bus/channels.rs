//! Whose channels this node needs: those of the accounts with a session here.
//!
//! A session that subscribes reads at once. If its account's channel is confirmed only later, the session is woken once
//! more then, so that it sees what was signalled in between.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::model::ids::{Address, DeviceNo, UserId};

#[derive(Default)]
pub(super) struct ChannelSubscriptions {
    state: Mutex<State>,
    wanted: Notify,
}

#[derive(Default)]
struct State {
    channels: HashMap<UserId, Channel>,
    /// Accounts whose channels have to be subscribed.
    wanted: HashSet<UserId>,
}

#[derive(Default)]
struct Channel {
    /// One for each session.
    devices: Vec<DeviceNo>,
    is_confirmed: bool,
}

/// A session that listens. Dropping it ends that; its channel is kept until the next [`ChannelSubscriptions::remove_unused`].
pub(super) struct ChannelSubscription {
    address: Address,
    channels: Arc<ChannelSubscriptions>,
}

impl ChannelSubscriptions {
    pub(super) fn add(self: &Arc<Self>, address: Address) -> ChannelSubscription {
        let mut state = self.state();
        let channel = state.channels.entry(address.user).or_default();
        channel.devices.push(address.device);
        if !channel.is_confirmed {
            state.wanted.insert(address.user);
            self.wanted.notify_one();
        }
        drop(state);
        ChannelSubscription { address, channels: self.clone() }
    }

    /// Every account that listens, for a new connection on which nothing is subscribed.
    pub(super) fn reset(&self) -> Vec<UserId> {
        let mut state = self.state();
        state.wanted.clear();
        state.channels.retain(|_, channel| !channel.devices.is_empty());
        state.channels.values_mut().for_each(|channel| channel.is_confirmed = false);
        state.channels.keys().copied().collect()
    }

    /// Ends when a channel has to be subscribed.
    pub(super) async fn wanted(&self) {
        loop {
            let wanted = self.wanted.notified();
            if !self.state().wanted.is_empty() {
                return;
            }
            wanted.await;
        }
    }

    /// At most so many accounts whose channels have to be subscribed.
    pub(super) fn take_wanted(&self, accounts: usize) -> Vec<UserId> {
        let mut state = self.state();
        if state.wanted.len() <= accounts {
            return std::mem::take(&mut state.wanted).into_iter().collect();
        }
        let some: Vec<_> = state.wanted.iter().take(accounts).copied().collect();
        some.iter().for_each(|user| {
            state.wanted.remove(user);
        });
        some
    }

    /// These channels are subscribed. Answers the devices that may have missed something.
    pub(super) fn confirm(&self, users: &[UserId]) -> Vec<DeviceNo> {
        let mut state = self.state();
        let mut devices = Vec::with_capacity(users.len());
        for user in users {
            if let Some(channel) = state.channels.get_mut(user) {
                channel.is_confirmed = true;
                devices.extend_from_slice(&channel.devices);
            }
        }
        devices
    }

    /// Forgets the accounts without sessions, and answers them.
    pub(super) fn remove_unused(&self) -> Vec<UserId> {
        let mut state = self.state();
        let left = |(user, channel): (&UserId, &Channel)| channel.devices.is_empty().then_some(*user);
        let left: Vec<_> = state.channels.iter().filter_map(left).collect();
        for user in &left {
            state.channels.remove(user);
            state.wanted.remove(user);
        }
        left
    }

    /// No code panics while it holds the state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ChannelSubscription {
    fn drop(&mut self) {
        let mut state = self.channels.state();
        let Some(channel) = state.channels.get_mut(&self.address.user) else { return };
        if let Some(place) = channel.devices.iter().position(|device| *device == self.address.device) {
            channel.devices.swap_remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn address(device: i64) -> Address {
        Address { user: UserId::random(), device: DeviceNo(device) }
    }

    #[test]
    fn only_the_first_session_of_an_account_asks_for_its_channel_and_is_woken_when_it_is_there() {
        let channels = Arc::<ChannelSubscriptions>::default();
        let one = address(1);
        let _first = channels.add(one);
        assert!(channels.wanted().now_or_never().is_some());
        assert_eq!(channels.take_wanted(10), [one.user]);
        assert_eq!(channels.confirm(&[one.user]), [one.device]);
        let _second = channels.add(Address { device: DeviceNo(2), ..one });
        assert!(channels.wanted().now_or_never().is_none());
    }

    #[test]
    fn a_session_that_comes_while_the_channel_is_being_subscribed_is_woken_too() {
        let channels = Arc::<ChannelSubscriptions>::default();
        let one = address(1);
        let _first = channels.add(one);
        channels.take_wanted(10);
        let _second = channels.add(Address { device: DeviceNo(2), ..one });
        assert_eq!(channels.confirm(&[one.user]), [DeviceNo(1), DeviceNo(2)]);
    }

    #[test]
    fn a_channel_is_kept_until_a_clean_up_finds_it_unused() {
        let channels = Arc::<ChannelSubscriptions>::default();
        let one = address(1);
        let (first, second) = (channels.add(one), channels.add(one));
        channels.confirm(&channels.take_wanted(10));
        drop(first);
        assert_eq!(channels.remove_unused(), []);
        drop(second);
        let again = channels.add(one);
        assert!(channels.wanted().now_or_never().is_none());
        drop(again);
        assert_eq!(channels.remove_unused(), [one.user]);
        let _later = channels.add(one);
        assert_eq!(channels.take_wanted(10), [one.user]);
    }

    #[test]
    fn a_new_connection_starts_with_every_account_that_listens_and_nothing_confirmed() {
        let channels = Arc::<ChannelSubscriptions>::default();
        let (one, other) = (address(1), address(2));
        let (_first, gone) = (channels.add(one), channels.add(other));
        channels.confirm(&channels.take_wanted(10));
        drop(gone);
        assert_eq!(channels.reset(), [one.user]);
        let _second = channels.add(one);
        assert_eq!(channels.take_wanted(10), [one.user]);
    }

    #[test]
    fn channels_are_asked_for_in_parts() {
        let channels = Arc::<ChannelSubscriptions>::default();
        let _all: Vec<_> = (0..25).map(|device| channels.add(address(device))).collect();
        assert_eq!([(); 4].map(|()| channels.take_wanted(10).len()), [10, 10, 5, 0]);
    }
}
