//! What tests see the server answer is held against the table of routes and the document.

use axum::http::HeaderMap;
use obscura_server::api::{ROUTES, Route};
use serde_json::Value;

use super::document::{component, members, operation};
use super::schema::{flat, validate};

/// What HTTP itself puts on an answer.
const HEADERS_OF_HTTP: [&str; 5] = ["connection", "content-length", "content-type", "date", "transfer-encoding"];

/// An answer of the API port.
pub struct Answer<'a> {
    pub status: u16,
    pub headers: &'a HeaderMap,
    /// Unless there can be none, as after a HEAD.
    pub body: Option<&'a [u8]>,
}

/// Fails the test if this is not an answer that the document allows. Gives the route that was asked, if there is one.
pub fn assert_documented(method: &str, path: &str, answer: &Answer) -> Option<&'static Route> {
    let what = format!("{method} {path} -> {}", answer.status);
    let path = path.split('?').next().unwrap_or_default();
    let asked = if method == "HEAD" { "GET" } else { method };
    let routes: Vec<&Route> = ROUTES.iter().filter(|route| matches(route.path, path)).collect();
    let route = routes.iter().find(|route| route.method == asked).copied();
    let response = match route {
        Some(route) => {
            assert!(route.statuses.contains(&answer.status), "{what} is not in the table of routes");
            let operation = operation(route.method, route.path);
            operation.and_then(|operation| operation.response(answer.status))
        }
        // The document says it once for all: an unknown path, or a method that the path doesn't have.
        None => match answer.status {
            404 if routes.is_empty() => Some(component("#/components/responses/NotFound")),
            405 if !routes.is_empty() => Some(component("#/components/responses/MethodNotAllowed")),
            429 => Some(component("#/components/responses/TooManyRequests")),
            _ => None,
        },
    };
    let response = response.unwrap_or_else(|| panic!("{what} is not in openapi.yaml"));
    check(&what, response, answer);
    route
}

/// Whether the path has this form. A literal segment never stands beside a varying one in our table.
fn matches(template: &str, path: &str) -> bool {
    let (template, path) = (template.split('/'), path.split('/'));
    template.clone().count() == path.clone().count()
        && template
            .zip(path)
            .all(|(expected, given)| expected == given || (expected.starts_with('{') && !given.is_empty()))
}

/// Fails the test unless headers and body are as this response object says.
pub fn check(what: &str, response: &Value, answer: &Answer) {
    check_headers(what, &response["headers"], answer.headers);
    let content_type = answer.headers.get("content-type").map(|value| value.to_str().expect("a content type"));
    let content = response.get("content");
    assert_eq!(content.is_some(), content_type.is_some(), "{what}: content-type is {content_type:?}");
    let (Some(content), Some(content_type)) = (content, content_type) else {
        assert!(answer.body.is_none_or(<[u8]>::is_empty), "{what} has a body");
        return;
    };
    let content = content.get(content_type).unwrap_or_else(|| panic!("{what}: content-type is {content_type}"));
    if let ("application/json", Some(body)) = (content_type, answer.body) {
        let body = serde_json::from_slice(body).unwrap_or_else(|error| panic!("{what}: {error}"));
        validate(&content["schema"], &body).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

fn check_headers(what: &str, documented: &Value, headers: &HeaderMap) {
    for (name, value) in headers {
        let value = value.to_str().unwrap_or_default();
        match documented.get(name.as_str()).map(super::document::resolve) {
            Some(header) => validate(&header["schema"], &header_value(&header["schema"], value))
                .unwrap_or_else(|error| panic!("{what}: {name}: {error}")),
            None => assert!(HEADERS_OF_HTTP.contains(&name.as_str()), "{what}: {name}: {value} is not in openapi.yaml"),
        }
    }
    for (name, header) in members(documented) {
        let is_required = super::document::resolve(header)["required"] == true;
        assert!(!is_required || headers.contains_key(name), "{what} lacks the header {name}");
    }
}

/// A header is text, but its schema may say that the text is a number.
fn header_value(schema: &Value, text: &str) -> Value {
    match flat(schema)["type"].as_str() {
        Some("integer") => text.parse::<i64>().map_or_else(|_| text.into(), Value::from),
        _ => text.into(),
    }
}
