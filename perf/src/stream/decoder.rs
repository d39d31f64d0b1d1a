//! Decodes a stream's body into events: tokens, the end, an error. It does not know how the body is
//! transported.

use std::borrow::Cow;

use prost::Message;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event as ProtoEvent;
use tokenway::tokens::TextToken;

use super::Format;
use super::failure::Failure;
use super::records::{Record, Records};
use crate::fault::Fault;
use crate::stamp::{Stamp, StampObject};

/// One event of a completion.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// First event of a gRPC stream.
    Started,
    Token(Token<'a>),
    /// The finish reason. No token follows.
    Finished,
    /// The end of the stream itself: `[DONE]`, or the summary.
    Done,
    Error(Failure),
    /// A record beside the tokens, such as usage.
    Other,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) text: Cow<'a, str>,
    /// Index that gRPC sends beside the text.
    pub(crate) index: Option<u32>,
    pub(crate) stamp: Option<Stamp>,
}

/// Decoder of one stream.
#[derive(Default)]
pub(crate) struct Decoder {
    records: Records,
    completion: Completion,
}

/// State of a completion, record by record.
///
/// The records of an HTTP stream mostly differ in nothing but the token's text. A record that equals the
/// one before except for a plain string in place of the text means the same, so it is not parsed: the
/// client then costs little beside any server.
#[derive(Default)]
struct Completion {
    before_text: Vec<u8>,
    after_text: Vec<u8>,
    has_finished: bool,
    is_done: bool,
    has_failed: bool,
}

impl Decoder {
    pub(crate) fn of(format: Format) -> Self {
        Self {
            records: Records::in_format(format),
            completion: Completion::default(),
        }
    }

    /// Decoder of an HTTP body whose first line shows if it is NDJSON or server-sent events.
    pub(crate) fn of_http() -> Self {
        Self::default()
    }

    /// Decodes the next piece, and passes its events to `take`.
    ///
    /// # Errors
    /// Those of `take`, and if the piece is not part of a completion.
    pub(crate) fn read(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(Event<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let Self {
            records,
            completion,
        } = self;
        records.read(piece, &mut |record| completion.record(record, &mut take))
    }

    /// Reports if the finish reason has arrived.
    pub(crate) fn has_finished(&self) -> bool {
        self.completion.has_finished
    }

    /// Part of a complete stream that has not arrived; `None` if the stream is complete.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        let format = self.records.format();
        if self.records.is_within_one() {
            Some("the end of its last record")
        } else if format == Some(Format::Grpc) && !self.completion.is_done {
            Some("its summary")
        } else if !self.completion.has_finished {
            Some("a finish_reason")
        } else if format == Some(Format::Sse) && !self.completion.is_done {
            Some("[DONE]")
        } else {
            None
        }
    }
}

