//! The gateway, over real WebSockets.

mod acks;
mod closing;
mod concurrency;
mod delivery;
mod device_list;
mod handshake;
mod inflow;
mod liveness;
mod memory;
mod prekeys;
mod slow;
