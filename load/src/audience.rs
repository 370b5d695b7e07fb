//! Whom a sender writes to, one after the other.

use std::sync::Arc;

use crate::people::Device;
use crate::wire::{DeviceMessage, Label};

/// Devices, and which of them one send is for. Cloning gives the same.
#[derive(Clone)]
pub struct Audience {
    pub devices: Arc<[Device]>,
    /// Numbers of devices. Those of one account stand next to each other.
    sets: Arc<[Vec<usize>]>,
}

impl Audience {
    /// Each send is for one device.
    pub fn singly(devices: Vec<Device>) -> Self {
        Self::in_groups(devices, 1)
    }

    /// Each send is for so many devices, of as many accounts.
    pub fn in_groups(devices: Vec<Device>, size: usize) -> Self {
        let count = devices.len();
        let set = |first| (first..first + size.min(count)).map(|n| n % count).collect();
        Self { sets: (0..count).map(set).collect(), devices: devices.into() }
    }

    /// Each send is for all devices of one account.
    pub fn by_account(accounts: Vec<Vec<Device>>) -> Self {
        let mut next = 0;
        let mut set = |account: &Vec<Device>| {
            let first = next;
            next += account.len();
            (first..next).collect()
        };
        Self { sets: accounts.iter().map(&mut set).collect(), devices: accounts.concat().into() }
    }

    /// The devices of send number `turn`. Senders that begin at different places spread over all of them.
    pub fn set(&self, turn: usize) -> &[usize] {
        &self.sets[turn % self.sets.len()]
    }

    pub fn sets(&self) -> usize {
        self.sets.len()
    }

    /// How many devices a send is for.
    pub fn size(&self) -> usize {
        self.sets.first().map_or(1, Vec::len)
    }

    /// A message to device number `n`.
    pub fn device_message(&self, n: usize, label: Label) -> DeviceMessage<'_> {
        DeviceMessage::to(&self.devices[n], label)
    }
}