impl Completion {
    fn record(
        &mut self,
        record: Record<'_>,
        take: &mut impl FnMut(Event<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        if self.is_done || self.has_failed {
            return Err(Fault::Malformed("a record after the end".to_owned()));
        }
        match record {
            Record::Message(message) => self.message(message, take),
            Record::Object(object) => self.object(object, take),
            Record::Error(data) => {
                self.has_failed = true;
                let message = String::from_utf8_lossy(data).into_owned();
                take(Event::Error(Failure {
                    message,
                    code: None,
                }))
            }
            Record::Done => {
                self.is_done = true;
                take(Event::Done)
            }
        }
    }

    fn object(
        &mut self,
        object: &[u8],
        take: &mut impl FnMut(Event<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        if let Some(text) = self.text_in_place(object) {
            let text = Cow::Borrowed(text);
            return self.token(text, None, None, take);
        }
        let parsed: RecordObject<'_> = serde_json::from_slice(object)
            .map_err(|error| Fault::malformed(&error.to_string(), object))?;
        if let Some(error) = parsed.error {
            self.has_failed = true;
            return take(Event::Error(Failure::of(&error)));
        }
        let choices = parsed.choices;
        let choices = choices.ok_or_else(|| Fault::malformed("no choices", object))?;
        let Some(choice) = choices.into_iter().next() else {
            return take(Event::Other);
        };
        let is_last = choice.finish_reason.is_some();
        let stamp = parsed.stamp.and_then(StampObject::into_stamp);
        if let (Cow::Borrowed(text), None, false) = (&choice.text, stamp, is_last) {
            self.learn(object, text);
        }
        // A finish reason that is known only after the last token has a record without a text.
        if !(is_last && choice.text.is_empty()) {
            self.token(choice.text, None, stamp, take)?;
        }
        self.has_finished |= is_last;
        if is_last {
            take(Event::Finished)
        } else {
            Ok(())
        }
    }

    fn message(
        &mut self,
        message: &[u8],
        take: &mut impl FnMut(Event<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let event = v1::CompletionEvent::decode(message);
        let event = event.map_err(|error| Fault::malformed(&error.to_string(), message))?;
        match event.event {
            Some(ProtoEvent::Started(_)) => take(Event::Started),
            Some(ProtoEvent::Prompt(_)) => take(Event::Other),
            Some(ProtoEvent::Tokens(tokens)) => {
                for (token, index) in tokens.tokens.iter().zip(tokens.first_index..) {
                    let text = Cow::Borrowed(token.text);
                    self.token(text, Some(index), stamp_of(&token), take)?;
                }
                if tokens.finish_reason() == v1::FinishReason::Unspecified {
                    return Ok(());
                }
                self.has_finished = true;
                take(Event::Finished)
            }
            Some(ProtoEvent::Summary(_)) => {
                self.is_done = true;
                take(Event::Done)
            }
            None => Err(Fault::malformed("an event of an unknown kind", message)),
        }
    }

    fn token(
        &mut self,
        text: Cow<'_, str>,
        index: Option<u32>,
        stamp: Option<Stamp>,
        take: &mut impl FnMut(Event<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        if self.has_finished {
            return Err(Fault::Malformed("a token after the last".to_owned()));
        }
        take(Event::Token(Token { text, index, stamp }))
    }

    /// Text of a record that equals a known one in everything else.
    fn text_in_place<'a>(&self, object: &'a [u8]) -> Option<&'a str> {
        if self.before_text.is_empty() {
            return None;
        }
        let text = object.strip_prefix(self.before_text.as_slice())?;
        let text = text.strip_suffix(self.after_text.as_slice())?;
        let is_plain = |byte: &u8| !matches!(byte, b'"' | b'\\' | ..b' ');
        if !text.iter().all(is_plain) {
            return None;
        }
        std::str::from_utf8(text).ok()
    }

    /// Remembers the bytes around a text that is a slice of its record.
    fn learn(&mut self, object: &[u8], text: &str) {
        let start = text.as_ptr().addr() - object.as_ptr().addr();
        self.before_text.clear();
        self.before_text.extend_from_slice(&object[..start]);
        self.after_text.clear();
        self.after_text
            .extend_from_slice(&object[start + text.len()..]);
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
    finish_reason: Option<IgnoredAny>,
}

/// Stamp of a token over gRPC, in which 0 means unknown.
fn stamp_of(token: &TextToken<'_>) -> Option<Stamp> {
    let known = |ns: u64| Some(ns).filter(|ns| *ns > 0);
    Some(Stamp {
        due_ns: known(token.timestamps.due_ns),
        emitted_ns: known(token.timestamps.emitted_ns)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::request::framed;
    use super::*;

    /// Events of a body that arrives byte by byte, as text, and the part that is missing.
    fn decode(
        mut decoder: Decoder,
        body: &[u8],
    ) -> Result<(Vec<String>, Option<&'static str>), Fault> {
        let mut events = Vec::new();
        for byte in body {
            decoder.read(&[*byte], |event| {
                events.push(match event {
                    Event::Token(Token { text, index, stamp }) => match (index, stamp) {
                        (None, None) => text.into_owned(),
                        (index, stamp) => format!("{text} {index:?} {stamp:?}"),
                    },
                    Event::Error(failure) => format!("error: {failure}"),
                    Event::Started => "Started".to_owned(),
                    Event::Finished => "Finished".to_owned(),
                    Event::Done => "Done".to_owned(),
                    Event::Other => "Other".to_owned(),
                });
                Ok(())
            })?;
        }
        Ok((events, decoder.missing()))
    }

    fn decode_http(body: &str) -> Result<(Vec<String>, Option<&'static str>), Fault> {
        decode(Decoder::of_http(), body.as_bytes())
    }

    fn line(text: &str, rest: &str) -> String {
        format!("{{\"id\":\"x\",\"choices\":[{{\"index\":0,\"text\":\"{text}\"{rest}}}]}}\n")
    }

    #[test]
    fn a_record_that_differs_only_in_its_text_means_the_same() {
        let texts = ["a", "", " Paris", "ß", "b"];
        let body: String = texts.iter().map(|text| line(text, "")).collect();
        assert_eq!(decode_http(&body).unwrap().0, texts);
    }

    #[test]
    fn a_record_that_differs_in_more_than_its_text_is_parsed() {
        let escaped = line("a", "") + &line("\\n\\u00df", "");
        assert_eq!(decode_http(&escaped).unwrap().0, ["a", "\nß"]);
        // Another field in the place of the text's end.
        let last = line("a", "") + &line("b\",\"finish_reason\":\"stop", "");
        assert_eq!(decode_http(&last).unwrap().0, ["a", "b", "Finished"]);
        assert!(decode_http(&(line("a", "") + &line("\t", ""))).is_err());
    }

    #[test]
    fn a_finish_reason_without_a_text_is_not_a_token() {
        let body = line("a", "") + &line("", ",\"finish_reason\":\"stop\"");
        let usage = "{\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n";
        let (events, missing) = decode_http(&(body + usage)).unwrap();
        assert_eq!(
            (&events[..], missing),
            (&["a", "Finished", "Other"].map(str::to_owned)[..], None)
        );
    }

    #[test]
    fn an_error_keeps_its_own_words() {
        for (error, text) in [
            ("{\"message\":\"Gone.\",\"code\":500}", "error: Gone."),
            (
                "{\"message\":\"Gone.\",\"code\":\"worker_lost\"}",
                "error: Gone. (worker_lost)",
            ),
            ("\"Gone.\"", "error: Gone."),
        ] {
            let body = format!("{{\"error\":{error}}}\n");
            assert_eq!(decode_http(&body).unwrap().0, [text]);
            assert!(
                decode_http(&(body + &line("a", ""))).is_err(),
                "an error is the end"
            );
        }
    }

    #[test]
    fn a_stamp_may_lack_a_due_time() {
        for (due, due_ns) in [("\"due_ns\":3,", Some(3)), ("", None)] {
            let body = format!(
                "{{\"choices\":[{{\"text\":\"a\"}}],\"stamp\":{{{due}\"emitted_ns\":4}}}}\n"
            );
            let stamp = Stamp {
                due_ns,
                emitted_ns: 4,
            };
            let text = format!("a None {:?}", Some(stamp));
            assert_eq!(decode_http(&body).unwrap().0, [text]);
        }
    }

    #[test]
    fn a_stream_is_complete_once_its_end_has_arrived_and_no_sooner() {
        let (first, last) = (line("a", ""), line("b", ",\"finish_reason\":\"length\""));
        let missing = |body: &str| decode_http(body).unwrap().1;
        assert_eq!(missing(&first), Some("a finish_reason"));
        assert_eq!(missing(&last), None);
        assert_eq!(
            missing(&(last.clone() + "{")),
            Some("the end of its last record")
        );
        let events = format!(": alive\n\ndata: {first}\ndata: {last}\n");
        assert_eq!(missing(&events), Some("[DONE]"));
        let done = events + "data: [DONE]\n\n";
        assert_eq!(missing(&done), None);
        assert!(decode_http(&(done + "data: {}\n\n")).is_err());
        assert!(decode_http(&(last.clone() + &first)).is_err());
    }

    #[test]
    fn a_record_that_is_not_of_a_completion_is_refused() {
        for wrong in ["{}", "[]", "{\"choices\":[{\"delta\":{}}]}", "token_0"] {
            assert!(
                decode_http(&format!("data: {wrong}\n\n")).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn grpc_messages_are_decoded_and_the_summary_is_the_end() {
        let token = |index: u32| v1::Token {
            text: format!("token_{index}"),
            emitted_ns: (index == 3).then_some(9),
            ..v1::Token::default()
        };
        let tokens = |first_index, finish_reason: v1::FinishReason| {
            ProtoEvent::Tokens(v1::Tokens {
                first_index,
                tokens: [token(first_index), token(first_index + 1)]
                    .into_iter()
                    .collect(),
                finish_reason: finish_reason.into(),
                ..v1::Tokens::default()
            })
        };
        let body: Vec<_> = [
            ProtoEvent::Started(v1::Started::default()),
            tokens(0, v1::FinishReason::Unspecified),
            tokens(2, v1::FinishReason::Length),
            ProtoEvent::Summary(v1::Summary::default()),
        ]
        .map(|event| framed(&v1::CompletionEvent { event: Some(event) }.encode_to_vec()))
        .to_vec();
        let decode = |events: usize| decode(Decoder::of(Format::Grpc), &body[..events].concat());
        let (events, missing) = decode(4).unwrap();
        assert_eq!(events[0], "Started");
        assert_eq!(events[1], "token_0 Some(0) None");
        assert!(
            events[4].starts_with("token_3 Some(3) Some(Stamp"),
            "{events:?}"
        );
        assert_eq!(
            (&events[5..], missing),
            (&["Finished", "Done"].map(str::to_owned)[..], None)
        );
        assert_eq!(decode(3).unwrap().1, Some("its summary"));
    }
}
