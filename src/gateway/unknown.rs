//! Fields that this server does not know: whether they are refused, and how an answer names those that were
//! ignored. It must not know which fields are known.

use axum::http::HeaderValue;
use axum::response::Response;

use crate::telemetry::Telemetry;

/// Response header that names the ignored fields.
pub(super) const X_IGNORED_FIELDS: &str = "x-ignored-fields";

/// Most names in the header. More ignored fields are only counted there.
const MAX_NAMES: usize = 16;

/// Longest name in the header, in bytes. The rest of a longer name is left out.
const MAX_NAME_BYTES: usize = 64;

/// What the HTTP API does with a field that it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFields {
    /// Refuses the request.
    #[default]
    Refuse,
    /// Ignores the field and names it in the answer's header `x-ignored-fields`.
    Ignore,
}

/// The ignored fields of one request.
#[derive(Debug, Default)]
pub(super) struct IgnoredFields {
    /// Encoded, at most [`MAX_NAMES`].
    names: Vec<String>,
    count: u64,
}

impl IgnoredFields {
    /// Adds a field by its path, such as `stream_options.name`.
    pub(super) fn add(&mut self, path: &str) {
        self.count += 1;
        if self.names.len() < MAX_NAMES {
            self.names.push(encoded(path));
        }
    }

    /// Adds the fields of an object within this one.
    pub(super) fn append(&mut self, other: Self) {
        self.count += other.count;
        self.names.extend(other.names);
        self.names.truncate(MAX_NAMES);
    }

    /// Counts the fields. A metric has no names: they are the client's text.
    pub(super) fn count_in(&self, telemetry: &Telemetry) {
        telemetry.ignored_fields.increment(self.count);
    }

    /// Names the fields in an answer's header, if there are any.
    pub(super) fn name_in(&self, mut response: Response) -> Response {
        if let Some(value) = self.header() {
            response.headers_mut().insert(X_IGNORED_FIELDS, value);
        }
        response
    }

    /// `a,b,+3`: the names, and how many more there are.
    fn header(&self) -> Option<HeaderValue> {
        if self.count == 0 {
            return None;
        }
        let mut value = self.names.join(",");
        let named = u64::try_from(self.names.len()).unwrap_or(u64::MAX);
        let more = self.count.saturating_sub(named);
        if more > 0 {
            value.push_str(&format!(",+{more}"));
        }
        Some(HeaderValue::from_str(&value).expect("encoded names are visible ASCII"))
    }
}

/// A name as part of a header: letters, digits and `-_.[]` as they are, every other byte as `%XX`. A client can
/// therefore neither add a name nor end the header.
fn encoded(path: &str) -> String {
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
        let value = ignored.header()?;
        Some(value.to_str().expect("it is ASCII").to_owned())
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
        let value = header(&vec![&*long; 1_000]).expect("there are some");
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
        let value = first.header().expect("there are some");
        assert!(value.to_str().is_ok_and(|value| value.ends_with("b,+4")));
    }
}
