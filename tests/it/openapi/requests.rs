//! The JSON that handlers take is the JSON that the document asks for.

use std::collections::BTreeSet;

use axum::extract::{FromRequest, Request, State};
use futures_util::FutureExt;
use obscura_server::api::clients::AdmittedRequest;
use obscura_server::api::error::ApiError;
use obscura_server::api::extract::Json;
use obscura_server::api::gateway::ConnectQuery;
use obscura_server::api::{accounts, devices, keys, links, push_token, sessions};
use obscura_server::app::App;
use obscura_server::limits::LimitSubject;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::document::{members, operation, operations};
use super::recorder::{Structs, structs_of};
use super::schema::{Objects, flat, is_nullable, objects, required, sample};
use crate::harness::TestServer;

/// Reads a body as the server does, and tells of what structs it consists.
type Read = fn(&App, &Value) -> Result<Structs, ApiError>;

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

impl<H, R, A, B, T> TakesJson<(A, B, T)> for H
where
    H: Fn(State<App>, A, B, Json<T>) -> R,
    T: DeserializeOwned,
{
    type Body = T;
}

fn body_of<Arguments, H: TakesJson<Arguments>>(_: H) -> Read {
    read::<H::Body>
}

fn read<T: DeserializeOwned>(app: &App, value: &Value) -> Result<Structs, ApiError> {
    let admitted = AdmittedRequest { subject: LimitSubject::Exempt, client: None, max_body: 1 << 20 };
    let request = Request::builder().header("content-type", "application/json").extension(admitted);
    let request = request.body(value.to_string().into());
    let reading = Json::<T>::from_request(request.expect("a request"), app);
    reading.now_or_never().expect("a body that is here already")?;
    Ok(structs_of::<T>(value).expect("the same as the server reads"))
}

#[test]
fn the_handlers_that_take_json_are_those_of_the_document() {
    let documented = operations().into_iter().filter(|operation| operation.json_request().is_some());
    let documented: BTreeSet<_> = documented.map(|operation| (operation.method, operation.path)).collect();
    let handlers = requests().into_iter().map(|(method, path, _)| (method.to_owned(), path)).collect();
    assert_eq!(documented, handlers);
}

#[tokio::test]
async fn request_bodies_have_exactly_the_members_of_their_schemas() {
    let server = TestServer::start().await;
    for (probe, schema) in probes(server.server().app()) {
        let names = |fields: &[&str]| fields.iter().map(|&name| name.to_owned()).collect();
        let structs = probe.structs().into_iter().map(|(at, fields)| (at, names(fields)));
        assert_eq!(structs.collect::<Objects>(), objects(schema), "{}", probe.what);
    }
}

#[tokio::test]
async fn the_members_of_request_bodies_may_be_what_their_schemas_say() {
    let server = TestServer::start().await;
    for (probe, schema) in probes(server.server().app()) {
        probe.value("", schema);
    }
}

#[tokio::test]
async fn a_list_of_the_values_of_an_object_is_not_that_object() {
    let server = TestServer::start().await;
    for (probe, _) in probes(server.server().app()) {
        for (at, fields) in probe.structs() {
            let object = probe.whole.pointer(&at).expect("an object");
            let list = fields.iter().map(|&name| object[name].clone()).collect();
            assert!(probe.read_with(&at, list).is_err(), "{} takes a list at {at:?}", probe.what);
        }
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

fn probes(app: &App) -> impl Iterator<Item = (Probe<'_>, &'static Value)> {
    requests().into_iter().map(move |(method, path, read)| {
        let schema = operation(method, path).and_then(|operation| operation.json_request()).expect("a schema");
        (Probe { what: format!("{method} {path}"), app, read, whole: sample(schema) }, schema)
    })
}

/// A body that is read, and read again with a change in one place.
struct Probe<'a> {
    what: String,
    app: &'a App,
    read: Read,
    whole: Value,
}

impl Probe<'_> {
    /// The structs that the unchanged body is read into.
    fn structs(&self) -> Structs {
        (self.read)(self.app, &self.whole).unwrap_or_else(|error| panic!("{}: {error:?}", self.what))
    }

    /// Tries what may and what may not stand at this JSON pointer, and below it.
    fn value(&self, at: &str, schema: &Value) {
        let schema = flat(schema);
        let kind = schema["type"].as_str().expect("a type");
        let format = schema.get("format").map_or("", |format| format.as_str().expect("a format"));
        let candidates = [
            (json!(null), is_nullable(&schema)),
            (json!(true), kind == "boolean"),
            (json!("1"), kind == "string" && format != "uuid"),
            (json!("0193a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b"), kind == "string"),
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
        for (name, member) in members(&schema["properties"]) {
            let what = format!("{}: {at}/{name}", self.what);
            let mut without = self.whole.pointer(at).expect("an object").clone();
            without.as_object_mut().expect("an object").remove(name);
            match self.read_with(at, without) {
                Ok(_) => assert!(!required(schema).contains(name), "{what} is not required"),
                Err(message) => {
                    assert!(required(schema).contains(name), "{what} is required: {message}");
                    assert!(message.contains(&format!("missing field `{name}`")), "{what}: {message}");
                }
            }
            self.value(&format!("{at}/{name}"), member);
        }
    }

    /// Reads the body with something else at this JSON pointer. A wrong shape is a 422, with this message.
    fn read_with(&self, at: &str, value: Value) -> Result<Structs, String> {
        let mut changed = self.whole.clone();
        *changed.pointer_mut(at).expect("something to change") = value;
        match (self.read)(self.app, &changed) {
            Ok(structs) => Ok(structs),
            Err(ApiError::Unprocessable(message)) => Err(message),
            Err(error) => panic!("{}: {error:?}", self.what),
        }
    }
}
