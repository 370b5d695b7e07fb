//! Sessions in the store.
