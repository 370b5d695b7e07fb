//! Signals: "look again", told to the sessions of a device. A signal carries no content, may be repeated, merged or
//! lost; the database is the truth that a woken session then reads.

mod local;

use crate::model::ids::{Address, DeviceNo};

pub use local::Wakeups;

/// What to look at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Signal {
    /// There may be new mail.
    Mail = 1,
    /// There may be few one-time prekeys left.
    KeysLow = 2,
    /// The device may have been removed or logged out.
    Standing = 4,
    /// The device has opened more sockets than it may have, and this one is the oldest.
    Superseded = 8,
}

/// Everything signalled since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals(u8);

impl Signals {
    /// Whether `signal` is among them.
    pub fn has(self, signal: Signal) -> bool {
        self.0 & signal as u8 != 0
    }
}

/// Brings signals to the sessions of this process. Cloning gives the same bus.
#[derive(Clone)]
pub struct Bus {
    local: local::LocalBus,
}

impl Bus {
    /// A bus within this process. A device may have `sockets_per_device` subscriptions at once; the oldest is told
    /// to make way for one more.
    pub fn local(sockets_per_device: usize) -> Self {
        Self { local: local::LocalBus::new(sockets_per_device) }
    }

    /// Listens for signals to a device. Dropping the answer ends it.
    pub fn subscribe(&self, device: DeviceNo) -> Wakeups {
        self.local.subscribe(device)
    }

    /// Tells the sessions of these devices to look again. Best effort: it never fails the caller.
    pub async fn wake(&self, addresses: &[Address], signal: Signal) {
        for address in addresses {
            self.local.wake(address.device, signal);
        }
    }

    /// How many devices have a session here.
    pub fn listening(&self) -> usize {
        self.local.listening()
    }
}
