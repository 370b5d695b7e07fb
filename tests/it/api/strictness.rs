//! How strictly an endpoint reads its JSON body. Every endpoint with one is held to it.

use serde_json::{Map, Value, json};

use crate::harness::{Request, Response};

/// Fails unless the endpoint refuses everything that `good` is not. `required` are the members that have to be there.
///
/// `request` makes a request that lacks only its body. None of the requests does anything.
pub async fn assert_strict(request: impl Fn() -> Request, good: &Value, required: &[&str]) {
    let members = good.as_object().expect("an object");
    content_types(&request, good).await;
    malformed_bodies(&request, good).await;
    for member in required {
        assert!(members.contains_key(*member), "{member} is missing in the good body");
        let mut without = members.clone();
        without.remove(*member);
        refused(&request, &Value::Object(without).to_string(), 422).await;
        refused(&request, &with(members, member, Value::Null), 422).await;
        refused(&request, &format!("{{{}:null", json!(member)), 400).await;
    }
    for (member, value) in members {
        for wrong in other_types(value) {
            refused(&request, &with(members, member, wrong), 422).await;
        }
        let again = format!("{{{}:{value},{}", json!(member), &good.to_string()[1..]);
        refused(&request, &again, 422).await;
    }
}

async fn content_types(request: &impl Fn() -> Request, good: &Value) {
    request().send().await.expect(415);
    request().body(good.to_string()).send().await.expect(415);
    for other in ["text/plain", "text/json", "application/jsonp", "application/x-www-form-urlencoded", "json", ""] {
        request().header("content-type", other).body(good.to_string()).send().await.expect(415);
    }
    // It is the body's turn when the type is one of JSON's.
    for json in ["application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"] {
        request().header("content-type", json).body("[").send().await.expect(400);
    }
}

async fn malformed_bodies(request: &impl Fn() -> Request, good: &Value) {
    let good = good.to_string();
    let malformed = [
        "",
        " ",
        "{",
        "nonsense",
        "{'a':1}",
        "\u{feff}{}",
        &good[..good.len() - 1],
        &format!("{good}x"),
        &format!("{good}{good}"),
    ];
    for body in malformed {
        refused(request, body, 400).await;
    }
    for body in ["null", "1", "\"text\"", "[]", "{}", "true"] {
        refused(request, body, 422).await;
    }
    let latin1 = request().header("content-type", "application/json").body(b"{\"\xe9\":1}".to_vec());
    latin1.send().await.expect(400);
    let too_long = format!("{good}{}", " ".repeat((2 << 20) + 1 - good.len()));
    refused(request, &too_long, 413).await;
}

async fn refused(request: &impl Fn() -> Request, body: &str, status: u16) -> Response {
    let response = request().header("content-type", "application/json").body(body.to_owned()).send().await;
    let shown: String = body.chars().take(300).collect();
    assert_eq!(response.status, status, "{shown}");
    response
}

fn with(members: &Map<String, Value>, member: &str, value: Value) -> String {
    let mut changed = members.clone();
    changed.insert(member.to_owned(), value);
    Value::Object(changed).to_string()
}

/// Values that can't stand where this one stands.
fn other_types(value: &Value) -> Vec<Value> {
    match value {
        Value::String(_) => vec![json!(1), json!(true), json!(["x"]), json!({"x": "x"})],
        Value::Number(_) => {
            let out_of_range = [json!(2_147_483_648_i64), json!(-2_147_483_649_i64), json!(1e300)];
            [json!("1"), json!(1.5), json!(1.0), json!(true), json!([1])].into_iter().chain(out_of_range).collect()
        }
        Value::Array(_) => vec![json!("x"), json!(1), json!({}), json!([1]), json!([null]), json!([{}])],
        Value::Object(_) => vec![json!("x"), json!(1), json!([]), json!({})],
        other => panic!("{other} says nothing about the type"),
    }
}
