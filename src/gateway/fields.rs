//! The fields of a JSON body, taken out one by one with their types checked. What is left over at the
//! end is unknown.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::object;
use crate::error::{Error, ErrorKind};

/// The fields that have not been taken yet.
pub(super) struct Fields {
    fields: Map<String, Value>,
    /// What the fields belong to, such as `stream_options.`, before each name in an error.
    path: &'static str,
}

impl Fields {
    /// The fields of a body.
    ///
    /// # Errors
    /// When the body is no JSON or no object, or names a field twice.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Error> {
        let fields = object::parse(body)?;
        Ok(Self { fields, path: "" })
    }

    /// The fields of an object within this one; empty where it is missing or null.
    ///
    /// # Errors
    /// When it is no object.
    pub(super) fn object(&mut self, name: &'static str, path: &'static str) -> Result<Self, Error> {
        match self.take(name) {
            None => Ok(Self {
                fields: Map::new(),
                path,
            }),
            Some(Value::Object(fields)) => Ok(Self { fields, path }),
            Some(other) => Err(self.wrong_type(name, "an object", &other)),
        }
    }

    /// Whether nothing is left but nulls, which ask for nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.fields.values().all(Value::is_null)
    }

    /// A field's value; `None` where it is missing or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(name, "a boolean", &other)),
        }
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(name, "a string", &other)),
        }
    }

    /// A whole number of the type `T`.
    pub(super) fn integer<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(value @ Value::Number(_)) if value.is_i64() || value.is_u64() => {
                let out_of_range = format!("{} is out of range.", self.full_name(name));
                serde_json::from_value(value)
                    .map(Some)
                    .map_err(|_| Error::invalid_value(&self.full_name(name), out_of_range))
            }
            // Beyond what any integer type holds JSON's numbers are floats.
            Some(Value::Number(number)) if number.as_f64().is_some_and(is_huge) => {
                let name = self.full_name(name);
                Err(Error::invalid_value(
                    &name,
                    format!("{name} is out of range."),
                ))
            }
            Some(other) => Err(self.wrong_type(name, "an integer", &other)),
        }
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64().map(narrowed) {
                Some(number) if number.is_finite() => Ok(Some(number)),
                Some(_) | None => {
                    let name = self.full_name(name);
                    Err(Error::invalid_value(
                        &name,
                        format!("{name} is out of range."),
                    ))
                }
            },
            Some(other) => Err(self.wrong_type(name, "a number", &other)),
        }
    }

    /// Refuses a field that cannot be honoured, unless it asks for nothing.
    ///
    /// # Errors
    /// When it holds anything but null or one of these values.
    pub(super) fn refuse(&mut self, name: &str, asks_nothing: &[Value]) -> Result<(), Error> {
        match self.take(name) {
            Some(value) if !asks_nothing.contains(&value) => {
                let name = self.full_name(name);
                let message = format!("{name} is not supported by this server.");
                Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(name))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Refuses what has not been taken.
    ///
    /// # Errors
    /// Names the first field that is unknown and not null.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.fields.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let name = self.full_name(name);
                let message = format!("The field '{name}' is unknown.");
                Err(Error::new(ErrorKind::UnknownParameter, message).with_param(name))
            }
        }
    }

    pub(super) fn wrong_type(&self, name: &str, wanted: &str, value: &Value) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} must be {wanted}, not {}.", kind_of(value));
        Error::new(ErrorKind::InvalidType, message).with_param(name)
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }
}

/// Whether a number is larger than every integer type's.
fn is_huge(number: f64) -> bool {
    number.abs() >= 9.2e18
}

/// The number as the engine takes it. The bounds of ranges are whole numbers, so rounding must not land
/// on one from outside.
#[expect(
    clippy::as_conversions,
    reason = "there is no other way to round a float"
)]
fn narrowed(number: f64) -> f32 {
    let narrow = number as f32;
    let wide = f64::from(narrow);
    if narrow.fract() != 0.0 || wide == number {
        narrow
    } else if wide < number {
        narrow.next_up()
    } else {
        narrow.next_down()
    }
}

/// What a value is, in a client's words.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
