//! Writes JSON on a single line.
//!
//! Some readers of lines (Python's `splitlines`, httpx) also end a line at U+0085, U+2028 and U+2029. JSON allows
//! these characters unescaped in strings, so this module escapes them. It must not know which objects are written.

use std::io;

use memchr::memchr2_iter;
use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};

/// First byte of U+0085 in UTF-8.
pub(super) const FIRST_BYTE_OF_U0085: u8 = 0xc2;

/// First byte of U+2028 and U+2029 in UTF-8.
pub(super) const FIRST_BYTE_OF_U2028: u8 = 0xe2;

/// A character that ends a line for some readers: U+0085, U+2028 or U+2029.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LineBreak {
    /// Length of its UTF-8 encoding, in bytes.
    pub(super) length: usize,
    /// Its JSON escape sequence.
    pub(super) escape: &'static [u8; 6],
}

/// Returns the line break at the start of `bytes`, if there is one.
pub(super) fn line_break(bytes: &[u8]) -> Option<LineBreak> {
    let (length, escape) = match bytes {
        [FIRST_BYTE_OF_U0085, 0x85, ..] => (2, b"\\u0085"),
        [FIRST_BYTE_OF_U2028, 0x80, 0xa8, ..] => (3, b"\\u2028"),
        [FIRST_BYTE_OF_U2028, 0x80, 0xa9, ..] => (3, b"\\u2029"),
        _ => return None,
    };
    Some(LineBreak { length, escape })
}

/// Finds the line breaks in a text, each with its byte offset.
pub(super) fn line_breaks(text: &str) -> impl Iterator<Item = (usize, LineBreak)> {
    let bytes = text.as_bytes();
    memchr2_iter(FIRST_BYTE_OF_U0085, FIRST_BYTE_OF_U2028, bytes)
        .filter_map(|at| line_break(&bytes[at..]).map(|found| (at, found)))
}

/// Writes an object as compact JSON on one line. Map keys must be strings.
///
/// # Errors
/// The writer fails.
pub(super) fn write(out: impl io::Write, object: &impl Serialize) -> serde_json::Result<()> {
    object.serialize(&mut Serializer::with_formatter(out, OneLine))
}

/// Serializes an object as compact JSON on one line. Map keys must be strings.
pub(super) fn to_vec(object: &impl Serialize) -> Vec<u8> {
    let mut text = Vec::with_capacity(128);
    write(&mut text, object).expect("writing to a Vec cannot fail, and all map keys are strings");
    text
}

/// Compact JSON formatter that escapes line breaks in strings.
struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        let mut from = 0;
        for (at, found) in line_breaks(fragment) {
            writer.write_all(&fragment.as_bytes()[from..at])?;
            writer.write_all(found.escape)?;
            from = at + found.length;
        }
        writer.write_all(&fragment.as_bytes()[from..])
    }

    fn write_char_escape<W>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::gateway::arbitrary;

    #[test]
    fn line_breaks_inside_strings_are_escaped() {
        let texts = [
            "a\u{85}b",
            "\u{2028}",
            "\u{2029}\u{2029}end",
            "\u{84}\u{86}\u{2027}\u{202a}\u{c285}“quoted” é\n\"\\\u{7f}",
        ];
        let objects = texts.map(|text| BTreeMap::from([(text, vec![text])]));
        let json = String::from_utf8(to_vec(&objects)).expect("JSON is UTF-8");
        assert!(
            !json.contains(['\u{85}', '\u{2028}', '\u{2029}', '\n']),
            "{json}"
        );
        assert!(json.contains(r#""a\u0085b":["a\u0085b"]"#), "{json}");
        assert!(json.contains(r#"["\u2029\u2029end"]"#), "{json}");
        let read: [BTreeMap<String, Vec<String>>; 4] =
            serde_json::from_str(&json).expect("the output is valid JSON");
        for (read, text) in read.iter().zip(texts) {
            assert_eq!(read[text], [text]);
        }
    }

    #[test]
    fn json_without_line_breaks_matches_serde_json() {
        let object = serde_json::json!({"a": [1, -0.5, null, true, "é\t\u{1}“”°"], "b": {}});
        assert_eq!(to_vec(&object), object.to_string().into_bytes());
    }

    proptest! {
        #[test]
        fn any_value_is_one_line_and_reads_back_as_itself(value in arbitrary::value()) {
            let line = String::from_utf8(to_vec(&value)).expect("JSON is UTF-8");
            prop_assert!(!line.contains(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']), "{line}");
            prop_assert_eq!(serde_json::from_str::<Value>(&line).ok(), Some(value), "{}", line);
        }
    }
}
