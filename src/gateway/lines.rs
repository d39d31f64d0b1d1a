//! A stream's lines: one JSON object for each token, written by hand around the parts that are the
//! same in all of them, because this runs for every token.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::{Value, json};

use super::accept::StreamFormat;
use super::body::StreamOptions;
use super::refusal::error_object;
use crate::error::Error;
use crate::proto::v1;
use crate::tokens::{Stamp, TextToken, TokenBatch};

/// What one line takes besides its prefix, about: a short text, and what stands around it.
const LINE: usize = 96;

/// What a line's stamp takes.
const STAMP: usize = 80;

/// Writes the lines of one response.
pub struct Lines {
    format: StreamFormat,
    options: StreamOptions,
    /// Everything up to the choice's index.
    prefix: Bytes,
    /// Everything after the text of a token with which nothing ends; `None` where each token has an
    /// end of its own, with its id or its times.
    tail: Option<Bytes>,
    /// Everything after the finish reason and the token's ids and times.
    suffix: &'static str,
    head: Head,
}

/// What every object of a response has in common.
#[derive(Clone)]
pub struct Head {
    /// The response's id, `cmpl-…`.
    pub id: String,
    /// When it was made, in seconds since the Unix epoch.
    pub created: u64,
    /// The model.
    pub model: String,
}

/// A choice's tokens to be written.
pub struct ChoiceTokens<'a> {
    /// The choice's index among all of the response.
    pub index: u32,
    /// Its tokens.
    pub tokens: &'a TokenBatch,
    /// Why it ends, if it ends here.
    pub finish_reason: Option<&'static str>,
}

/// OpenAI's name of a finish reason.
pub(super) fn finish_reason(reason: v1::FinishReason) -> Option<&'static str> {
    match reason {
        v1::FinishReason::Unspecified => None,
        v1::FinishReason::Stop => Some("stop"),
        v1::FinishReason::Length => Some("length"),
    }
}

/// OpenAI's usage object.
pub(super) fn usage_object(usage: &v1::Usage) -> Value {
    let (prompt, completion) = (usage.prompt_tokens, usage.completion_tokens);
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": u64::from(prompt) + u64::from(completion),
    })
}

impl Lines {
    /// The lines of a stream of this form, with what is asked for besides the text.
    #[must_use]
    pub fn new(format: StreamFormat, options: StreamOptions, head: Head) -> Self {
        let mut prefix = BytesMut::new();
        prefix.put_slice(b"{\"id\":");
        put_json_string(&mut prefix, &head.id);
        prefix.put_slice(b",\"object\":\"text_completion\",\"created\":");
        put_number(&mut prefix, head.created);
        prefix.put_slice(b",\"model\":");
        put_json_string(&mut prefix, &head.model);
        prefix.put_slice(b",\"choices\":[{\"index\":");
        let suffix = if options.include_usage {
            ",\"usage\":null}"
        } else {
            "}"
        };
        let mut lines = Self {
            format,
            options,
            prefix: prefix.freeze(),
            tail: None,
            suffix,
            head,
        };
        if !options.return_token_ids && !options.include_stamps {
            let mut tail = BytesMut::new();
            lines.put_tail(&mut tail, None, None);
            lines.tail = Some(tail.freeze());
        }
        lines
    }

    /// One line for each token; one without text where the choice ends with no token.
    pub fn tokens(&self, out: &mut BytesMut, choice: &ChoiceTokens<'_>) {
        let Some(last) = choice.tokens.len().checked_sub(1) else {
            if choice.finish_reason.is_some() {
                self.line(out, choice.index, None, choice.finish_reason);
            }
            return;
        };
        let stamp = if self.options.include_stamps {
            STAMP
        } else {
            0
        };
        out.reserve(choice.tokens.len() * (self.prefix.len() + LINE + stamp));
        for (at, token) in choice.tokens.iter().enumerate() {
            let finish_reason = choice.finish_reason.filter(|_| at == last);
            self.line(out, choice.index, Some(&token), finish_reason);
        }
    }

