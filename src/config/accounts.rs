//! The settings about accounts as such.

use std::time::Duration;

/// Limits for sign-ups, wrong passwords and uploads, and how long unused accounts stay. A rate of 0 is no limit.
#[derive(Clone, Debug)]
pub struct Accounts {
    /// Sign-ups on this node in an hour, from all addresses together; also all at once.
    pub sign_ups_per_hour: u32,
    /// Sign-ups from one address (IPv6: a /64) in a day; also all at once.
    pub sign_ups_per_address: u32,
    /// Sign-ups from one network (IPv4: a /24, IPv6: a /48) in a day; also all at once.
    pub sign_ups_per_network: u32,
    /// Wrong passwords for one account in an hour …
    pub wrong_passwords_per_hour: u32,
    /// … and at once.
    pub wrong_passwords_burst: u32,
    /// Uploads that an account may begin in a second …
    pub uploads_per_second: u32,
    /// … and at once.
    pub uploads_burst: u32,
    /// Those that have been used, in whole days; zero means for ever.
    pub idle: Duration,
    /// Those that have not been used since their sign-up, in whole days; zero means for ever.
    pub unused: Duration,
}
