//! Rate limits and client addresses.
