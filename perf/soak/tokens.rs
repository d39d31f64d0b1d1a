//! The tokens of a stream as its body's pieces bring them, in any of the three forms. Each must be
//! the next: one that is lost, repeated or swapped is a fault.

use std::borrow::Cow;

use prost::Message;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;

use super::Fault;
use crate::order::index_of;

/// The head of a gRPC message: a flag and its length.
const HEAD: usize = 5;

/// How a stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Ndjson,
    Sse,
    Grpc,
}

/// What has come of a stream.
pub(super) struct Tokens {
    form: Form,
    /// The beginning of what has not come whole.
    unfinished: Vec<u8>,
    next_index: u32,
    stage: Stage,
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    /// The last token has come, and what must follow it has not: `[DONE]`, or the summary.
    Finished,
    Whole,
    /// Its last record names an error.
    Failed(ErrorKind),
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    #[serde(borrow)]
    error: Option<ErrorRecord<'a>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct ErrorRecord<'a> {
    #[serde(borrow)]
    code: Cow<'a, str>,
}

impl Tokens {
    pub(super) fn new(form: Form) -> Self {
        Self {
            form,
            unfinished: Vec::new(),
            next_index: 0,
            stage: Stage::Open,
        }
    }

    /// How many have come.
    pub(super) fn count(&self) -> u32 {
        self.next_index
    }

    /// How far the stream is; an end counts only where nothing follows it.
    pub(super) fn stage(&self) -> Stage {
        if self.unfinished.is_empty() {
            self.stage
        } else {
            Stage::Open
        }
    }

