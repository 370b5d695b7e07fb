//! Prekeys in the store.
