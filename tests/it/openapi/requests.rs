//! The JSON that handlers take is the JSON that the document asks for.

use std::collections::BTreeSet;

use axum::extract::State;
use obscura_server::api::extract::Json;
use obscura_server::api::gateway::ConnectQuery;
use obscura_server::api::{accounts, devices, keys, links, push_token, sessions};
use obscura_server::app::App;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::document::{members, operation, operations};
use super::recorder::{Structs, structs_of};
use super::schema::{Objects, flat, is_nullable, objects, required, sample};

/// Reads a body as the server does, and tells of what structs it consists.
type Read = fn(&Value) -> Result<Structs, String>;

/// Every handler that takes JSON.
fn requests() -> Vec<(&'static str, &'static str, Read)> {
    vec![
        ("POST", "/v1/users", body_of(accounts::register)),
        ("POST", "/v1/users/reset", body_of(accounts::reset)),
        ("POST", "/v1/session", body_of(sessions::log_in)),
        ("POST", "/v1/session/refresh", body_of(sessions::refresh)),
        ("POST", "/v1/link-sessions", body_of(links::open)),
        ("POST", "/v1/devices", body_of(devices::link)),
        ("POST", "/v1/keys", body_of(keys::refill)),
        ("PUT", "/v1/push-token", body_of(push_token::put)),
    ]
}

/// A handler whose last argument is a JSON body.
trait TakesJson<Arguments> {
    type Body: DeserializeOwned;
}

impl<H, R, T> TakesJson<(T,)> for H
where
    H: Fn(State<App>, Json<T>) -> R,
    T: DeserializeOwned,
{
    type Body = T;
}

impl<H, R, A, T> TakesJson<(A, T)> for H
where
    H: Fn(State<App>, A, Json<T>) -> R,
    T: DeserializeOwned,
{
    type Body = T;
}

fn body_of<Arguments, H: TakesJson<Arguments>>(_: H) -> Read {
    read::<H::Body>
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<Structs, String> {
    serde_json::from_str::<T>(&value.to_string()).map_err(|error| error.to_string())?;
    structs_of::<T>(value)
}

#[test]
fn the_handlers_that_take_json_are_those_of_the_document() {
    let documented = operations().into_iter().filter(|operation| operation.json_request().is_some());
    let documented: BTreeSet<_> = documented.map(|operation| (operation.method, operation.path)).collect();
    let handlers = requests().into_iter().map(|(method, path, _)| (method.to_owned(), path)).collect();
    assert_eq!(documented, handlers);
}

#[test]
fn request_bodies_have_exactly_the_members_of_their_schemas() {
    for (method, path, read) in requests() {
        let schema = operation(method, path).and_then(|operation| operation.json_request()).expect("a schema");
        let structs = read(&sample(schema)).unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let names = |fields: &[&str]| fields.iter().map(|&name| name.to_owned()).collect();
        let structs: Objects = structs.into_iter().map(|(at, fields)| (at, names(fields))).collect();
        assert_eq!(structs, objects(schema), "{method} {path}");
    }
}

#[test]
fn the_members_of_request_bodies_may_be_what_their_schemas_say() {
    for (method, path, read) in requests() {
        let schema = operation(method, path).and_then(|operation| operation.json_request()).expect("a schema");
        let probe = Probe { what: format!("{method} {path}"), read, whole: sample(schema) };
        probe.value("", schema);
    }
}

#[test]
fn the_query_of_the_gateway_has_exactly_the_parameters_of_the_document() {
    let gateway = operation("GET", "/v1/gateway").expect("an operation");
    let parameters = gateway.parameters("query");
    let names: Vec<&str> = parameters.iter().map(|parameter| parameter["name"].as_str().expect("a name")).collect();
    let query: Value = names.iter().map(|&name| (name.to_owned(), json!("text"))).collect();
    assert_eq!(structs_of::<ConnectQuery>(&query).unwrap()[""], names);
    for parameter in parameters {
        let mut without = query.clone();
        without.as_object_mut().unwrap().remove(parameter["name"].as_str().unwrap());
        assert_eq!(structs_of::<ConnectQuery>(&without).is_err(), parameter["required"] == true);
    }
}

/// A body that is read, and read again with a change in one place.
struct Probe {
    what: String,
    read: Read,
    whole: Value,
}

impl Probe {
    /// Tries what may and what may not stand at this JSON pointer, and below it.
    fn value(&self, at: &str, schema: &Value) {
        let schema = flat(schema);
        let kind = schema["type"].as_str().expect("a type");
        let format = schema.get("format").map_or("", |format| format.as_str().expect("a format"));
        let candidates = [
            (json!(null), is_nullable(&schema)),
            (json!(true), kind == "boolean"),
            (json!("text"), kind == "string" && format != "uuid"),
            (json!("0193a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b"), kind == "string"),
            (json!("1"), kind == "string" && format != "uuid"),
            (json!(1), kind == "integer"),
            (json!(1.0), false),
            (json!(1.5), false),
            (json!(i32::MIN), kind == "integer"),
            (json!(i32::MAX), kind == "integer"),
            (json!(i64::from(i32::MIN) - 1), kind == "integer" && format != "int32"),
            (json!(i64::from(i32::MAX) + 1), kind == "integer" && format != "int32"),
            (json!([]), kind == "array"),
            (json!({}), kind == "object" && required(&schema).is_empty()),
        ];
        for (value, is_allowed) in candidates {
            let read = self.read_with(at, value.clone());
            assert_eq!(read.is_ok(), is_allowed, "{} with {value} at {at:?}: {read:?}", self.what);
        }
        match kind {
            "object" => self.members(at, &schema),
            "array" => self.value(&format!("{at}/0"), &schema["items"]),
            _ => {}
        }
    }

    fn members(&self, at: &str, schema: &Map<String, Value>) {
        self.refuses_a_list(at);
        for (name, member) in members(&schema["properties"]) {
            let mut without = self.whole.pointer(at).expect("an object").clone();
            without.as_object_mut().expect("an object").remove(name);
            match self.read_with(at, without) {
                Ok(_) => assert!(!required(schema).contains(name), "{}: {at}/{name} is not required", self.what),
                Err(error) => {
                    assert!(required(schema).contains(name), "{}: {at}/{name} is required", self.what);
                    assert!(error.contains(&format!("missing field `{name}`")), "{}: {error}", self.what);
                }
            }
            self.value(&format!("{at}/{name}"), member);
        }
    }

    /// A list of the values of an object, in the order of the struct, is not that object.
    fn refuses_a_list(&self, at: &str) {
        let structs = (self.read)(&self.whole).expect("a good body");
        let object = self.whole.pointer(at).expect("an object");
        let list = structs[at].iter().map(|&name| object[name].clone()).collect();
        let read = self.read_with(at, list);
        assert!(read.is_err(), "{} takes a list at {at:?}", self.what);
    }

    /// Reads the body with something else at this JSON pointer.
    fn read_with(&self, at: &str, value: Value) -> Result<Structs, String> {
        let mut changed = self.whole.clone();
        *changed.pointer_mut(at).expect("something to change") = value;
        (self.read)(&changed)
    }
}
