//! JSON strings that are read without an allocation of their own: they stay as they are in the JSON, and are appended to
//! a buffer.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A JSON value that should be a string, as it stands in the JSON: with its quotes and its escapes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct JsonText<'a> {
    #[serde(borrow)]
    raw: &'a RawValue,
}

impl<'a> JsonText<'a> {
    /// Reads a JSON literal, such as `"\"stop\""`. `None` if it is not valid JSON.
    pub(super) fn constant(json: &'a str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// Returns the string between its quotes, with its escapes. `None` if the value is not a string.
    fn escaped(self) -> Option<&'a str> {
        self.raw.get().strip_prefix('"')?.strip_suffix('"')
    }

    /// Returns true if this is a string.
    pub(super) fn is_string(self) -> bool {
        self.escaped().is_some()
    }

    /// Returns true if this is the empty string.
    pub(super) fn is_empty(self) -> bool {
        self.escaped() == Some("")
    }

    /// Returns true if this is a string and equals `text`, which must not contain characters that JSON escapes.
    pub(super) fn is(self, text: &str) -> bool {
        self.escaped() == Some(text)
    }

    /// Appends the string to `out`. Returns false if the value is not a string.
    ///
    /// A surrogate without its pair becomes U+FFFD, because it is not a character.
    pub(super) fn append_to(self, out: &mut String) -> bool {
        let Some(mut rest) = self.escaped() else {
            return false;
        };
        while let Some(at) = memchr::memchr(b'\\', rest.as_bytes()) {
            out.push_str(&rest[..at]);
            let (character, after) = unescape(&rest[at + 1..]);
            out.push(character);
            rest = after;
        }
        out.push_str(rest);
        true
    }

    /// Returns the string, or an empty string if the value is not a string.
    pub(super) fn to_text(self) -> String {
        let mut text = String::new();
        self.append_to(&mut text);
        text
    }
}

/// Reads an escape, without its backslash. Returns its character and the rest. serde_json has checked the escape.
fn unescape(escape: &str) -> (char, &str) {
    let mut characters = escape.chars();
    let character = match characters.next() {
        Some('b') => '\u{8}',
        Some('f') => '\u{c}',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some('u') => return unescape_unicode(characters.as_str()),
        Some(same) => same,
        None => char::REPLACEMENT_CHARACTER,
    };
    (character, characters.as_str())
}

/// Reads the four digits of a `\u` escape, and the second half of a surrogate pair if there is one.
fn unescape_unicode(digits: &str) -> (char, &str) {
    let Some((unit, rest)) = code_unit(digits) else {
        return (char::REPLACEMENT_CHARACTER, digits);
    };
    let second = rest.strip_prefix("\\u").and_then(code_unit);
    if let Some((second, after)) = second
        && let Some(Ok(character)) = char::decode_utf16([unit, second]).next()
        && character.len_utf16() == 2
    {
        return (character, after);
    }
    let character = char::from_u32(unit.into()).unwrap_or(char::REPLACEMENT_CHARACTER);
    (character, rest)
}

fn code_unit(digits: &str) -> Option<(u16, &str)> {
    let (digits, rest) = digits.split_at_checked(4)?;
    Some((u16::from_str_radix(digits, 16).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(json: &str) -> String {
        let text: JsonText<'_> = serde_json::from_str(json).expect("valid JSON");
        text.to_text()
    }

    #[test]
    fn escapes_are_read_as_json_defines_them() {
        assert_eq!(
            text_of(r#""a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00z""#),
            "a\"\\/\u{8}\u{c}\n\r\té😀z"
        );
    }

    #[test]
    fn half_of_a_surrogate_pair_is_a_replacement_character() {
        assert_eq!(text_of(r#""\ud83d""#), "\u{fffd}");
        assert_eq!(text_of(r#""\ud83dx\ude00""#), "\u{fffd}x\u{fffd}");
        assert_eq!(text_of(r#""\ud83d\u0041""#), "\u{fffd}A");
    }

    #[test]
    fn other_values_are_not_strings() {
        for json in ["1", "true", "{}", "[\"a\"]"] {
            let text: JsonText<'_> = serde_json::from_str(json).expect("valid JSON");
            assert!(!text.append_to(&mut String::new()), "{json}");
        }
    }

    #[test]
    fn every_character_is_read_back() {
        let text: String = (char::MIN..=char::MAX).collect();
        let json = serde_json::to_string(&text).expect("a string is valid JSON");
        assert!(text_of(&json) == text);
        let units = text.encode_utf16().map(|unit| format!("\\u{unit:04x}"));
        let escaped = format!("\"{}\"", units.collect::<String>());
        assert!(text_of(&escaped) == text);
    }
}
