//! `openapi.yaml`, opened for the tests.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use serde_json::Value;

/// As it is served.
pub const TEXT: &str = include_str!("../../../openapi.yaml");

/// The same, parsed.
pub static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    // By way of a YAML value, because that refuses a member that stands there twice.
    let document: serde_yaml_ng::Value = serde_yaml_ng::from_str(TEXT).expect("openapi.yaml is YAML");
    serde_json::to_value(document).expect("openapi.yaml has JSON's types")
});

/// An operation: a method of a path.
pub struct Operation {
    /// In capitals.
    pub method: String,
    /// With its varying segments in braces.
    pub path: &'static str,
    /// What stands behind the method.
    pub definition: &'static Value,
    item: &'static Value,
}

/// All operations of the document.
pub fn operations() -> Vec<Operation> {
    let mut operations = Vec::new();
    for (path, item) in members(&DOCUMENT["paths"]) {
        for (method, definition) in members(item) {
            if method != "parameters" {
                operations.push(Operation { method: method.to_uppercase(), path, definition, item });
            }
        }
    }
    operations
}

/// One of them.
pub fn operation(method: &str, path: &str) -> Option<Operation> {
    operations().into_iter().find(|operation| operation.method == method && operation.path == path)
}

impl Operation {
    /// Every status that it documents.
    pub fn statuses(&self) -> BTreeSet<u16> {
        let number = |status: &String| {
            status.parse().unwrap_or_else(|_| panic!("{} {}: {status} is not a status", self.method, self.path))
        };
        self.definition["responses"].as_object().expect("responses").keys().map(number).collect()
    }

    /// What it says about an answer with this status.
    pub fn response(&self, status: u16) -> Option<&'static Value> {
        self.definition["responses"].get(status.to_string()).map(resolve)
    }

    /// Its parameters of one kind: `path`, `query` or `header`.
    pub fn parameters(&self, kind: &str) -> Vec<&'static Value> {
        let of = |place: &'static Value| place["parameters"].as_array().into_iter().flatten().map(resolve);
        of(self.item).chain(of(self.definition)).filter(|parameter| parameter["in"] == kind).collect()
    }

    /// The schema of its JSON body, if it takes one.
    pub fn json_request(&self) -> Option<&'static Value> {
        self.definition.pointer("/requestBody/content/application~1json/schema")
    }

    /// The schema of the JSON body of this answer, if it has one.
    pub fn json_response(&self, status: u16) -> Option<&'static Value> {
        self.response(status)?.pointer("/content/application~1json/schema")
    }
}

/// What a reference points to, or the value itself when it is none.
pub fn resolve(value: &Value) -> &Value {
    match value.get("$ref") {
        Some(reference) => component(reference.as_str().expect("a reference is text")),
        None => value,
    }
}

/// What `#/components/…` points to.
pub fn component(reference: &str) -> &'static Value {
    let pointer = reference.strip_prefix('#').unwrap_or_else(|| panic!("{reference} leaves the document"));
    let found = DOCUMENT.pointer(pointer).unwrap_or_else(|| panic!("{reference} points nowhere"));
    assert!(found.get("$ref").is_none(), "{reference} points to another reference");
    found
}

/// The members of an object.
pub fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}
