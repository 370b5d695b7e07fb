//! One task for each open socket: delivers the inbox of its device and takes its acks.

mod acks;
mod database_read;
mod features;
mod frame_pacer;
mod frame_socket;
mod framing;
mod inflight;
mod memory;
mod pings;
mod progress;
mod read_limiter;
mod session;
mod session_end;
mod socket;
mod trace_links;

pub use features::Features;
pub use frame_socket::SUSPENDED_AFTER;
pub use progress::ConnectionProgress;
pub use session::run;
pub use socket::Connection;
