//! Reads the fields of a JSON body one by one, and checks their types. Fields that remain at the end are unknown.
//! They are rejected or ignored, or kept for an engine that takes them.

use serde_json::{Map, Number, Value};

use super::json_object::{self, json_type_name};
use super::unknown::{IgnoredFields, UnknownFieldPolicy, unknown_field};
use crate::error::{Error, ErrorKind};

/// The fields of a JSON object that have not been read yet.
pub(super) struct Fields {
    fields: Map<String, Value>,
    /// Prefix of field names in errors, such as `stream_options.`; empty for the body itself.
    path: String,
    /// Policy for the fields that remain at the end.
    unknown: UnknownFieldPolicy,
    ignored: IgnoredFields,
    /// Unknown fields for the engine. `None` if `unknown` applies.
    kept: Option<Map<String, Value>>,
    /// Names of all fields that were read, present or not.
    #[cfg(test)]
    pub(super) requested: std::collections::BTreeSet<String>,
}

/// An unsupported field: its name, and a JSON list of values that are accepted anyway because they have no effect.
/// These are usually OpenAI's defaults.
pub(super) type Unsupported = (&'static str, &'static str);

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// The body is not valid JSON or not an object, or has a duplicate field.
    pub(super) fn parse(body: &[u8], unknown: UnknownFieldPolicy) -> Result<Self, Error> {
        Ok(Self::new(json_object::parse(body)?, String::new(), unknown))
    }

    fn new(fields: Map<String, Value>, path: String, unknown: UnknownFieldPolicy) -> Self {
        Self {
            fields,
            path,
            unknown,
            ignored: IgnoredFields::default(),
            kept: None,
            #[cfg(test)]
            requested: Default::default(),
        }
    }

    /// Reads a field whose value is an object. Returns `None` if the field is missing or null.
    ///
    /// # Errors The value is not an object.
    pub(super) fn take_object(&mut self, name: &str) -> Result<Option<Self>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => self.nested(name, value).map(Some),
        }
    }

    /// Reads `value` as a nested object of this name.
    ///
    /// # Errors
    /// The value is not an object.
    pub(super) fn nested(&self, name: &str, value: Value) -> Result<Self, Error> {
        match value {
            Value::Object(fields) => {
                let path = format!("{}.", self.full_name(name));
                Ok(Self::new(fields, path, self.unknown))
            }
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_)) => Err(self.wrong_type(name, "an object", &other)),
        }
    }

    /// Returns true if every remaining field is null.
    pub(super) fn is_empty(&self) -> bool {
        self.fields.values().all(Value::is_null)
    }

    /// Returns true if a field is present and not null.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(|value| !value.is_null())
    }

    /// Removes and returns all remaining fields.
    pub(super) fn take_all(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.fields)
    }

    /// Takes a field's value and leaves null in its place, so that the other fields keep their order. Returns `None` if
    /// the field is missing or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        self.requested.insert(name.to_owned());
        let value = self.fields.get_mut(name).map(Value::take);
        value.filter(|value| !value.is_null())
    }

    /// Reads a required field.
    pub(super) fn take_required(&mut self, name: &str) -> Result<Value, Error> {
        self.take(name).ok_or_else(|| self.missing(name))
    }

    pub(super) fn take_bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(name, "a boolean", &other)),
        }
    }

    pub(super) fn take_string(&mut self, name: &str) -> Result<Option<String>, Error> {
        let value = self.take(name);
        value
            .map(|value| self.string_value(name, value))
            .transpose()
    }

    /// Reads a required string.
    pub(super) fn take_required_string(&mut self, name: &str) -> Result<String, Error> {
        let value = self.take_required(name)?;
        self.string_value(name, value)
    }

    /// Reads a required object.
    pub(super) fn take_required_object(&mut self, name: &str) -> Result<Self, Error> {
        let value = self.take_required(name)?;
        self.nested(name, value)
    }

    /// Reads an integer of type `T`.
    pub(super) fn take_integer<T: TryFrom<i128>>(
        &mut self,
        name: &str,
    ) -> Result<Option<T>, Error> {
        let value = self.take(name);
        value
            .map(|value| self.integer_value(name, &value))
            .transpose()
    }

    pub(super) fn take_number(&mut self, name: &str) -> Result<Option<f32>, Error> {
        let value = self.take(name);
        value
            .map(|value| self.float_value(name, &value))
            .transpose()
    }

    /// Reads a required list.
    pub(super) fn take_required_list(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Vec<Value>, Error> {
        match self.take_list(name, expected)? {
            Some(items) => Ok(items),
            None => Err(self.missing(name)),
        }
    }

    /// Reads a list. Returns `None` if the field is missing or null.
    pub(super) fn take_list(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<Vec<Value>>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong_type(name, expected, &other)),
        }
    }

    /// Checks that `value` is a string.
    pub(super) fn string_value(&self, name: &str, value: Value) -> Result<String, Error> {
        match value {
            Value::String(text) => Ok(text),
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_)) => Err(self.wrong_type(name, "a string", &other)),
        }
    }

    /// Checks that `value` is an integer of type `T`.
    pub(super) fn integer_value<T: TryFrom<i128>>(
        &self,
        name: &str,
        value: &Value,
    ) -> Result<T, Error> {
        match value.as_number().and_then(to_integer) {
            Some(number) => T::try_from(number).map_err(|_| self.out_of_range(name)),
            None if value.is_number() => {
                let name = self.full_name(name);
                let message = format!("{name} must be an integer, not a number with a fraction.");
                Err(Error::new(ErrorKind::InvalidType, message).with_param(name))
            }
            None => Err(self.wrong_type(name, "an integer", value)),
        }
    }

    /// Checks that `value` is a number in the range of `f32`.
    pub(super) fn float_value(&self, name: &str, value: &Value) -> Result<f32, Error> {
        let Value::Number(number) = value else {
            return Err(self.wrong_type(name, "a number", value));
        };
        let number = number.as_f64().map(round_to_f32);
        number
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.out_of_range(name))
    }

    /// Reads the unsupported fields of a table.
    ///
    /// # Errors A field has a value that the table does not accept. Null is always accepted.
    pub(super) fn reject_unsupported(&mut self, table: &[Unsupported]) -> Result<(), Error> {
        for (name, accepted) in table {
            let Some(value) = self.take(name) else {
                continue;
            };
            let accepted: Vec<Value> =
                serde_json::from_str(accepted).expect("the table has valid JSON lists");
            if !accepted.iter().any(|accepted| is_equal(accepted, &value)) {
                return Err(self.unsupported(name));
            }
        }
        Ok(())
    }

    /// Keeps the fields that remain at the end for the engine, instead of rejecting or ignoring them. Nested objects are
    /// not affected.
    pub(super) fn keep_unknown(&mut self) {
        self.kept = Some(Map::new());
    }

    /// Returns the unknown fields that were kept, after [`Self::finish`].
    pub(super) fn take_kept(&mut self) -> Map<String, Value> {
        self.kept.take().unwrap_or_default()
    }

    /// Returns the text of a field that has not been read, or an empty text.
    pub(super) fn peek_text(&self, name: &str) -> &str {
        let value = self.fields.get(name);
        value.and_then(Value::as_str).unwrap_or_default()
    }

    /// Keeps, rejects or ignores the remaining fields. Fields that are null are always accepted.
    ///
    /// # Errors
    /// Unknown fields are rejected. The error names the first one.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        for (name, value) in std::mem::take(&mut self.fields) {
            if value.is_null() {
                continue;
            }
            if let Some(kept) = &mut self.kept {
                kept.insert(name, value);
                continue;
            }
            let name = self.full_name(&name);
            match self.unknown {
                UnknownFieldPolicy::Ignore => self.ignored.add(&name),
                UnknownFieldPolicy::Refuse => return Err(unknown_field(&name)),
            }
        }
        Ok(())
    }

    /// Rejects or ignores the remaining fields of a nested object.
    ///
    /// # Errors The same as [`Self::finish`].
    pub(super) fn finish_nested(&mut self, mut nested: Self) -> Result<(), Error> {
        nested.finish()?;
        self.ignored.append(nested.ignored);
        Ok(())
    }

    pub(super) fn into_ignored(self) -> IgnoredFields {
        self.ignored
    }

    pub(super) fn wrong_type(&self, name: &str, expected: &str, value: &Value) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} must be {expected}, not {}.", json_type_name(value));
        Error::new(ErrorKind::InvalidType, message).with_param(name)
    }

    /// Creates the error for a value that breaks a rule, such as "must be at least 1".
    pub(super) fn invalid(&self, name: &str, rule: &str) -> Error {
        let name = self.full_name(name);
        Error::invalid_value(&name, format!("{name} {rule}."))
    }

    /// Creates the error for an unsupported field or value.
    pub(super) fn unsupported(&self, name: &str) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} or its value is not supported by this server.");
        Error::new(ErrorKind::UnsupportedParameter, message).with_param(name)
    }

    fn missing(&self, name: &str) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} is required.");
        Error::new(ErrorKind::MissingParameter, message).with_param(name)
    }

    fn out_of_range(&self, name: &str) -> Error {
        let name = self.full_name(name);
        Error::invalid_value(&name, format!("{name} is out of range."))
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }
}

