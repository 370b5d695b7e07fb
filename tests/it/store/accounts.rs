//! Accounts in the store.
