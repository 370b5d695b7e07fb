//! What a client understands beyond the base contract. A client that names nothing gets the frames of the base contract only.

use std::mem::replace;

use bytes::Bytes;

use crate::gateway::database_read::{ReadError, with_timeout};
use crate::model::ids::{DeviceId, UserId};
use crate::store::Store;
use crate::wire;

/// The `features` that the URL of a socket names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `inbox-notice`: the client is told how many messages expired or were refused.
    pub inbox_notice: bool,
    /// `device-list`: the client is told which devices its account has.
    pub device_list: bool,
}

impl Features {
    /// Reads names that are separated by commas. Unknown ones are passed over.
    pub fn named(list: &str) -> Self {
        let mut features = Self::default();
        for name in list.split(',') {
            match name.trim() {
                "inbox-notice" => features.inbox_notice = true,
                "device-list" => features.device_list = true,
                _ => {}
            }
        }
        features
    }
}

/// The devices of the account, as the client was told on this socket.
pub(super) struct DeviceList {
    user: UserId,
    /// Empty before the first frame: an account has at least one device.
    last_sent: Vec<DeviceId>,
    /// Whether to read the list again.
    pub(super) is_wanted: bool,
}

impl DeviceList {
    pub(super) fn new(user: UserId) -> Self {
        Self { user, last_sent: Vec::new(), is_wanted: true }
    }

    /// Reads the list. Returns a frame if it is not what the client was told last.
    pub(super) async fn refresh(&mut self, store: &Store) -> Result<Option<Bytes>, ReadError> {
        let devices = with_timeout(store.devices(self.user)).await?.into_iter().map(|device| device.id).collect();
        self.is_wanted = false;
        let former = replace(&mut self.last_sent, devices);
        Ok((self.last_sent != former).then(|| wire::device_list(&self.last_sent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_found_among_unknown_ones() {
        let both = Features { inbox_notice: true, device_list: true };
        assert_eq!(Features::named("later, device-list,inbox-notice"), both);
        assert_eq!(Features::named("inbox-notice"), Features { device_list: false, ..both });
        assert_eq!(Features::named("INBOX-NOTICE,device-lists,,"), Features::default());
    }
}
