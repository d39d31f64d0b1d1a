//! The fields of a request that Tokenway does not know, as fields of the body.

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::error::Error;
use crate::proto::v1;

/// Names that `extra_fields` must not have: the fields that this gateway writes itself, and those that would change the
/// form of the answer.
const RESERVED: [&str; 52] = [
    "audio",
    "best_of",
    "cache_salt",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "min_tokens",
    "modalities",
    "model",
    "n",
    "n_cmpl",
    "n_predict",
    "n_probs",
    "parallel_tool_calls",
    "post_sampling_probs",
    "presence_penalty",
    "prompt",
    "prompt_logprobs",
    "reasoning_effort",
    "repetition_penalty",
    "response_fields",
    "response_format",
    "return_progress",
    "return_token_ids",
    "return_tokens",
    "return_tokens_as_token_ids",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_include_usage",
    "stream_options",
    "suffix",
    "temperature",
    "timings_per_token",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "use_beam_search",
    "user",
    "verbose",
];

/// Largest number up to which a 64-bit float holds every integer.
const MAX_EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;

/// The checked fields.
pub(super) struct ExtraFields<'a>(Option<&'a Struct>);

impl<'a> ExtraFields<'a> {
    /// Reads the fields of a request.
    ///
    /// # Errors
    /// A field has a reserved name, or a number that JSON does not have.
    pub(super) fn of(message: &'a v1::CompletionRequest) -> Result<Self, Error> {
        let extra = message.extra_fields.as_ref();
        for (name, value) in extra.iter().flat_map(|extra| &extra.fields) {
            let problem = if RESERVED.binary_search(&&**name).is_ok() {
                "is a field that Tokenway knows or cannot pass on. Use the field of the API, or leave it out"
            } else if !is_json(value) {
                "must have only finite numbers"
            } else {
                continue;
            };
            let param = format!("extra_fields.{name}");
            return Err(Error::invalid_value(&param, format!("{param} {problem}.")));
        }
        Ok(Self(extra))
    }
}

/// Returns true if JSON can have this value: infinity and NaN are no JSON.
fn is_json(value: &Value) -> bool {
    match &value.kind {
        Some(Kind::NumberValue(number)) => number.is_finite(),
        Some(Kind::StructValue(object)) => object.fields.values().all(is_json),
        Some(Kind::ListValue(list)) => list.values.iter().all(is_json),
        Some(Kind::NullValue(_) | Kind::StringValue(_) | Kind::BoolValue(_)) | None => true,
    }
}

impl Serialize for ExtraFields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(fields) => Object(fields).serialize(serializer),
            None => serializer.serialize_map(Some(0))?.end(),
        }
    }
}

struct Object<'a>(&'a Struct);

impl Serialize for Object<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in &self.0.fields {
            map.serialize_entry(name, &Json(value))?;
        }
        map.end()
    }
}

struct Json<'a>(&'a Value);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0.kind {
            Some(Kind::NumberValue(number)) => serialize_number(*number, serializer),
            Some(Kind::StringValue(text)) => serializer.serialize_str(text),
            Some(Kind::BoolValue(value)) => serializer.serialize_bool(*value),
            Some(Kind::StructValue(object)) => Object(object).serialize(serializer),
            Some(Kind::ListValue(list)) => serializer.collect_seq(list.values.iter().map(Json)),
            Some(Kind::NullValue(_)) | None => serializer.serialize_unit(),
        }
    }
}

/// Writes a whole number without a fraction, because some engines reject `5.0` for an integer.
fn serialize_number<S: Serializer>(number: f64, serializer: S) -> Result<S::Ok, S::Error> {
    if number.fract() != 0.0 || number.abs() > MAX_EXACT_INTEGER {
        return serializer.serialize_f64(number);
    }
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "a whole number up to 2^53 is an i64"
    )]
    serializer.serialize_i64(number as i64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn number(number: f64) -> Value {
        Value {
            kind: Some(Kind::NumberValue(number)),
        }
    }

    fn with_field(name: &str, value: Value) -> v1::CompletionRequest {
        v1::CompletionRequest {
            extra_fields: Some(Struct {
                fields: [(name.to_owned(), value)].into(),
            }),
            ..v1::CompletionRequest::default()
        }
    }

    #[test]
    fn the_reserved_names_are_sorted() {
        assert!(RESERVED.is_sorted());
    }

    #[test]
    fn whole_numbers_are_sent_as_integers_and_others_as_they_are() {
        for (value, expected) in [
            (5.0, "5"),
            (-0.0, "0"),
            (0.5, "0.5"),
            (MAX_EXACT_INTEGER, "9007199254740992"),
            (-MAX_EXACT_INTEGER, "-9007199254740992"),
            (1e300, "1e+300"),
        ] {
            let message = with_field("a", number(value));
            let fields = ExtraFields::of(&message).expect("valid fields");
            let body = serde_json::to_string(&fields).expect("valid JSON");
            assert_eq!(body, format!("{{\"a\":{expected}}}"));
        }
    }

    #[test]
    fn every_kind_of_value_is_sent() {
        let list = prost_types::ListValue {
            values: vec![
                Value {
                    kind: Some(Kind::BoolValue(true)),
                },
                Value { kind: None },
                Value {
                    kind: Some(Kind::StringValue("x".to_owned())),
                },
            ],
        };
        let object = Struct {
            fields: [(
                "stream".to_owned(),
                Value {
                    kind: Some(Kind::ListValue(list)),
                },
            )]
            .into(),
        };
        let message = with_field(
            "a",
            Value {
                kind: Some(Kind::StructValue(object)),
            },
        );
        let fields = ExtraFields::of(&message).expect("only top-level names are reserved");
        assert_eq!(json!(fields), json!({"a": {"stream": [true, null, "x"]}}));
        let none = v1::CompletionRequest::default();
        assert_eq!(json!(ExtraFields::of(&none).expect("no fields")), json!({}));
    }

    #[test]
    fn a_known_field_and_a_number_that_json_does_not_have_are_rejected() {
        for (name, value) in [
            ("stream", number(1.0)),
            ("model", number(1.0)),
            ("n", number(1.0)),
            ("functions", number(1.0)),
            ("cat", number(f64::NAN)),
            ("cat", number(f64::NEG_INFINITY)),
        ] {
            let message = with_field(name, value);
            let error = ExtraFields::of(&message).err().expect("it is rejected");
            assert_eq!(error.param, Some(format!("extra_fields.{name}")));
        }
    }
}