/// Returns true if two values are equal. `1.0` equals `1`.
fn is_equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other || to_integer(one).is_some_and(|one| to_integer(other) == Some(one))
        }
        _ => one == other,
    }
}

/// Converts a number without a fraction to an integer. `16.0` and `-0` are integers too. A float beyond the range of
/// `i128` saturates, which does not matter: it is out of range for every field.
fn to_integer(number: &Number) -> Option<i128> {
    if let Some(number) = number.as_i64() {
        return Some(number.into());
    }
    if let Some(number) = number.as_u64() {
        return Some(number.into());
    }
    let number = number.as_f64().filter(|number| number.fract() == 0.0)?;
    #[expect(
        clippy::as_conversions,
        reason = "the standard library has no other conversion from float to integer; this one saturates"
    )]
    Some(number as i128)
}

/// Rounds a number to `f32`, the engine's type. The bounds of all ranges are integers, so rounding must not turn an
/// out-of-range number into an integer that is in range.
#[expect(
    clippy::as_conversions,
    reason = "the standard library has no other conversion from f64 to f32"
)]
fn round_to_f32(number: f64) -> f32 {
    let rounded = number as f32;
    let exact = f64::from(rounded);
    if rounded.fract() != 0.0 || exact == number {
        rounded
    } else if exact < number {
        rounded.next_up()
    } else {
        rounded.next_down()
    }
}
