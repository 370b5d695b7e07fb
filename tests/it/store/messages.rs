//! The inboxes in the store.
