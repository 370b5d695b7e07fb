//! Link sessions.
