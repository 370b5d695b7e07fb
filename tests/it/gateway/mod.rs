//! The gateway, over real WebSockets.

mod acks;
mod closing;
mod concurrency;
mod delivery;
mod device_list;
mod handshake;
mod liveness;
mod memory;
mod prekeys;
mod read_limiter;
mod slow;
