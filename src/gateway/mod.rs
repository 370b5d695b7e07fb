//! One task for each open socket: delivers the inbox of its device and takes its acks.

mod acks;
mod inflight;
mod look;
mod pipe;
mod session;
mod trail;

pub use pipe::{Progress, limited};
pub use session::run;
