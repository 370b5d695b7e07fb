//! The real program and its collector.
