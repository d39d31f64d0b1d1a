//! The fields of a body that Tokenway does not know, for an engine that takes them (`CompletionRequest.extra_fields`).

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value as ProtoValue};
use serde_json::{Map, Number, Value};

use super::buffered_request::MAX_BODY_BYTES;
use super::json;
use super::unknown::unknown_field;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;

/// Name of the engine's field.
const EXTRA_FIELDS: &str = "extra_fields";

/// Largest absolute value up to which a 64-bit float holds every integer.
const MAX_EXACT_INTEGER: u64 = 1 << 53;

/// The names of the unknown fields of a body, in the client's order.
#[derive(Debug, Default)]
pub(super) struct ExtraFieldNames(Vec<String>);

impl ExtraFieldNames {
    /// Adds the fields to each message, and returns their names.
    ///
    /// # Errors
    /// A field has a number that the engine would not get exactly, or the fields are too large for this many messages.
    pub(super) fn add_to(
        messages: &mut [v1::CompletionRequest],
        fields: Map<String, Value>,
    ) -> Result<Self, Error> {
        let names: Vec<_> = fields.keys().cloned().collect();
        let Some(first) = names.first() else {
            return Ok(Self::default());
        };
        if messages.len() > 1 {
            let copies = json::to_vec(&fields).len().saturating_mul(messages.len());
            if copies > MAX_BODY_BYTES {
                let message = format!(
                    "{first} and the other fields that Tokenway does not know are too large for this many prompts. \
                     Send fewer prompts."
                );
                return Err(Error::invalid_value(first, message));
            }
        }
        let mut extra = Struct::default();
        for (name, value) in fields {
            let value = to_proto(value).ok_or_else(|| {
                let message = format!(
                    "{name} must not have numbers that a 64-bit float cannot hold, such as integers above 2^53."
                );
                Error::invalid_value(&name, message)
            })?;
            extra.fields.insert(name, value);
        }
        for message in messages {
            message.extra_fields = Some(extra.clone());
        }
        Ok(Self(names))
    }

    /// Replaces an error about `extra_fields`, a name that the client does not know, by one about the client's field.
    pub(super) fn with_client_field_name(&self, error: Error) -> Error {
        let (Some(param), Some(first)) = (&error.param, self.0.first()) else {
            return error;
        };
        if param == EXTRA_FIELDS && error.kind == ErrorKind::UnsupportedParameter {
            return unknown_field(first);
        }
        match param.strip_prefix(EXTRA_FIELDS) {
            Some(name) if name.starts_with('.') => unknown_field(&name[1..]),
            Some(_) | None => error,
        }
    }
}

/// Converts a value. Returns `None` if a number would change.
fn to_proto(value: Value) -> Option<ProtoValue> {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Number(number) => Kind::NumberValue(to_float(&number)?),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(items) => {
            let values: Option<Vec<_>> = items.into_iter().map(to_proto).collect();
            Kind::ListValue(ListValue { values: values? })
        }
        Value::Object(fields) => {
            let fields = fields
                .into_iter()
                .map(|(name, value)| Some((name, to_proto(value)?)));
            Kind::StructValue(Struct {
                fields: fields.collect::<Option<_>>()?,
            })
        }
    };
    Some(ProtoValue { kind: Some(kind) })
}

fn to_float(number: &Number) -> Option<f64> {
    let magnitude = number
        .as_u64()
        .or_else(|| number.as_i64().map(i64::unsigned_abs));
    if magnitude.is_some_and(|magnitude| magnitude > MAX_EXACT_INTEGER) {
        return None;
    }
    number.as_f64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn added(fields: Value, prompts: usize) -> Result<ExtraFieldNames, Error> {
        let Value::Object(fields) = fields else {
            panic!("{fields} is not an object");
        };
        let mut messages = vec![v1::CompletionRequest::default(); prompts];
        ExtraFieldNames::add_to(&mut messages, fields)
    }

    #[test]
    fn a_number_that_would_change_is_rejected_and_its_field_named() {
        for number in [json!(u64::MAX), json!(i64::MIN), json!((1_u64 << 53) + 1)] {
            let error = added(json!({"a": 1, "b": [{"c": number}]}), 1).expect_err("too large");
            assert_eq!(error.param.as_deref(), Some("b"), "{number}");
        }
        for number in [json!(1_u64 << 53), json!(-(1_i64 << 53)), json!(-0.5)] {
            assert!(added(json!({"a": number}), 1).is_ok(), "{number}");
        }
    }

    #[test]
    fn large_fields_are_not_copied_to_many_prompts() {
        let text = "x".repeat(MAX_BODY_BYTES / 2);
        assert!(added(json!({"a": text}), 1).is_ok());
        let error = added(json!({"a": text}), 2).expect_err("too large");
        assert_eq!(error.param.as_deref(), Some("a"));
    }

    #[test]
    fn an_error_about_extra_fields_names_the_clients_field() {
        let names = added(json!({"b": 1, "a": 2}), 1).expect("valid fields");
        for (kind, param, expected) in [
            (ErrorKind::UnsupportedParameter, "extra_fields", "b"),
            (ErrorKind::InvalidValue, "extra_fields.a", "a"),
        ] {
            let error = Error::new(kind, "").with_param(param);
            let error = names.with_client_field_name(error);
            assert_eq!(error.kind, ErrorKind::UnknownParameter);
            assert_eq!(error.param.as_deref(), Some(expected));
        }
        let other = Error::invalid_value("n", "");
        assert_eq!(names.with_client_field_name(other.clone()), other);
    }
}
