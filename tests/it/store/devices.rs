//! Devices in the store.
