//! Authentication: passwords and tokens.

pub mod passwords;
pub mod tokens;
