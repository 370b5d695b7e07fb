//! Contract tests of the store. Every method is named in here by at least one of them. `fixture` opens a
//! store, `support` makes accounts in it that have keys of their own.

mod accounts;
mod attachments;
mod corrections;
mod database;
mod devices;
mod fixture;
mod inbox_limits;
mod inventory;
mod jobs;
mod leftovers;
mod links;
mod messages;
mod prekeys;
mod pushes;
mod races;
mod sessions;
mod support;
mod time;
mod usage;
