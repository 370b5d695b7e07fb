//! Reads a JSON value as serde does, and notes which members each struct knows.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::de::value::{Error, MapDeserializer, SeqDeserializer};
use serde::de::{Deserialize, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

/// For each struct that was read, by the JSON pointer of what it was read from, its members in their order.
pub type Structs = BTreeMap<String, &'static [&'static str]>;

/// The structs that a `T` consists of, as far as this value has them.
pub fn structs_of<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<Structs, String> {
    let structs = RefCell::default();
    T::deserialize(Recorder { value, at: String::new(), structs: &structs }).map_err(|error| error.to_string())?;
    Ok(structs.into_inner())
}

struct Recorder<'de, 's> {
    value: &'de Value,
    at: String,
    structs: &'s RefCell<Structs>,
}

impl<'de> Recorder<'de, '_> {
    fn inner(&self, value: &'de Value, segment: &str) -> Self {
        Self { value, at: format!("{}/{segment}", self.at), structs: self.structs }
    }
}

impl<'de> IntoDeserializer<'de> for Recorder<'de, '_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Recorder<'de, '_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.structs.borrow_mut().insert(self.at.clone(), fields);
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match number.as_i64() {
                Some(integer) => visitor.visit_i64(integer),
                None => visitor.visit_f64(number.as_f64().expect("a number")),
            },
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(items) => {
                let items = items.iter().enumerate();
                let items = items.map(|(index, item)| self.inner(item, &index.to_string()));
                visitor.visit_seq(SeqDeserializer::new(items))
            }
            Value::Object(members) => {
                let members = members.iter().map(|(name, member)| (name.as_str(), self.inner(member, name)));
                visitor.visit_map(MapDeserializer::new(members))
            }
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map enum identifier ignored_any
    }
}
