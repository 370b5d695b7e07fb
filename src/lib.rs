//! Obscura Server: a relay for the Signal Protocol.
//!
//! The rooms, in reading order. `ARCHITECTURE.md` is the map.

// Ground: plain values.
pub mod clock;
pub mod config;
pub mod model;
pub mod tasks;
pub mod telemetry;
pub mod wire;

// Middle: the rooms that hold something. They don't know each other.
pub mod auth;
pub mod blobs;
pub mod bus;
pub mod delivery;
pub mod disk;
pub mod files;
pub mod limits;
pub mod push;
pub mod store;

// Entrances: what starts work.
pub mod api;
pub mod app;
pub mod gateway;
pub mod listener;
pub mod sweeps;

// Outermost: what puts the rooms together.
pub mod commands;
pub mod server;
