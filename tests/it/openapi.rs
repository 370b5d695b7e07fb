//! `openapi.yaml` agrees with the router and with itself.

mod answers;
mod document;
mod observed;
mod protobuf;
mod recorder;
mod requests;
mod schema;

use std::collections::{BTreeMap, BTreeSet};

use obscura_server::api::ROUTES;
use serde_json::Value;

use crate::harness::TestServer;
use document::{DOCUMENT, TEXT, component, members, operations, resolve};
use schema::validate;

pub use observed::{Answer, assert_documented};

/// Responses that no operation names, because every path has them. The introduction of the document tells of them.
const EVERYWHERE: [&str; 2] = ["#/components/responses/NotFound", "#/components/responses/MethodNotAllowed"];

#[test]
fn the_document_has_exactly_the_routes_of_the_router_with_exactly_their_statuses() {
    let table = ROUTES.iter().map(|route| {
        let statuses: BTreeSet<u16> = route.statuses.iter().copied().collect();
        assert_eq!(statuses.len(), route.statuses.len(), "{} {} has a status twice", route.method, route.path);
        ((route.method.to_owned(), route.path), statuses)
    });
    let table: BTreeMap<_, _> = table.collect();
    assert_eq!(table.len(), ROUTES.len(), "a route stands in the table twice");
    let documented: BTreeMap<_, _> = operations()
        .into_iter()
        .map(|operation| ((operation.method.clone(), operation.path), operation.statuses()))
        .collect();
    for route in table.keys().chain(documented.keys()) {
        assert_eq!(table.get(route), documented.get(route), "{route:?}: the table of routes, and openapi.yaml");
    }
}

/// It is served as `text/yaml` without an encoding, so programs may read it as Latin-1.
#[test]
fn the_document_is_plain_ascii() {
    let other = TEXT.lines().find(|line| !line.is_ascii());
    assert_eq!(other, None);
}

#[test]
fn every_operation_is_limited() {
    for route in ROUTES {
        assert!(route.statuses.contains(&429), "{} {}", route.method, route.path);
    }
}

#[test]
fn the_document_names_itself_and_the_version_of_the_server() {
    let version = format!("version: {}\n", env!("CARGO_PKG_VERSION"));
    for line in ["openapi: 3.0.3\n", "title: Obscura Server API\n", &version] {
        assert!(TEXT.contains(line), "{line}");
    }
    assert_eq!(DOCUMENT["openapi"], "3.0.3");
    assert_eq!(DOCUMENT["info"]["title"], "Obscura Server API");
    assert_eq!(DOCUMENT["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn operations_name_the_varying_segments_of_their_paths() {
    for operation in operations() {
        let in_path = operation.path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
        let parameters = operation.parameters("path");
        assert!(parameters.iter().all(|parameter| parameter["required"] == true), "{}", operation.path);
        let named = parameters.iter().map(|parameter| parameter["name"].as_str().expect("a name"));
        assert_eq!(named.collect::<Vec<_>>(), in_path.collect::<Vec<_>>(), "{}", operation.path);
    }
}

#[test]
fn operations_have_distinct_names_and_known_tags() {
    let ids: BTreeSet<_> =
        operations().iter().map(|operation| operation.definition["operationId"].to_string()).collect();
    assert_eq!(ids.len(), operations().len());
    let used = operations().into_iter().flat_map(|operation| operation.definition["tags"].as_array().expect("tags"));
    let known = DOCUMENT["tags"].as_array().expect("tags").iter().map(|tag| tag["name"].to_string());
    assert_eq!(used.map(Value::to_string).collect::<BTreeSet<_>>(), known.collect());
}

#[test]
fn every_response_documents_its_headers() {
    let of_operations = operations().into_iter().flat_map(|operation| {
        let responses = members(&operation.definition["responses"]);
        responses.map(|(status, response)| (status.parse().expect("a status"), resolve(response))).collect::<Vec<_>>()
    });
    let everywhere = EVERYWHERE.iter().zip([404, 405]).map(|(reference, status)| (status, component(reference)));
    for (status, response) in of_operations.chain(everywhere) {
        let expected: &[&str] = match status {
            405 => &["x-request-id", "allow"],
            429 => &["x-request-id", "retry-after", "x-ratelimit-after"],
            503 => &["x-request-id", "retry-after"],
            _ => &["x-request-id"],
        };
        for name in expected {
            let header = response["headers"].get(name).map(resolve);
            let is_required = header.is_some_and(|header| header["required"] == true);
            assert!(is_required, "{status} ({}) lacks the header {name}", response["description"]);
        }
        if status >= 400 {
            let schema = &response["content"]["application/json"]["schema"]["$ref"];
            assert_eq!(schema, "#/components/schemas/Error", "{status} ({})", response["description"]);
        }
    }
}

#[test]
fn every_component_is_used_and_every_reference_leads_to_one() {
    let mut to_visit = vec![&DOCUMENT["paths"]];
    to_visit.extend(EVERYWHERE.map(component));
    let mut used: BTreeSet<String> = EVERYWHERE.map(str::to_owned).into();
    while let Some(value) = to_visit.pop() {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(reference)) = object.get("$ref") {
                    assert_eq!(object.len(), 1, "what stands beside {reference} is ignored");
                    if used.insert(reference.clone()) {
                        to_visit.push(component(reference));
                    }
                }
                to_visit.extend(object.values());
            }
            Value::Array(items) => to_visit.extend(items),
            _ => {}
        }
    }
    let names = |kind: &str| members(&DOCUMENT["components"][kind]).map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let kinds = members(&DOCUMENT["components"]).map(|(kind, _)| kind).filter(|kind| *kind != "securitySchemes");
    let defined = kinds.flat_map(|kind| names(kind).into_iter().map(move |name| format!("#/components/{kind}/{name}")));
    assert_eq!(used, defined.collect());

    let schemes = operations().into_iter().flat_map(|operation| {
        let security = operation.definition["security"].as_array().expect("an operation says who may call it");
        security.iter().flat_map(members).map(|(name, _)| name.clone()).collect::<Vec<_>>()
    });
    assert_eq!(schemes.collect::<BTreeSet<_>>(), names("securitySchemes").into_iter().collect());
}

#[test]
fn every_example_fits_its_schema() {
    let mut count = 0;
    check_examples("", &DOCUMENT, &mut count);
    assert!(count > 50, "only {count} examples were found");
}

/// Examples stand beside a schema or in one.
fn check_examples(at: &str, value: &Value, count: &mut usize) {
    let schema = value.get("schema").unwrap_or(value);
    let many = members(value.get("examples").unwrap_or(&Value::Null)).map(|(_, example)| &example["value"]);
    for example in value.get("example").into_iter().chain(many) {
        validate(schema, example).unwrap_or_else(|error| panic!("{at}: {error}"));
        *count += 1;
    }
    for (name, member) in members(value).filter(|(name, _)| !name.starts_with("example")) {
        check_examples(&format!("{at}/{name}"), member, count);
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check_examples(&format!("{at}/{index}"), item, count);
    }
}

#[tokio::test]
async fn operations_need_an_access_token_where_the_document_says_so() {
    let server = TestServer::start().await;
    for operation in operations() {
        let needs_token = operation.definition["security"] == serde_json::json!([{ "bearer": [] }]);
        let response = server.client().request(&operation.method, operation.path).send().await;
        assert_eq!(response.status == 401, needs_token, "{} {}", operation.method, operation.path);
        assert!(!needs_token || operation.statuses().contains(&401), "{} {}", operation.method, operation.path);
    }
}
