//! The fields of a JSON body, taken out one by one with their types checked. What is left over at the
//! end is unknown: it is refused or ignored.

use serde_json::{Map, Number, Value};

use super::object;
use super::unknown::{IgnoredFields, UnknownFields};
use crate::error::{Error, ErrorKind};

/// The fields that have not been taken yet.
pub(super) struct Fields {
    fields: Map<String, Value>,
    /// What the fields belong to, such as `stream_options.`, before each name in an error.
    path: String,
    /// What happens to the fields that nobody takes.
    unknown: UnknownFields,
    ignored: IgnoredFields,
    /// Every field that was asked for.
    #[cfg(test)]
    pub(super) asked: std::collections::BTreeSet<String>,
}

/// A field that this server knows and cannot honour, with the values, as a JSON list, that ask for nothing:
/// OpenAI's defaults.
pub(super) type Unsupported = (&'static str, &'static str);

impl Fields {
    /// The fields of a body.
    ///
    /// # Errors
    /// When the body is no JSON or no object, or names a field twice.
    pub(super) fn parse(body: &[u8], unknown: UnknownFields) -> Result<Self, Error> {
        Ok(Self::new(object::parse(body)?, String::new(), unknown))
    }

    fn new(fields: Map<String, Value>, path: String, unknown: UnknownFields) -> Self {
        Self {
            fields,
            path,
            unknown,
            ignored: IgnoredFields::default(),
            #[cfg(test)]
            asked: Default::default(),
        }
    }

    /// The fields of an object within this one; `None` where it is missing or null.
    ///
    /// # Errors
    /// When it is no object.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Self>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => self.within(name, value).map(Some),
        }
    }

    /// The fields of an object that was found within this one by this name.
    ///
    /// # Errors
    /// When it is no object.
    pub(super) fn within(&self, name: &str, value: Value) -> Result<Self, Error> {
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

    /// Whether nothing is left but nulls, which ask for nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.fields.values().all(Value::is_null)
    }

    /// Whether a field holds anything but null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(|value| !value.is_null())
    }

    /// Every field that is left.
    pub(super) fn take_all(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.fields)
    }

    /// A field's value; `None` where it is missing or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        self.asked.insert(name.to_owned());
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub(super) fn required(&mut self, name: &str) -> Result<Value, Error> {
        self.take(name).ok_or_else(|| self.missing(name))
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(name, "a boolean", &other)),
        }
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        let value = self.take(name);
        value.map(|value| self.text(name, value)).transpose()
    }

    /// A whole number of the type `T`.
    pub(super) fn integer<T: TryFrom<i128>>(&mut self, name: &str) -> Result<Option<T>, Error> {
        let value = self.take(name);
        value.map(|value| self.whole(name, &value)).transpose()
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Error> {
        let value = self.take(name);
        value.map(|value| self.float(name, &value)).transpose()
    }

    /// A list that must be there.
    pub(super) fn required_list(&mut self, name: &str, wanted: &str) -> Result<Vec<Value>, Error> {
        match self.list(name, wanted)? {
            Some(items) => Ok(items),
            None => Err(self.missing(name)),
        }
    }

    /// A list; `None` where it is missing or null.
    pub(super) fn list(&mut self, name: &str, wanted: &str) -> Result<Option<Vec<Value>>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong_type(name, wanted, &other)),
        }
    }

    /// A value of this name as a string.
    pub(super) fn text(&self, name: &str, value: Value) -> Result<String, Error> {
        match value {
            Value::String(text) => Ok(text),
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_)) => Err(self.wrong_type(name, "a string", &other)),
        }
    }

    /// A value of this name as a whole number.
    pub(super) fn whole<T: TryFrom<i128>>(&self, name: &str, value: &Value) -> Result<T, Error> {
        match value.as_number().and_then(whole_number) {
            Some(number) => T::try_from(number).map_err(|_| self.out_of_range(name)),
            None if value.is_number() => {
                let name = self.full_name(name);
                let message = format!("{name} must be a whole number.");
                Err(Error::new(ErrorKind::InvalidType, message).with_param(name))
            }
            None => Err(self.wrong_type(name, "an integer", value)),
        }
    }

    /// A value of this name as a number.
    pub(super) fn float(&self, name: &str, value: &Value) -> Result<f32, Error> {
        let Value::Number(number) = value else {
            return Err(self.wrong_type(name, "a number", value));
        };
        let number = number.as_f64().map(narrowed);
        number
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.out_of_range(name))
    }

    /// Refuses the fields of a table, but where they ask for nothing.
    ///
    /// # Errors
    /// When one holds anything but null or what the table lets pass.
    pub(super) fn refuse(&mut self, table: &[Unsupported]) -> Result<(), Error> {
        for (name, asks_nothing) in table {
            let Some(value) = self.take(name) else {
                continue;
            };
            let asks_nothing: Vec<Value> =
                serde_json::from_str(asks_nothing).expect("a table holds lists of JSON");
            if !asks_nothing.iter().any(|known| is_same(known, &value)) {
                return Err(self.unsupported(name));
            }
        }
        Ok(())
    }

    /// Refuses or ignores the fields that have not been taken. Null asks for nothing, and is neither.
    ///
    /// # Errors
    /// Names the first unknown field, where unknown fields are refused.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        for (name, value) in std::mem::take(&mut self.fields) {
            if value.is_null() {
                continue;
            }
            let name = self.full_name(&name);
            match self.unknown {
                UnknownFields::Ignore => self.ignored.add(&name),
                UnknownFields::Refuse => {
                    let message = format!(
                        "The field '{name}' is unknown. Leave it out, or start the server with \
                         --unknown-fields ignore."
                    );
                    return Err(Error::new(ErrorKind::UnknownParameter, message).with_param(name));
                }
            }
        }
        Ok(())
    }

    /// Finishes the fields of an object within this one.
    ///
    /// # Errors
    /// Names the first unknown field, where unknown fields are refused.
    pub(super) fn finish_nested(&mut self, mut within: Self) -> Result<(), Error> {
        within.finish()?;
        self.ignored.append(within.ignored);
        Ok(())
    }

    /// The fields that were ignored.
    pub(super) fn into_ignored(self) -> IgnoredFields {
        self.ignored
    }

    pub(super) fn wrong_type(&self, name: &str, wanted: &str, value: &Value) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} must be {wanted}, not {}.", json_type_name(value));
        Error::new(ErrorKind::InvalidType, message).with_param(name)
    }

    /// The field's value is not one of those that it may have.
    pub(super) fn invalid(&self, name: &str, rule: &str) -> Error {
        let name = self.full_name(name);
        Error::invalid_value(&name, format!("{name} must {rule}."))
    }

    /// The field, or its value, is known and cannot be honoured.
    pub(super) fn unsupported(&self, name: &str) -> Error {
        let name = self.full_name(name);
        let message = format!("{name} is not supported by this server.");
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

/// Whether two values are the same: `1.0` is `1`.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other || whole_number(one).is_some_and(|one| whole_number(other) == Some(one))
        }
        _ => one == other,
    }
}

/// The number where it is whole: in JSON `16.0`, and `-0`, are. One that no integer type of ours holds is
/// larger than all of them.
fn whole_number(number: &Number) -> Option<i128> {
    if let Some(number) = number.as_i64() {
        return Some(number.into());
    }
    if let Some(number) = number.as_u64() {
        return Some(number.into());
    }
    let number = number.as_f64().filter(|number| number.fract() == 0.0)?;
    #[expect(
        clippy::as_conversions,
        reason = "there is no other way to make an integer of a float; this one saturates"
    )]
    Some(number as i128)
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
