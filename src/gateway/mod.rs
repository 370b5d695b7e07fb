//! One task for each open socket: delivers the inbox of its device and takes its acks.

mod acks;
mod end;
mod features;
mod framing;
mod inflight;
mod inflow;
mod look;
mod memory;
mod pace;
mod pings;
mod pipe;
mod progress;
mod session;
mod socket;
mod trace_links;

pub use features::Features;
pub use pipe::LATE;
pub use progress::Progress;
pub use session::run;
pub use socket::Connection;
