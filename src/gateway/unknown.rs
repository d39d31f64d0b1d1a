//! Unknown request fields: the policy and the error for them, and the response header that lists those that were
//! ignored.
//!
//! This module must not know the fields of any body.

use axum::http::HeaderValue;
use axum::response::Response;

use crate::error::{Error, ErrorKind};
use crate::telemetry::Telemetry;

/// Response header that lists the ignored fields.
pub(super) const X_IGNORED_FIELDS: &str = "x-ignored-fields";

/// Maximum number of field names in the header. All further fields are only counted, for example `+3`.
const MAX_NAMES: usize = 16;

/// Maximum length of a name in the header, in bytes. Longer names are truncated.
const MAX_NAME_BYTES: usize = 64;

/// Policy for request fields that the HTTP API does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFieldPolicy {
    /// Rejects the request.
    #[default]
    Refuse,
    /// Ignores the field and lists it in the response header `x-ignored-fields`.
    Ignore,
}

/// Creates the error for an unknown field, by its path.
pub(super) fn unknown_field(name: &str) -> Error {
    let message = format!(
        "The field '{name}' is unknown. Leave it out, or start the server with --unknown-fields ignore."
    );
    Error::new(ErrorKind::UnknownParameter, message).with_param(name)
}

/// Ignored fields of one request.
#[derive(Debug, Default)]
pub(super) struct IgnoredFields {
    /// Encoded field names, at most [`MAX_NAMES`].
    names: Vec<String>,
    count: u64,
}

impl IgnoredFields {
    /// Adds a field by its path, such as `stream_options.name`.
    pub(super) fn add(&mut self, path: &str) {
        self.count += 1;
        if self.names.len() < MAX_NAMES {
            self.names.push(encode(path));
        }
    }

    /// Adds the ignored fields of a nested object.
    pub(super) fn append(&mut self, other: Self) {
        self.count += other.count;
        self.names.extend(other.names);
        self.names.truncate(MAX_NAMES);
    }

    /// Adds the number of ignored fields to the metric. The names come from the client, so they must not become
    /// metric labels.
    pub(super) fn add_to_metric(&self, telemetry: &Telemetry) {
        telemetry.ignored_fields.increment(self.count);
    }

    /// Adds the header to a response if any fields were ignored.
    pub(super) fn add_header(&self, mut response: Response) -> Response {
        if let Some(value) = self.header_value() {
            response.headers_mut().insert(X_IGNORED_FIELDS, value);
        }
        response
    }

    /// Returns the value of the header, such as `a,b,+3`: two names, and three more fields.
    fn header_value(&self) -> Option<HeaderValue> {
        if self.count == 0 {
            return None;
        }
        let mut value = self.names.join(",");
        let listed = u64::try_from(self.names.len()).unwrap_or(u64::MAX);
        let more = self.count.saturating_sub(listed);
        if more > 0 {
            value.push_str(&format!(",+{more}"));
        }
        Some(HeaderValue::from_str(&value).expect("encoded names are visible ASCII"))
    }
}

/// Encodes a name for the header. ASCII letters, digits and `-_.[]` are kept. Any other byte becomes `%XX`, so that a
/// client's field name cannot end the header or add another name.
fn encode(path: &str) -> String {
    let mut name = String::new();
    for byte in path.bytes() {
        let is_plain = byte.is_ascii_alphanumeric() || b"-_.[]".contains(&byte);
        let next = match is_plain {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        };
        if name.len() + next.len() > MAX_NAME_BYTES {
            name.push_str("...");
            break;
        }
        name.push_str(&next);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(paths: &[&str]) -> Option<String> {
        let mut ignored = IgnoredFields::default();
        for path in paths {
            ignored.add(path);
        }
        let value = ignored.header_value()?;
        Some(value.to_str().expect("the header is ASCII").to_owned())
    }

    #[test]
    fn the_header_lists_fields_by_path() {
        assert_eq!(header(&[]), None);
        assert_eq!(
            header(&["no_stop_trim", "messages[0].content[1].x-y"]).as_deref(),
            Some("no_stop_trim,messages[0].content[1].x-y")
        );
    }

    #[test]
    fn a_field_name_cannot_end_the_header_or_add_another_name() {
        assert_eq!(
            header(&["a\r\nset-cookie: b", "c,d", "é%", ""]).as_deref(),
            Some("a%0D%0Aset-cookie%3A%20b,c%2Cd,%C3%A9%25,")
        );
    }

    #[test]
    fn the_header_length_is_bounded() {
        let long = "é".repeat(1_000_000);
        let value = header(&vec![&*long; 1_000]).expect("fields were ignored");
        assert!(
            value.len() < MAX_NAMES * (MAX_NAME_BYTES + 4) + 8,
            "{value}"
        );
        assert!(value.ends_with(",+984"), "{value}");
        assert!(value.starts_with("%C3%A9%C3"), "{value}");
        let mut first = IgnoredFields::default();
        let mut second = IgnoredFields::default();
        for _ in 0..10 {
            first.add("a");
            second.add("b");
        }
        first.append(second);
        let value = first.header_value().expect("fields were ignored");
        assert!(value.to_str().is_ok_and(|value| value.ends_with("b,+4")));
    }
}
