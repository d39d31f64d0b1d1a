//! Decodes a stream's body into events: tokens, the end of the stream, an error.

use std::borrow::Cow;

use memchr::{memchr, memmem};
use serde_json::Deserializer;

use super::failure::Failure;
use super::object::{RecordObject, Timings, Usage};
use super::records::{Record, RecordSplitter};
use super::{Format, messages};
use crate::fault::Fault;
use crate::timestamps::{TEXT_STAMP, TokenTimestamps};

/// One event of a completion.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// A read of this many bytes. The events that these bytes contain follow.
    BytesRead(usize),
    /// The first event of a gRPC stream.
    Started,
    Token(Token<'a>),
    /// The finish reason. No token follows it.
    FinishReason,
    /// The end of the stream itself: `[DONE]`, or the summary.
    EndOfStream,
    Error(Failure),
    /// The numbers of tokens, as the server counted them, at the end of a stream.
    Usage(Usage),
    /// Any other record, such as the role of a chat message.
    Other,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) text: Cow<'a, str>,
    /// Index of the token, which only gRPC sends.
    pub(crate) index: Option<u32>,
    pub(crate) stamp: Option<TokenTimestamps>,
    /// Length of the token's record or message in bytes, without HTTP/2 frames.
    pub(crate) bytes: usize,
}

impl Token<'_> {
    /// Moves the emission time that a scripted engine wrote after the token's text into the token's timestamps.
    pub(crate) fn take_stamp_from_text(&mut self) {
        let Some((text, time)) = self.text.split_once(TEXT_STAMP) else {
            return;
        };
        if let Ok(emitted_ns) = time.parse() {
            let due_ns = None;
            self.stamp = Some(TokenTimestamps { due_ns, emitted_ns });
            self.text = Cow::Owned(text.to_owned());
        }
    }
}

