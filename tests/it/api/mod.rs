//! The REST contract, spoken over real HTTP: one file for each resource.

mod account_limits;
mod accounts;
mod attachments;
mod bodies;
mod cheap_checks;
mod conventions;
mod devices;
mod early;
mod inbox;
mod intake;
mod keys;
mod limits;
mod link_proofs;
mod links;
mod messages;
mod push_token;
mod refresh;
mod repeats;
mod sessions;
mod strictness;
mod timeouts;
mod tokens;
