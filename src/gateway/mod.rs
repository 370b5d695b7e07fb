//! One task for each open socket: delivers the inbox of its device and takes its acks.

mod acks;
mod end;
mod features;
mod inflight;
mod inflow;
mod look;
mod pace;
mod pings;
mod pipe;
mod session;
mod trail;

pub use features::Features;
pub use pipe::{LATE, Progress, limited};
pub use session::run;
