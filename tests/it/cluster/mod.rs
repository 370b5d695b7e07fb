//! Several nodes on one PostgreSQL, one Valkey and one bucket. They need the services in every run: start the tests by
//! `scripts/services`.

mod bystanders;
mod connections;
mod deaths;
mod faults;
mod held;
mod nodes;
mod poolers;
mod replaced;
mod secrets;
pub mod traffic;
