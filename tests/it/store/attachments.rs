//! Attachments in the store.
