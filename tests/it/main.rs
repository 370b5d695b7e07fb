//! The integration tests: one binary, its rooms mirroring those of the server.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic where it is")]
#![expect(clippy::disallowed_methods, reason = "tests own their tasks until the runtime ends")]

mod harness;

mod api;
mod architecture;
mod blobs;
mod budgets;
mod bus;
mod clock;
mod cluster;
mod commands;
mod config;
mod containers;
mod crash;
mod disk;
mod files;
mod flood;
mod gateway;
mod health;
mod management;
mod metrics;
mod openapi;
mod options;
mod postgres;
mod privacy;
mod push;
mod shutdown;
mod start;
mod store;
mod sweeps;
mod telemetry;
mod transfer;
mod upgrade;
