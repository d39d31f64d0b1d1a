//! What a record of a completion means: a token, an end, an error. It knows nothing of how records come.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use crate::load::Fault;
use crate::stamp::{Stamp, StampObject};

/// What a record means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    Token {
        text: Cow<'a, str>,
        stamp: Option<Stamp>,
        is_last: bool,
    },
    /// The completion has ended with the token before.
    End,
    /// The server has given up.
    Error(String),
    /// Something beside the tokens, as how many there were.
    Other,
}

/// Reads the records of one stream.
///
/// The records of a stream mostly differ in the token's text and in nothing else. One that is, byte for
/// byte, the one before with another plain string in the place of its text means what that one meant,
/// so that it need not be parsed: the client then costs little beside any server.
#[derive(Default)]
pub(super) struct Completion {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Completion {
    /// What this record means.
    ///
    /// # Errors
    /// When it is no record of a completion.
    pub(super) fn read<'a>(&mut self, record: &'a [u8]) -> Result<Meaning<'a>, Fault> {
        if let Some(text) = self.text_in_place(record) {
            return Ok(Meaning::Token {
                text: Cow::Borrowed(text),
                stamp: None,
                is_last: false,
            });
        }
        let parsed: RecordObject<'a> = serde_json::from_slice(record)
            .map_err(|error| malformed(record, &error.to_string()))?;
        if let Some(error) = parsed.error {
            return Ok(Meaning::Error(error_text(&error)));
        }
        let choices = parsed
            .choices
            .ok_or_else(|| malformed(record, "no choices"))?;
        let Some(choice) = choices.into_iter().next() else {
            return Ok(Meaning::Other);
        };
        let is_last = choice.finish_reason.is_some();
        if is_last && choice.text.is_empty() {
            return Ok(Meaning::End);
        }
        let stamp = parsed.stamp.and_then(StampObject::into_stamp);
        if let (Cow::Borrowed(text), None, false) = (&choice.text, stamp, is_last) {
            self.learn(record, text);
        }
        Ok(Meaning::Token {
            text: choice.text,
            stamp,
            is_last,
        })
    }

    /// The text of a record that differs from a known one in nothing else.
    fn text_in_place<'a>(&self, record: &'a [u8]) -> Option<&'a str> {
        if self.before.is_empty() {
            return None;
        }
        let text = record.strip_prefix(self.before.as_slice())?;
        let text = text.strip_suffix(self.after.as_slice())?;
        let is_plain = |byte: &u8| !matches!(byte, b'"' | b'\\' | ..b' ');
        if !text.iter().all(is_plain) {
            return None;
        }
        std::str::from_utf8(text).ok()
    }

    /// Remembers what stands around the text, which is a part of the record itself.
    fn learn(&mut self, record: &[u8], text: &str) {
        let start = text.as_ptr().addr() - record.as_ptr().addr();
        let (before, after) = (&record[..start], &record[start + text.len()..]);
        self.before.clear();
        self.before.extend_from_slice(before);
        self.after.clear();
        self.after.extend_from_slice(after);
    }
}

#[derive(Deserialize)]
struct RecordObject<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    stamp: Option<StampObject>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
    finish_reason: Option<Value>,
}

fn error_text(error: &Value) -> String {
    let message = error.get("message").unwrap_or(error);
    message
        .as_str()
        .map_or_else(|| message.to_string(), str::to_owned)
}

fn malformed(record: &[u8], why: &str) -> Fault {
    let record = String::from_utf8_lossy(record);
    Fault::Malformed(format!("{record:?} ({why})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Meaning<'_> {
        Meaning::Token {
            text: Cow::Borrowed(text),
            stamp: None,
            is_last: false,
        }
    }

    fn record(text: &str, rest: &str) -> String {
        format!("{{\"id\":\"x\",\"choices\":[{{\"index\":0,\"text\":\"{text}\"{rest}}}]}}")
    }

    #[test]
    fn a_record_like_the_one_before_means_the_same_with_another_text() {
        let mut completion = Completion::default();
        for text in ["a", "", " Paris", "ß", "b"] {
            let record = record(text, "");
            assert_eq!(completion.read(record.as_bytes()).unwrap(), token(text));
        }
    }

    #[test]
    fn a_record_that_only_looks_like_the_one_before_is_read_anew() {
        let mut completion = Completion::default();
        completion.read(record("a", "").as_bytes()).unwrap();
        let escaped = record("\\n\\u00df", "");
        assert_eq!(completion.read(escaped.as_bytes()).unwrap(), token("\nß"));
        // Another field in the place of the text's end.
        let last = record("b\",\"finish_reason\":\"stop", "");
        let meaning = completion.read(last.as_bytes()).unwrap();
        assert!(
            matches!(meaning, Meaning::Token { is_last: true, .. }),
            "{meaning:?}"
        );
        assert!(completion.read(record("\n", "").as_bytes()).is_err());
    }

    #[test]
    fn the_end_may_have_a_record_of_its_own() {
        let mut completion = Completion::default();
        let mut read = |record: &str| format!("{:?}", completion.read(record.as_bytes()).unwrap());
        assert_eq!(read(&record("", ",\"finish_reason\":\"stop\"")), "End");
        assert_eq!(
            read("{\"choices\":[],\"usage\":{\"completion_tokens\":2}}"),
            "Other"
        );
    }

    #[test]
    fn an_error_is_told_in_its_own_words() {
        let mut completion = Completion::default();
        for error in ["{\"message\":\"Gone.\",\"code\":500}", "\"Gone.\""] {
            let record = format!("{{\"error\":{error}}}");
            let meaning = completion.read(record.as_bytes()).unwrap();
            assert_eq!(meaning, Meaning::Error("Gone.".to_owned()));
        }
    }

    #[test]
    fn stamps_are_read_also_from_devices_without_a_schedule() {
        let mut completion = Completion::default();
        for (stamp, due_ns) in [("\"due_ns\":3,", Some(3)), ("", None)] {
            let record = format!(
                "{{\"choices\":[{{\"text\":\"a\"}}],\"stamp\":{{{stamp}\"emitted_ns\":4}}}}"
            );
            let meaning = completion.read(record.as_bytes()).unwrap();
            let (text, is_last) = (Cow::Borrowed("a"), false);
            let stamp = Some(Stamp {
                due_ns,
                emitted_ns: 4,
            });
            assert_eq!(
                meaning,
                Meaning::Token {
                    text,
                    stamp,
                    is_last
                }
            );
        }
    }

    #[test]
    fn what_is_no_record_of_a_completion_is_refused() {
        for wrong in ["{}", "[]", "{\"choices\":[{\"delta\":{}}]}", "token_0", ""] {
            assert!(
                Completion::default().read(wrong.as_bytes()).is_err(),
                "{wrong}"
            );
        }
    }
}
