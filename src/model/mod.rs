//! Plain values of the domain. No I/O, no HTTP, no SQL statements.

pub mod ids;
pub mod keys;
pub mod link_proof;
pub mod message;
pub mod push;
pub mod xeddsa;
