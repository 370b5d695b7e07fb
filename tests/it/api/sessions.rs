//! Logging in, refreshing, logging out.
