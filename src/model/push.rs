//! How a device can be woken.

use std::fmt;

/// Where a push for a device goes. Its `Debug` form shows no token.
#[derive(Clone, PartialEq, Eq)]
pub enum PushTarget {
    /// Firebase Cloud Messaging, by its token.
    Fcm(String),
    /// The Apple Push Notification service, by its token.
    Apns(String),
    /// A Web Push (or UnifiedPush) subscription.
    WebPush(Subscription),
}

/// A Web Push subscription.
#[derive(Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The URL that a push is posted to.
    pub endpoint: String,
    /// The subscriber's public key, an uncompressed point of P-256.
    pub p256dh: Vec<u8>,
    /// The subscriber's secret, 16 bytes.
    pub auth: Vec<u8>,
}

impl PushTarget {
    /// What the provider knows the device by.
    pub fn token(&self) -> &str {
        match self {
            Self::Fcm(token) | Self::Apns(token) => token,
            Self::WebPush(subscription) => &subscription.endpoint,
        }
    }
}

impl fmt::Debug for PushTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fcm(_) => "Fcm(…)",
            Self::Apns(_) => "Apns(…)",
            Self::WebPush(_) => "WebPush(…)",
        })
    }
}