/// Callback that consumes events.
pub(crate) trait TakeEvent: FnMut(Event<'_>) -> Result<(), Fault> {}
impl<F: FnMut(Event<'_>) -> Result<(), Fault>> TakeEvent for F {}

/// Decoder of one stream.
#[derive(Default)]
pub(crate) struct Decoder {
    records: RecordSplitter,
    completion: CompletionState,
}

/// State of a completion while its records are decoded.
///
/// Most records of an HTTP stream differ only in the token's text and timestamps. In a record that otherwise equals
/// the previous one, only these two are parsed, so that the client uses little CPU time.
#[derive(Default)]
struct CompletionState {
    before_text: Vec<u8>,
    /// Bytes between the text and the timestamps, or from the text to the end of a record without timestamps.
    after_text: Vec<u8>,
    has_finished: bool,
    is_done: bool,
    has_failed: bool,
    timings: Option<Timings>,
}

/// Key of the timestamps in a record.
const STAMP_KEY: &[u8] = b"\"stamp\":";

impl Decoder {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            records: RecordSplitter::in_format(format),
            completion: CompletionState::default(),
        }
    }

    /// Creates the decoder of an HTTP body. Its first line shows whether it is NDJSON or server-sent events.
    pub(crate) fn of_http() -> Self {
        Self::default()
    }

    /// Decodes the next piece, and passes its events to `take`.
    /// Returns the errors of `take`, and an error if the piece is not part of a completion.
    pub(crate) fn read(&mut self, piece: &[u8], mut take: impl TakeEvent) -> Result<(), Fault> {
        let Self {
            records,
            completion,
        } = self;
        records.read(piece, &mut |record| {
            completion.decode_record(record, &mut take)
        })
    }

    pub(crate) fn timings(&self) -> Option<&Timings> {
        self.completion.timings.as_ref()
    }

    /// Returns the part of the stream that has not arrived, or `None` if the stream is complete.
    pub(crate) fn missing_part(&self) -> Option<&'static str> {
        let format = self.records.format();
        if self.records.is_within_record() {
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

impl CompletionState {
    fn decode_record(
        &mut self,
        record: Record<'_>,
        take: &mut impl TakeEvent,
    ) -> Result<(), Fault> {
        if self.is_done || self.has_failed {
            return Err(Fault::Malformed("a record after the end".to_owned()));
        }
        match record {
            Record::Message(message) => {
                messages::decode(message, |event| self.emit_event(event, take))?;
                if self.is_done {
                    self.timings = messages::timings(message);
                }
                Ok(())
            }
            Record::Object(object) => self.decode_object(object, take),
            Record::Error(data) => {
                let message = String::from_utf8_lossy(data).into_owned();
                let code = None;
                self.emit_event(Event::Error(Failure { message, code }), take)
            }
            Record::Done => self.emit_event(Event::EndOfStream, take),
        }
    }

    fn decode_object(&mut self, object: &[u8], take: &mut impl TakeEvent) -> Result<(), Fault> {
        if let Some(token) = self.match_known(object) {
            return self.emit_event(Event::Token(token), take);
        }
        let parsed: RecordObject<'_> = serde_json::from_slice(object)
            .map_err(|error| Fault::malformed(&error.to_string(), object))?;
        if let Some(error) = parsed.error {
            return self.emit_event(Event::Error(Failure::from_error_object(&error)), take);
        }
        self.timings = parsed.timings;
        let choices = parsed.choices;
        let choices = choices.ok_or_else(|| Fault::malformed("no choices", object))?;
        let Some(choice) = choices.into_iter().next() else {
            return take(parsed.usage.map_or(Event::Other, Event::Usage));
        };
        let finish_reason = choice.finish_reason;
        // A chat ends with a delta that has no content. Some servers also leave out the empty text at the end.
        let no_text = || finish_reason.as_ref().map(|_| Cow::default());
        let text = match choice.delta {
            // llama.cpp's server starts a chat with a delta that has only the role.
            Some(delta) if delta.is_role_only() && finish_reason.is_none() => {
                return take(Event::Other);
            }
            Some(delta) => delta.content.or_else(no_text),
            None => choice.text.or_else(no_text),
        };
        let text = text.ok_or_else(|| Fault::malformed("no text", object))?;
        if let (Cow::Borrowed(text), None) = (&text, &finish_reason) {
            self.learn_record(object, text);
        }
        // If the finish reason becomes known only after the last token, its record has no text.
        if finish_reason.is_none() || !text.is_empty() {
            let token = Token {
                text,
                index: None,
                stamp: parsed.stamp,
                bytes: object.len(),
            };
            self.emit_event(Event::Token(token), take)?;
        }
        if finish_reason.is_some() {
            self.emit_event(Event::FinishReason, take)?;
        }
        // In a text completion, llama.cpp's server sends the usage in the record with the finish reason.
        parsed
            .usage
            .map_or(Ok(()), |usage| take(Event::Usage(usage)))
    }

    /// Passes an event to `take`. Returns an error if the event must not follow the previous events.
    fn emit_event(&mut self, event: Event<'_>, take: &mut impl TakeEvent) -> Result<(), Fault> {
        match &event {
            Event::Token(_) if self.has_finished => {
                return Err(Fault::Malformed("a token after the last".to_owned()));
            }
            Event::FinishReason => self.has_finished = true,
            Event::EndOfStream => self.is_done = true,
            Event::Error(_) => self.has_failed = true,
            Event::BytesRead(_)
            | Event::Started
            | Event::Token(_)
            | Event::Usage(_)
            | Event::Other => {}
        }
        take(event)
    }

    /// Returns the token of a record that equals the learned record except in its text and timestamps.
    fn match_known<'a>(&self, object: &'a [u8]) -> Option<Token<'a>> {
        if self.before_text.is_empty() {
            return None;
        }
        let rest = object.strip_prefix(self.before_text.as_slice())?;
        let (text, rest) = rest.split_at_checked(memchr(b'"', rest)?)?;
        if text.iter().any(|byte| matches!(byte, b'\\' | ..b' ')) {
            return None;
        }
        let rest = rest.strip_prefix(self.after_text.as_slice())?;
        let stamp = if self.after_text.ends_with(STAMP_KEY) {
            let mut stamps = Deserializer::from_slice(rest).into_iter::<TokenTimestamps>();
            let stamp = stamps.next()?.ok()?;
            (&rest[stamps.byte_offset()..] == b"}").then_some(Some(stamp))?
        } else {
            rest.is_empty().then_some(None)?
        };
        Some(Token {
            text: Cow::Borrowed(str::from_utf8(text).ok()?),
            index: None,
            stamp,
            bytes: object.len(),
        })
    }

    /// Remembers the bytes of a record around its text, for [`Self::match_known`].
    fn learn_record(&mut self, object: &[u8], text: &str) {
        let start = text.as_ptr().addr() - object.as_ptr().addr();
        let (before, after) = (&object[..start], &object[start + text.len()..]);
        let stamp = memmem::find(after, STAMP_KEY).map(|at| at + STAMP_KEY.len());
        let after = &after[..stamp.unwrap_or(after.len())];
        for (known, bytes) in [
            (&mut self.before_text, before),
            (&mut self.after_text, after),
        ] {
            known.clear();
            known.extend_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tokenway::proto::v1;
    use tokenway::proto::v1::completion_event::Event as ProtoEvent;

    use super::super::request::frame_message;
    use super::*;

    /// Decodes a body that arrives byte by byte. Returns its events as text, and the part that is missing.
    fn decode(
        mut decoder: Decoder,
        body: &[u8],
    ) -> Result<(Vec<String>, Option<&'static str>), Fault> {
        let mut events = Vec::new();
        for byte in body {
            decoder.read(&[*byte], |event| {
                events.push(match event {
                    Event::Token(Token {
                        text, index, stamp, ..
                    }) => match (index, stamp) {
                        (None, None) => text.into_owned(),
                        (index, stamp) => format!("{text} {index:?} {stamp:?}"),
                    },
                    Event::Error(failure) => format!("error: {failure}"),
                    Event::Started => "Started".to_owned(),
                    Event::FinishReason => "Finished".to_owned(),
                    Event::EndOfStream => "Done".to_owned(),
                    Event::Usage(Usage {
                        prompt_tokens,
                        completion_tokens,
                        ..
                    }) => {
                        format!("Usage {prompt_tokens} {completion_tokens}")
                    }
                    Event::BytesRead(_) | Event::Other => "Other".to_owned(),
                });
                Ok(())
            })?;
        }
        Ok((events, decoder.missing_part()))
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
        // Another field follows the text.
        let last = line("a", "") + &line("b\",\"finish_reason\":\"stop", "");
        assert_eq!(decode_http(&last).unwrap().0, ["a", "b", "Finished"]);
        assert!(decode_http(&(line("a", "") + &line("\t", ""))).is_err());
    }

    #[test]
    fn a_finish_reason_without_a_text_is_not_a_token() {
        let body = line("a", "") + &line("", ",\"finish_reason\":\"stop\"");
        let usage = "{\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n";
        let (events, missing) = decode_http(&(body + usage)).unwrap();
        assert_eq!(events, ["a", "Finished", "Usage 7 2"]);
        assert_eq!(missing, None);
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
            // Nothing may follow an error.
            assert!(decode_http(&(body + &line("a", ""))).is_err());
        }
    }

    #[test]
    fn a_stamp_may_lack_a_due_time() {
        for (due, due_ns) in [("\"due_ns\":3,", Some(3)), ("", None)] {
            let body = format!(
                "{{\"choices\":[{{\"text\":\"a\"}}],\"stamp\":{{{due}\"emitted_ns\":4}}}}\n"
            );
            let emitted_ns = 4;
            let text = format!("a None {:?}", Some(TokenTimestamps { due_ns, emitted_ns }));
            // The second record equals the first, so only its text and timestamps are parsed.
            assert_eq!(decode_http(&body.repeat(2)).unwrap().0, [&text[..]; 2]);
        }
    }

    #[test]
    fn a_record_that_is_not_of_a_completion_is_refused() {
        for wrong in ["{}", "[]", "{\"choices\":[{\"delta\":{}}]}", "token_0"] {
            let body = format!("data: {wrong}\n\n");
            assert!(decode_http(&body).is_err(), "{wrong}");
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
        .map(|event| frame_message(&v1::CompletionEvent { event: Some(event) }.encode_to_vec()))
        .to_vec();
        let decode = |events: usize| decode(Decoder::new(Format::Grpc), &body[..events].concat());
        let (events, missing) = decode(4).unwrap();
        assert_eq!(events[0], "Started");
        assert_eq!(events[1], "token_0 Some(0) None");
        let stamped = "token_3 Some(3) Some(TokenTimestamps";
        assert!(events[4].starts_with(stamped), "{events:?}");
        assert_eq!(events[5..], ["Finished", "Done"]);
        assert_eq!(missing, None);
        assert_eq!(decode(3).unwrap().1, Some("its summary"));
    }
}
