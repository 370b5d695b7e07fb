//! Every flag and variable, grouped; the only place that reads the environment.
//!
//! `table` lists the options, `option` says what one is, `given` finds what was given and checks it, `groups` are the
//! typed settings that the rest of the server sees, `read` fills them in.

mod accounts;
mod given;
mod groups;
mod option;
mod push;
mod read;
mod reference;
mod secret;
mod table;

pub use accounts::Accounts;
pub use given::ConfigError;
pub use groups::{
    AccountRates, Attachments, Auth, Config, Database, Gateway, Grouping, Health, LogFormat, Messaging, Notifications,
    Prekeys, Pubsub, RateLimits, Server, Telemetry,
};
pub use option::{Group, Opt, Takes, Value};
pub use push::{Apns, Fcm, WebPush};
pub use read::{Loaded, environment};
pub use reference::reference_page;
pub use secret::{KEPT_SECRET, Secret};
pub use table::GROUPS;
