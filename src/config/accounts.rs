//! The settings about accounts as such.

use std::time::Duration;

/// How long accounts stay without a use.
#[derive(Clone, Debug)]
pub struct Accounts {
    /// Those that have been used, in whole days; zero means for ever.
    pub idle: Duration,
    /// Those that have not been used since their sign-up, in whole days; zero means for ever.
    pub unused: Duration,
}
