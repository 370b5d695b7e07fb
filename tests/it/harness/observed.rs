//! What the tests have seen the server answer, all of it held against the table of routes and `openapi.yaml`.

use std::collections::BTreeSet;
use std::sync::Mutex;

use crate::openapi::{Answer, assert_documented};

/// A method, a route template and a status that some test has met.
type Seen = (&'static str, &'static str, u16);

static OBSERVED: Mutex<BTreeSet<Seen>> = Mutex::new(BTreeSet::new());

/// Everything answered so far in this process.
pub fn observed() -> BTreeSet<Seen> {
    OBSERVED.lock().unwrap().clone()
}

/// Notes an answer, and fails the test if the contract doesn't allow it.
pub fn record(method: &str, path: &str, answer: &Answer) {
    if let Some(route) = assert_documented(method, path, answer) {
        OBSERVED.lock().unwrap().insert((route.method, route.path, answer.status));
    }
}
