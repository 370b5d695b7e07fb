//! Contract tests of the store. Every method is named in here by at least one of them. `support` opens a store and makes
//! accounts in it.

mod accounts;
mod attachments;
mod devices;
mod fixture;
mod links;
mod messages;
mod prekeys;
mod sessions;
mod support;
