//! Link sessions in the store.