    /// Takes the next piece.
    pub(super) fn read(&mut self, piece: &[u8]) -> Result<(), Fault> {
        let mut bytes = std::mem::take(&mut self.unfinished);
        bytes.extend_from_slice(piece);
        let mut rest = &bytes[..];
        match self.form {
            Form::Ndjson | Form::Sse => {
                while let Some(end) = memchr::memchr(b'\n', rest) {
                    self.line(&rest[..end])?;
                    rest = &rest[end + 1..];
                }
            }
            Form::Grpc => {
                while let Some((message, after)) = message(rest) {
                    self.event(message)?;
                    rest = after;
                }
            }
        }
        self.unfinished = rest.to_vec();
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> Result<(), Fault> {
        let object = match self.form {
            Form::Sse if line.is_empty() || line.starts_with(b":") => return Ok(()),
            Form::Sse => line.strip_prefix(b"data: ").ok_or_else(|| odd(line))?,
            Form::Ndjson | Form::Grpc => line,
        };
        match self.stage {
            Stage::Open => {}
            Stage::Finished if object == b"[DONE]" => {
                self.stage = Stage::Whole;
                return Ok(());
            }
            Stage::Finished | Stage::Whole | Stage::Failed(_) => return Err(odd(line)),
        }
        let parsed: Line<'_> = serde_json::from_slice(object).map_err(|_| odd(line))?;
        if let Some(error) = parsed.error {
            let kind = ErrorKind::from_code(&error.code).ok_or_else(|| odd(line))?;
            self.stage = Stage::Failed(kind);
            return Ok(());
        }
        let [choice] = &parsed.choices[..] else {
            return Err(odd(line));
        };
        self.token(&choice.text)?;
        if choice.finish_reason.is_some() {
            self.stage = match self.form {
                Form::Sse => Stage::Finished,
                Form::Ndjson | Form::Grpc => Stage::Whole,
            };
        }
        Ok(())
    }

    fn event(&mut self, message: &[u8]) -> Result<(), Fault> {
        let event = v1::CompletionEvent::decode(message).map_err(|_| odd(message))?;
        match (event.event, self.stage) {
            (Some(Event::Started(_)), Stage::Open) if self.next_index == 0 => Ok(()),
            (Some(Event::Tokens(tokens)), Stage::Open) => {
                if tokens.first_index != self.next_index {
                    return Err(self.out_of_order(&format!("index {}", tokens.first_index)));
                }
                for token in tokens.tokens.iter() {
                    self.token(token.text)?;
                }
                if tokens.finish_reason() != v1::FinishReason::Unspecified {
                    self.stage = Stage::Finished;
                }
                Ok(())
            }
            (Some(Event::Summary(_)), Stage::Finished) => {
                self.stage = Stage::Whole;
                Ok(())
            }
            _ => Err(odd(message)),
        }
    }

    fn token(&mut self, text: &str) -> Result<(), Fault> {
        if index_of(text) != Some(self.next_index) {
            return Err(self.out_of_order(text));
        }
        self.next_index += 1;
        Ok(())
    }

    fn out_of_order(&self, found: &str) -> Fault {
        Fault::Order {
            expected: self.next_index,
            found: found.to_owned(),
        }
    }
}

/// The first message, when it is whole, and what follows it.
fn message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let [_, length @ ..] = *head;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    rest.split_at_checked(length)
}

fn odd(what: &[u8]) -> Fault {
    Fault::Malformed(String::from_utf8_lossy(what).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(index: u32, reason: &str) -> String {
        format!("{{\"choices\":[{{\"text\":\"token_{index}\",\"finish_reason\":{reason}}}]}}\n")
    }

    fn read(form: Form, bytes: &[u8]) -> Result<Tokens, Fault> {
        let mut tokens = Tokens::new(form);
        for byte in bytes {
            tokens.read(&[*byte])?;
        }
        Ok(tokens)
    }

    #[test]
    fn a_stream_is_whole_when_its_end_has_come_and_no_sooner() {
        let (first, last) = (line(0, "null"), line(1, "\"length\""));
        let ndjson = read(Form::Ndjson, (first.clone() + &last).as_bytes()).unwrap();
        assert_eq!((ndjson.stage(), ndjson.count()), (Stage::Whole, 2));
        let open = read(Form::Ndjson, first.as_bytes()).unwrap();
        assert_eq!(open.stage(), Stage::Open);
        let events = format!(": alive\n\ndata: {first}\ndata: {last}\n");
        let open = read(Form::Sse, events.as_bytes()).unwrap();
        assert_eq!(open.stage(), Stage::Finished);
        let events = events + "data: [DONE]\n\n";
        let whole = read(Form::Sse, events.as_bytes()).unwrap();
        assert_eq!(whole.stage(), Stage::Whole);
    }

    #[test]
    fn an_error_record_is_the_end_and_names_its_kind() {
        let record = "{\"error\":{\"message\":\"no\",\"code\":\"slow_reader\"}}\n";
        let failed = read(Form::Ndjson, (line(0, "null") + record).as_bytes()).unwrap();
        assert_eq!(failed.stage(), Stage::Failed(ErrorKind::SlowReader));
        let after = record.to_owned() + &line(0, "null");
        assert!(read(Form::Ndjson, after.as_bytes()).is_err());
    }

    #[test]
    fn a_line_that_is_lost_repeated_or_foreign_is_a_fault() {
        for wrong in [
            line(1, "null"),
            line(0, "null") + &line(0, "null"),
            line(0, "\"length\"") + &line(1, "null"),
            "{\"choices\":[]}\n".to_owned(),
        ] {
            assert!(read(Form::Ndjson, wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    fn framed(event: Event) -> Vec<u8> {
        let message = v1::CompletionEvent { event: Some(event) }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), &message].concat()
    }

    fn tokens(first_index: u32, indices: &[u32], finish: v1::FinishReason) -> Vec<u8> {
        let token = |index: &u32| v1::Token {
            text: format!("token_{index}"),
            ..v1::Token::default()
        };
        framed(Event::Tokens(v1::Tokens {
            first_index,
            tokens: indices.iter().map(token).collect(),
            finish_reason: finish.into(),
            ..v1::Tokens::default()
        }))
    }

    #[test]
    fn messages_are_read_and_their_summary_is_the_end() {
        let (open, length) = (v1::FinishReason::Unspecified, v1::FinishReason::Length);
        let bytes = [
            framed(Event::Started(v1::Started::default())),
            tokens(0, &[0, 1], open),
            tokens(2, &[2], length),
        ]
        .concat();
        let unended = read(Form::Grpc, &bytes).unwrap();
        assert_eq!((unended.stage(), unended.count()), (Stage::Finished, 3));
        let summary = framed(Event::Summary(v1::Summary::default()));
        let whole = read(Form::Grpc, &[bytes, summary].concat()).unwrap();
        assert_eq!(whole.stage(), Stage::Whole);
        for wrong in [
            tokens(1, &[1], open),
            tokens(0, &[0, 2], open),
            tokens(1, &[0], open),
        ] {
            assert!(read(Form::Grpc, &wrong).is_err());
        }
    }
}
