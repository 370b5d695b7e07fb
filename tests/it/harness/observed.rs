//! What the tests have seen the server answer, and whether the contract says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex};

/// Every route of the API port: method and template, as in section 3 of the contract.
pub const ROUTES: &[(&str, &str)] = &[
    ("POST", "/v1/users"),
    ("POST", "/v1/users/reset"),
    ("POST", "/v1/session"),
    ("DELETE", "/v1/session"),
    ("POST", "/v1/session/refresh"),
    ("POST", "/v1/link-sessions"),
    ("PUT", "/v1/link-sessions/{id}"),
    ("GET", "/v1/link-sessions/{id}"),
    ("POST", "/v1/devices"),
    ("GET", "/v1/devices"),
    ("DELETE", "/v1/devices/{deviceId}"),
    ("POST", "/v1/keys"),
    ("GET", "/v1/keys"),
    ("GET", "/v1/keys/{userId}"),
    ("GET", "/v1/keys/{userId}/devices/{deviceId}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/gateway/ticket"),
    ("GET", "/v1/gateway"),
    ("PUT", "/v1/push-token"),
    ("POST", "/v1/attachments"),
    ("GET", "/v1/attachments/{id}"),
    ("GET", "/openapi.yaml"),
];

/// A method, a route template and a status that some test has met.
pub type Answer = (String, String, u16);

static OBSERVED: Mutex<BTreeSet<Answer>> = Mutex::new(BTreeSet::new());

/// Everything answered so far in this process.
pub fn observed() -> BTreeSet<Answer> {
    OBSERVED.lock().unwrap().clone()
}

/// Notes an answer, and fails the test if `openapi.yaml` doesn't know it.
pub fn record(method: &str, path: &str, status: u16) {
    let Some(route) = template(method, path) else { return };
    if status != 404 && status != 405 {
        let documented = DOCUMENTED.get(&(method.to_owned(), route.to_owned()));
        let statuses = documented.unwrap_or_else(|| panic!("openapi.yaml has no {method} {route}"));
        assert!(statuses.contains(&status), "openapi.yaml doesn't document {status} for {method} {route}");
    }
    OBSERVED.lock().unwrap().insert((method.to_owned(), route.to_owned(), status));
}

/// The template of a path that this method has, if there is one. A literal segment wins over a varying one.
fn template(method: &str, path: &str) -> Option<&'static str> {
    let method = if method == "HEAD" { "GET" } else { method };
    let path = path.split('?').next().unwrap_or_default();
    let segments: Vec<&str> = path.split('/').collect();
    let matches = |template: &str| {
        let expected: Vec<&str> = template.split('/').collect();
        expected.len() == segments.len()
            && expected.iter().zip(&segments).all(|(e, s)| e == s || (e.starts_with('{') && !s.is_empty()))
    };
    let candidates = ROUTES.iter().filter(|(m, template)| *m == method && matches(template));
    candidates.map(|(_, template)| *template).min_by_key(|template| template.matches('{').count())
}

static DOCUMENTED: LazyLock<BTreeMap<(String, String), BTreeSet<u16>>> = LazyLock::new(|| {
    let text = include_str!("../../../openapi.yaml");
    let document: serde_json::Value = serde_yaml_ng::from_str(text).expect("openapi.yaml is YAML");
    let mut documented = BTreeMap::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let Some(responses) = operation["responses"].as_object() else { continue };
            let statuses = responses.keys().map(|status| status.parse().expect("a status")).collect();
            documented.insert((method.to_uppercase(), path.clone()), statuses);
        }
    }
    documented
});
