//! Schemas: as much of them as `openapi.yaml` uses. What isn't known here fails the tests, so that nothing is passed over.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::{Map, Value, json};

use super::document::{members, resolve};

/// For each object in a value, by its JSON pointer, the names of its members.
pub type Objects = BTreeMap<String, BTreeSet<String>>;

/// A schema without references and `allOf`: one flat list of keywords. Its members are as they were.
pub fn flat(schema: &Value) -> Map<String, Value> {
    let mut flattened = Map::new();
    for (keyword, value) in members(resolve(schema)) {
        match (keyword.as_str(), value) {
            ("description" | "example", _) => {}
            ("allOf", parts) => {
                let parts = parts.as_array().expect("allOf is a list");
                parts.iter().flat_map(flat).for_each(|(keyword, value)| merge(&mut flattened, keyword, value));
            }
            _ => merge(&mut flattened, keyword.clone(), value.clone()),
        }
    }
    flattened
}

fn merge(schema: &mut Map<String, Value>, keyword: String, value: Value) {
    match (schema.get_mut(&keyword), value) {
        (None, value) => {
            schema.insert(keyword, value);
        }
        (Some(Value::Array(names)), Value::Array(more)) if keyword == "required" => names.extend(more),
        (Some(Value::Object(properties)), Value::Object(more)) if keyword == "properties" => {
            for (name, property) in more {
                assert!(properties.insert(name.clone(), property).is_none(), "allOf names {name} twice");
            }
        }
        (Some(one), other) => assert_eq!(*one, other, "the parts of an allOf disagree about {keyword}"),
    }
}

/// Says what is wrong with a value, if anything is. Members that the schema doesn't name are.
pub fn validate(schema: &Value, value: &Value) -> Result<(), String> {
    let schema = flat(schema);
    if value.is_null() {
        return if is_nullable(&schema) { Ok(()) } else { Err("may not be null".into()) };
    }
    for (keyword, expected) in &schema {
        if !holds(keyword, expected, value)? {
            return Err(format!("{value} breaks {keyword}: {expected}"));
        }
    }
    for (name, member) in members(value) {
        let property = schema.get("properties").and_then(|properties| properties.get(name));
        let property = property.ok_or_else(|| format!("{name} is not in the schema"))?;
        validate(property, member).map_err(|error| format!("{name}: {error}"))?;
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        validate(&schema["items"], item).map_err(|error| format!("{index}: {error}"))?;
    }
    Ok(())
}

fn holds(keyword: &str, expected: &Value, value: &Value) -> Result<bool, String> {
    let length = || value.as_str().map_or(0, |text| text.chars().count() as u64);
    let count = || value.as_array().map_or(0, |items| items.len() as u64);
    let bound = |expected: &Value| expected.as_u64().ok_or("a bound is not a number");
    Ok(match keyword {
        "type" => kind(value) == expected.as_str().ok_or("a type is text")?,
        "enum" => expected.as_array().ok_or("an enum is a list")?.contains(value),
        "format" => has_format(value, expected.as_str().ok_or("a format is text")?)?,
        "pattern" => {
            let pattern =
                Regex::new(expected.as_str().ok_or("a pattern is text")?).map_err(|error| error.to_string())?;
            value.as_str().is_some_and(|text| pattern.is_match(text))
        }
        "minimum" => value.as_i64() >= expected.as_i64(),
        "maximum" => value.as_i64() <= expected.as_i64(),
        "minLength" => length() >= bound(expected)?,
        "maxLength" => length() <= bound(expected)?,
        "minItems" => count() >= bound(expected)?,
        "maxItems" => count() <= bound(expected)?,
        "required" => strings(expected).iter().all(|name| value.get(name).is_some()),
        "nullable" | "properties" | "items" => true,
        other => return Err(format!("this validator doesn't know the keyword {other}")),
    })
}

fn has_format(value: &Value, format: &str) -> Result<bool, String> {
    match format {
        "uuid" => Ok(value.as_str().and_then(|text| uuid::Uuid::try_parse(text).ok()).is_some()),
        "int32" => Ok(value.as_i64().is_some_and(|number| i32::try_from(number).is_ok())),
        "int64" => Ok(value.is_i64()),
        other => Err(format!("this validator doesn't know the format {other}")),
    }
}

/// The type of a value, as schemas call it.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A value of the right shape, with every optional member and one item in every list. Patterns are not looked at.
pub fn sample(schema: &Value) -> Value {
    let schema = flat(schema);
    match schema["type"].as_str().expect("a type") {
        "object" => members(&schema["properties"]).map(|(name, member)| (name.clone(), sample(member))).collect(),
        "array" => json!([sample(&schema["items"])]),
        "string" if schema.get("format").is_some_and(|format| format == "uuid") => {
            json!("0193a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b")
        }
        "string" => json!("text"),
        "integer" => json!(1),
        "boolean" => json!(true),
        other => panic!("no sample of type {other}"),
    }
}

/// The objects of a sample of this schema, with all their members.
pub fn objects(schema: &Value) -> Objects {
    objects_of(&sample(schema))
}

/// The objects in a value, with all their members.
pub fn objects_of(value: &Value) -> Objects {
    let mut objects = Objects::new();
    collect(value, String::new(), &mut objects);
    objects
}

fn collect(value: &Value, at: String, objects: &mut Objects) {
    if let Some(object) = value.as_object() {
        objects.insert(at.clone(), object.keys().cloned().collect());
    }
    for (name, member) in members(value) {
        collect(member, format!("{at}/{name}"), objects);
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        collect(item, format!("{at}/{index}"), objects);
    }
}

pub fn is_nullable(schema: &Map<String, Value>) -> bool {
    schema.get("nullable") == Some(&Value::Bool(true))
}

/// The names of the members that have to be there.
pub fn required(schema: &Map<String, Value>) -> BTreeSet<String> {
    schema.get("required").map(strings).unwrap_or_default().into_iter().collect()
}

fn strings(list: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().expect("a name").to_owned();
    list.as_array().expect("a list").iter().map(text).collect()
}
