//! Parses a body as a JSON object. Duplicate keys are rejected, because the client could not know which value is
//! used.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind};

/// Parses a body.
///
/// # Errors
/// If the body is not a JSON object, or any object in it has a duplicate key.
pub(super) fn parse(body: &[u8]) -> Result<Map<String, Value>, Error> {
    let mut duplicate = None;
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let keys = UniqueKeys {
        path: Path::Body,
        duplicate: &mut duplicate,
    };
    let value = keys
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    match (value, duplicate) {
        (_, Some(name)) => {
            let message = format!("The field '{name}' appears twice. Send it once.");
            Err(Error::invalid_value(&name, message))
        }
        (Ok(Value::Object(fields)), None) => Ok(fields),
        (Ok(value), None) => {
            let message = format!(
                "The body must be a JSON object, not {}.",
                json_type_name(&value)
            );
            Err(Error::new(ErrorKind::InvalidType, message))
        }
        (Err(error), None) => {
            let message = format!("The body is not valid JSON: {error}.");
            Err(Error::new(ErrorKind::InvalidJson, message))
        }
    }
}

/// Path of a value within the body. It is formatted only for errors.
#[derive(Clone, Copy)]
enum Path<'a> {
    Body,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body => Ok(()),
            Self::Field(Self::Body, name) => formatter.write_str(name),
            Self::Field(parent, name) => write!(formatter, "{parent}.{name}"),
            Self::Item(parent, index) => write!(formatter, "{parent}[{index}]"),
        }
    }
}

/// Deserializes a value. For a duplicate key, stores the key's full path in `duplicate` and fails.
struct UniqueKeys<'a> {
    path: Path<'a>,
    duplicate: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for UniqueKeys<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let path = Path::Field(&self.path, &name);
            if fields.contains_key(&name) {
                *self.duplicate = Some(path.to_string());
                return Err(A::Error::custom("duplicate key"));
            }
            let value = entries.next_value_seed(UniqueKeys {
                path,
                duplicate: self.duplicate,
            })?;
            fields.insert(name, value);
        }
        Ok(Value::Object(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(UniqueKeys {
            path: Path::Item(&self.path, values.len()),
            duplicate: self.duplicate,
        })? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
}

/// Returns the name of a value's JSON type with its article, for error messages.
pub(super) fn json_type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::gateway::arbitrary;

    #[test]
    fn a_duplicate_field_is_rejected_with_its_full_path() {
        for (body, name) in [
            (r#"{"n": 1, "prompt": "a", "n": 2}"#, "n"),
            (r#"{"n": null, "\u006e": 1}"#, "n"),
            (
                r#"{"stream_options": {"include_usage": true, "include_usage": false}}"#,
                "stream_options.include_usage",
            ),
            (
                r#"{"stream_options": {}, "stream_options": {}}"#,
                "stream_options",
            ),
            (
                r#"{"messages": [{}, {"content": [{"text": "a", "text": "b"}]}]}"#,
                "messages[1].content[0].text",
            ),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidValue, "{body}");
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }

    #[test]
    fn every_json_type_is_parsed_and_only_an_object_is_a_valid_body() {
        let body = json!({
            "a": [1, "b", {"c": null}], "d": -1, "e": 1.5, "f": u64::MAX, "g": {"a": true},
            "stream_options": {"h": [false], "i": {"j": {}}},
        });
        let fields = parse(body.to_string().as_bytes()).unwrap();
        assert_eq!(Value::Object(fields), body);
        for other in [
            json!(null),
            json!(true),
            json!(-1),
            json!(1.5),
            json!("a"),
            json!([1]),
        ] {
            let error = parse(other.to_string().as_bytes()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidType);
            assert!(
                error.message.contains(json_type_name(&other)),
                "{}",
                error.message
            );
        }
    }

    #[test]
    fn trailing_data_after_the_object_is_rejected() {
        let error = parse(b"{} {}").unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidJson);
    }

    #[test]
    fn invalid_json_is_rejected() {
        let deep = "[".repeat(100_000);
        for body in ["", "{", "{\"prompt\": NaN}", "\u{feff}{}", &deep] {
            let error = parse(body.as_bytes()).err();
            let error = error.expect("the JSON is invalid");
            assert_eq!(error.kind, ErrorKind::InvalidJson);
        }
        let error = parse(b"{\"prompt\": \"\xff\"}").err();
        let error = error.expect("the UTF-8 is invalid");
        assert_eq!(error.kind, ErrorKind::InvalidJson);
    }

    proptest! {
        #[test]
        fn any_body_is_read_as_serde_json_reads_it_unless_a_field_appears_twice(
            body in arbitrary::broken_json(),
        ) {
            let expected = serde_json::from_slice::<Value>(&body);
            match (parse(&body), expected) {
                (Ok(fields), expected) => prop_assert_eq!(Some(Value::Object(fields)), expected.ok()),
                (Err(error), _) if error.kind == ErrorKind::InvalidValue => {
                    prop_assert!(error.message.ends_with("appears twice. Send it once."), "{}", error);
                    prop_assert!(error.param.is_some());
                }
                (Err(error), Ok(Value::Object(_))) => prop_assert!(false, "{}", error),
                (Err(error), Ok(_)) => prop_assert_eq!(error.kind, ErrorKind::InvalidType),
                (Err(error), Err(_)) => prop_assert_eq!(error.kind, ErrorKind::InvalidJson),
            }
        }
    }
}
