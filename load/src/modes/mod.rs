//! One file for each thing that is measured.

pub mod attachments;
pub mod attack;
pub mod drain;
pub mod growth;
pub mod idle;
pub mod mixed;
pub mod register;
pub mod relay;
pub mod send;
pub mod start;
