//! Registering and resetting.
