//! The settings of the push providers.

use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

/// Firebase Cloud Messaging. Without credentials its pushes are only logged.
#[derive(Clone, Debug)]
pub struct Fcm {
    /// Project; without it, the one of the credentials.
    pub project_id: Option<String>,
    /// Service account key, a JSON file.
    pub credentials_file: Option<PathBuf>,
    /// How long a provider, whichever it is, keeps a push for a phone it cannot reach.
    pub ttl: Duration,
    /// Where the service is.
    pub endpoint: String,
}

/// The Apple Push Notification service. Without a key its pushes are only logged.
#[derive(Clone, Debug)]
pub struct Apns {
    /// Signing key, a `.p8` file. It needs the next three.
    pub key_file: Option<PathBuf>,
    /// Apple's name of the key.
    pub key_id: Option<String>,
    /// Apple's name of the developer.
    pub team_id: Option<String>,
    /// The app, by its bundle id.
    pub topic: Option<String>,
    /// Where the service is.
    pub endpoint: String,
}

/// Web Push and UnifiedPush.
#[derive(Clone, Debug)]
pub struct WebPush {
    /// `mailto:` or `https:`, where the operator of a push service can reach the operator of this server.
    pub contact: Option<String>,
    /// Networks that are not public in which endpoints may be called all the same; usually empty.
    pub allowed_networks: Vec<IpNet>,
    /// Certificates, beside those of the system, that a push provider may be signed by.
    pub ca_file: Option<PathBuf>,
}