    /// The last object of a stream that shows what it used or what it took. `timings` are asked for
    /// only where they are shown.
    pub(super) fn last(
        &self,
        out: &mut BytesMut,
        usage: &v1::Usage,
        timings: impl FnOnce() -> Value,
    ) {
        let StreamOptions {
            include_usage,
            include_timings,
            ..
        } = self.options;
        if !include_usage && !include_timings {
            return;
        }
        let mut object = json!({
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [],
        });
        if include_usage {
            object["usage"] = usage_object(usage);
        }
        if include_timings {
            object["timings"] = timings();
        }
        self.object(out, &object);
    }

    /// The end of a stream that succeeded.
    pub(super) fn done(&self, out: &mut BytesMut) {
        if self.format == StreamFormat::Sse {
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    /// The end of a stream that failed.
    pub(super) fn error(&self, out: &mut BytesMut, error: &Error, tokens_delivered: u64) {
        let mut object = error_object(error);
        object["error"]["tokens_delivered"] = json!(tokens_delivered);
        object["error"]["retryable"] = json!(error.kind.is_retryable());
        self.object(out, &object);
    }

    /// What keeps a silent stream alive, where the form has such a thing.
    pub(super) fn keep_alive(&self) -> Option<Bytes> {
        match self.format {
            StreamFormat::Sse => Some(Bytes::from_static(b": keep-alive\n\n")),
            StreamFormat::Ndjson => None,
        }
    }

    fn line(
        &self,
        out: &mut BytesMut,
        index: u32,
        token: Option<&TextToken<'_>>,
        finish_reason: Option<&str>,
    ) {
        self.begin(out);
        out.put_slice(&self.prefix);
        put_number(out, index);
        out.put_slice(b",\"text\":");
        put_json_string(out, token.map_or("", |token| token.text));
        match &self.tail {
            Some(tail) if finish_reason.is_none() => out.put_slice(tail),
            Some(_) | None => self.put_tail(out, token, finish_reason),
        }
    }

    /// Everything after the text.
    fn put_tail(
        &self,
        out: &mut BytesMut,
        token: Option<&TextToken<'_>>,
        finish_reason: Option<&str>,
    ) {
        out.put_slice(b",\"logprobs\":null,\"finish_reason\":");
        match finish_reason {
            None => out.put_slice(b"null"),
            Some(reason) => put_json_string(out, reason),
        }
        if self.options.return_token_ids {
            out.put_slice(b",\"token_ids\":[");
            if let Some(token) = token {
                put_number(out, token.id);
            }
            out.put_slice(b"]");
        }
        out.put_slice(b"}]");
        if self.options.include_stamps
            && let Some(token) = token
        {
            put_stamp(out, token.stamp);
        }
        out.put_slice(self.suffix.as_bytes());
        self.end(out);
    }

    fn object(&self, out: &mut BytesMut, object: &Value) {
        self.begin(out);
        out.put_slice(object.to_string().as_bytes());
        self.end(out);
    }

    fn begin(&self, out: &mut BytesMut) {
        if self.format == StreamFormat::Sse {
            out.put_slice(b"data: ");
        }
    }

    fn end(&self, out: &mut BytesMut) {
        out.put_slice(match self.format {
            StreamFormat::Ndjson => b"\n",
            StreamFormat::Sse => b"\n\n",
        });
    }
}

fn put_number(out: &mut BytesMut, number: impl itoa::Integer) {
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn put_stamp(out: &mut BytesMut, stamp: Stamp) {
    out.put_slice(b",\"stamp\":{\"due_ns\":");
    put_time(out, stamp.due_ns);
    out.put_slice(b",\"emitted_ns\":");
    put_time(out, stamp.emitted_ns);
    out.put_slice(b"}");
}

/// A time that may be unknown.
fn put_time(out: &mut BytesMut, time_ns: u64) {
    match time_ns {
        0 => out.put_slice(b"null"),
        time_ns => put_number(out, time_ns),
    }
}

/// A JSON string. Most tokens need no escape, and are copied at once.
fn put_json_string(out: &mut BytesMut, text: &str) {
    out.put_u8(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|byte| needs_escape(*byte)) {
        out.put_slice(&rest[..at]);
        put_escape(out, rest[at]);
        rest = &rest[at + 1..];
    }
    out.put_slice(rest);
    out.put_u8(b'"');
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

fn put_escape(out: &mut BytesMut, byte: u8) {
    match byte {
        b'"' => out.put_slice(b"\\\""),
        b'\\' => out.put_slice(b"\\\\"),
        b'\n' => out.put_slice(b"\\n"),
        b'\r' => out.put_slice(b"\\r"),
        b'\t' => out.put_slice(b"\\t"),
        other => {
            let digits = b"0123456789abcdef";
            out.put_slice(b"\\u00");
            out.put_u8(digits[usize::from(other >> 4)]);
            out.put_u8(digits[usize::from(other & 0xf)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(format: StreamFormat, options: StreamOptions) -> Lines {
        let head = Head {
            id: "cmpl-1".to_owned(),
            created: 7,
            model: "m\"1".to_owned(),
        };
        Lines::new(format, options, head)
    }

    fn tokens(texts: &[&str]) -> TokenBatch {
        let stamp = Stamp {
            due_ns: 1,
            emitted_ns: 2,
        };
        let mut batch = TokenBatch::default();
        for text in texts {
            batch.push(TextToken {
                id: 9,
                text,
                stamp,
                logprobs: None,
            });
        }
        batch
    }

    fn written(write: impl FnOnce(&mut BytesMut)) -> String {
        let mut out = BytesMut::new();
        write(&mut out);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn a_token_is_one_line_of_openais_object() {
        let lines = lines(StreamFormat::Ndjson, StreamOptions::default());
        let tokens = tokens(&["a", "b"]);
        let text = written(|out| {
            let choice = ChoiceTokens {
                index: 3,
                tokens: &tokens,
                finish_reason: Some("length"),
            };
            lines.tokens(out, &choice);
        });
        assert_eq!(
            text,
            "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":7,\"model\":\"m\\\"1\",\
             \"choices\":[{\"index\":3,\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null}]}\n\
             {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":7,\"model\":\"m\\\"1\",\
             \"choices\":[{\"index\":3,\"text\":\"b\",\"logprobs\":null,\
             \"finish_reason\":\"length\"}]}\n"
        );
    }

    #[test]
    fn every_line_is_the_json_that_it_should_be() {
        let options = StreamOptions {
            include_usage: true,
            include_stamps: true,
            include_timings: true,
            return_token_ids: true,
        };
        let nasty: String = (0..0x30_u8)
            .map(char::from)
            .chain("\"\\é😀\u{7f}".chars())
            .collect();
        let text = written(|out| {
            let tokens = tokens(&[&nasty]);
            let choice = ChoiceTokens {
                index: 0,
                tokens: &tokens,
                finish_reason: None,
            };
            lines(StreamFormat::Ndjson, options).tokens(out, &choice);
        });
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["choices"][0]["text"], nasty);
        assert_eq!(line["choices"][0]["token_ids"], json!([9]));
        assert_eq!(line["stamp"], json!({"due_ns": 1, "emitted_ns": 2}));
        assert_eq!(line.get("usage"), Some(&Value::Null));
        assert_eq!(text.matches('\n').count(), 1);
    }

    #[test]
    fn an_end_without_a_token_has_a_line_of_its_own() {
        let text = written(|out| {
            let choice = ChoiceTokens {
                index: 0,
                tokens: &TokenBatch::default(),
                finish_reason: Some("stop"),
            };
            lines(StreamFormat::Sse, StreamOptions::default()).tokens(out, &choice);
        });
        let line: Value =
            serde_json::from_str(text.strip_prefix("data: ").unwrap().trim_end()).unwrap();
        assert_eq!(line["choices"][0]["text"], "");
        assert_eq!(line["choices"][0]["finish_reason"], "stop");
        assert!(text.ends_with("\n\n"));
    }

    #[test]
    fn only_server_sent_events_have_a_done_and_a_keep_alive() {
        let sse = lines(StreamFormat::Sse, StreamOptions::default());
        let ndjson = lines(StreamFormat::Ndjson, StreamOptions::default());
        assert_eq!(written(|out| sse.done(out)), "data: [DONE]\n\n");
        assert_eq!(written(|out| ndjson.done(out)), "");
        assert!(
            sse.keep_alive()
                .is_some_and(|comment| comment.starts_with(b":"))
        );
        assert_eq!(ndjson.keep_alive(), None);
    }
}
