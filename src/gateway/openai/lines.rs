//! Writes the lines of a stream: one JSON object per token.
//!
//! This code runs for every token. The parts that all objects of a response share are encoded only once.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::{ChatLogprobs, CompletionLogprobs, char_count};
use super::metadata::CompletionRoute;
use super::stream_options::StreamOptions;
use super::timings;
use super::usage::{Usage, finish_reason_name};
use crate::error::Error;
use crate::gateway::accept::StreamFormat;
use crate::gateway::dialect::{FinishReason, RecordWriter, StreamEnd, StreamRequest};
use crate::gateway::echoed_prompts::PromptEcho;
use crate::gateway::error_response::ErrorObject;
use crate::proto::v1;
use crate::tokens::TextToken;

mod chat_delta;
mod json;
#[cfg(test)]
mod tests;

pub use super::metadata::ResponseMetadata;
pub use crate::gateway::dialect::ChoiceTokens;

use chat_delta::DeltaObject;
use json::{put_json_string, put_number, put_timestamps};

/// Estimated length of a line without its prefix, in bytes.
const LINE_BYTES: usize = 96;

/// Estimated length of a line's timestamps, in bytes.
const TIMESTAMPS_BYTES: usize = 80;

/// Writes the lines of one streamed response: NDJSON lines or server-sent events.
pub struct LineWriter {
    format: StreamFormat,
    options: StreamOptions,
    /// JSON up to the choice's index.
    prefix: Bytes,
    /// JSON between the choice's index and the text.
    before_text: &'static str,
    /// JSON that closes the object around the text.
    after_text: &'static str,
    /// JSON after the text of a token that does not end its choice. `None` if this part differs per token: with token
    /// ids, timestamps, usage or log probabilities.
    suffix: Option<Bytes>,
    has_logprobs: bool,
    /// Number of choices that start with a line for the role. 0 for `/v1/completions`.
    roles: u32,
    /// Number of characters written so far for each choice. Used only for the log probabilities of `/v1/completions`.
    offsets: Vec<u64>,
    /// Number of tokens in the prompts that workers have started.
    prompt_tokens: u64,
    /// Number of tokens written so far.
    completion_tokens: u64,
    metadata: ResponseMetadata,
}

/// The fields of a line that follow its text.
#[derive(Default)]
struct LineEnd<'a> {
    token: Option<&'a TextToken<'a>>,
    logprobs: Option<LineLogprobs>,
    finish_reason: Option<FinishReason>,
}

/// Log probabilities of one line.
#[derive(Serialize)]
#[serde(untagged)]
enum LineLogprobs {
    Completion(CompletionLogprobs),
    Chat(ChatLogprobs),
}

impl LineWriter {
    /// Creates the writer of the stream that a request asks for.
    pub(super) fn for_request(
        stream: &StreamRequest<StreamOptions>,
        metadata: ResponseMetadata,
    ) -> Self {
        let mut writer = Self::new(stream.format, stream.options, metadata);
        if stream.response.logprobs.is_some() {
            writer = writer.with_logprobs();
        }
        if writer.metadata.route == CompletionRoute::Chat {
            writer.roles = stream.response.choices;
        }
        writer
    }

    /// Creates the writer of a stream without log probabilities.
    #[must_use]
    pub fn new(format: StreamFormat, options: StreamOptions, metadata: ResponseMetadata) -> Self {
        let mut prefix = BytesMut::new();
        prefix.put_slice(b"{\"id\":");
        put_json_string(&mut prefix, &metadata.id);
        prefix.put_slice(b",\"object\":");
        put_json_string(&mut prefix, metadata.object());
        prefix.put_slice(b",\"created\":");
        put_number(&mut prefix, metadata.created);
        prefix.put_slice(b",\"model\":");
        put_json_string(&mut prefix, &metadata.model);
        prefix.put_slice(b",\"choices\":[{\"index\":");
        let (before_text, after_text) = match metadata.route {
            CompletionRoute::Completions => (",\"text\":", ""),
            CompletionRoute::Chat => (",\"delta\":{\"content\":", "}"),
        };
        let mut writer = Self {
            format,
            options,
            prefix: prefix.freeze(),
            before_text,
            after_text,
            suffix: None,
            has_logprobs: false,
            roles: 0,
            offsets: Vec::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            metadata,
        };
        if !options.return_token_ids && !options.include_stamps && !options.continuous_usage_stats {
            let mut suffix = BytesMut::new();
            suffix.put_slice(after_text.as_bytes());
            writer.put_end(&mut suffix, &LineEnd::default());
            writer.suffix = Some(suffix.freeze());
        }
        writer
    }

    /// Makes the writer add log probabilities to each token.
    #[must_use]
    pub fn with_logprobs(mut self) -> Self {
        self.suffix = None;
        self.has_logprobs = true;
        self
    }

    /// Adds the tokens of a prompt that a worker has started to the usage.
    fn add_prompt(&mut self, prompt_tokens: u32) {
        self.prompt_tokens += u64::from(prompt_tokens);
    }

    /// Writes the first line of a chat choice, which has the role and no text.
    fn write_role(&self, out: &mut BytesMut, index: u32) {
        self.put_start(out, index);
        out.put_slice(b",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
        self.put_end(out, &LineEnd::default());
    }

    /// Writes one line per token.
    ///
    /// In `/v1/completions`, the line of a choice's last token has the finish reason. A chat choice ends with an
    /// extra line that has the finish reason and no content, because OpenAI's clients stop reading content at the
    /// finish reason. On both routes, a choice that ends without another token gets an extra line.
    pub fn write_tokens(&mut self, out: &mut BytesMut, choice: &ChoiceTokens<'_>) {
        let on_last_token = match self.metadata.route {
            CompletionRoute::Completions => choice.finish_reason,
            CompletionRoute::Chat => None,
        };
        self.write_token_lines(out, choice, on_last_token);
        let is_written = on_last_token.is_some() && !choice.tokens.is_empty();
        if choice.finish_reason.is_some() && !is_written {
            self.write_finish(out, choice);
        }
    }

    fn write_token_lines(
        &mut self,
        out: &mut BytesMut,
        choice: &ChoiceTokens<'_>,
        on_last_token: Option<FinishReason>,
    ) {
        let Some(last) = choice.tokens.len().checked_sub(1) else {
            return;
        };
        let timestamps = if self.options.include_stamps {
            TIMESTAMPS_BYTES
        } else {
            0
        };
        out.reserve(choice.tokens.len() * (self.prefix.len() + LINE_BYTES + timestamps));
        for (at, token) in choice.tokens.iter().enumerate() {
            let finish_reason = on_last_token.filter(|_| at == last);
            self.write_token(out, choice.index, &token, finish_reason);
        }
    }

    /// Writes the last object of a successful stream, if the request asks for usage or timings. Calls `timings` only
    /// if they are written.
    fn write_usage_and_timings(
        &self,
        out: &mut BytesMut,
        usage: Usage,
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
            "id": self.metadata.id,
            "object": self.metadata.object(),
            "created": self.metadata.created,
            "model": self.metadata.model,
            "choices": [],
        });
        if include_usage {
            object["usage"] = json!(usage);
        }
        if include_timings {
            object["timings"] = timings();
        }
        self.put_object(out, &object);
    }

    /// Writes the end marker of a successful stream. NDJSON has no end marker.
    fn write_done(&self, out: &mut BytesMut) {
        if self.format == StreamFormat::Sse {
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    fn write_token(
        &mut self,
        out: &mut BytesMut,
        index: u32,
        token: &TextToken<'_>,
        finish_reason: Option<FinishReason>,
    ) {
        self.completion_tokens += 1;
        self.put_start(out, index);
        match &self.suffix {
            Some(suffix) if finish_reason.is_none() => {
                out.put_slice(self.before_text.as_bytes());
                put_json_string(out, token.text);
                out.put_slice(suffix);
            }
            Some(_) | None => {
                self.put_text(out, token.text);
                let end = LineEnd {
                    token: Some(token),
                    logprobs: self.logprobs(index, token),
                    finish_reason,
                };
                self.put_end(out, &end);
            }
        }
    }

    /// Writes a line with the finish reason and without a token.
    fn write_finish(&self, out: &mut BytesMut, choice: &ChoiceTokens<'_>) {
        self.put_start(out, choice.index);
        match self.metadata.route {
            CompletionRoute::Completions => self.put_text(out, ""),
            CompletionRoute::Chat => out.put_slice(b",\"delta\":{}"),
        }
        let end = LineEnd {
            finish_reason: choice.finish_reason,
            ..LineEnd::default()
        };
        self.put_end(out, &end);
    }

    fn logprobs(&mut self, index: u32, token: &TextToken<'_>) -> Option<LineLogprobs> {
        if !self.has_logprobs {
            return None;
        }
        match self.metadata.route {
            CompletionRoute::Completions => {
                let offset = self.offset(index);
                let text_offset = *offset;
                *offset += char_count(token.text);
                let mut logprobs = CompletionLogprobs::default();
                logprobs.push(token, text_offset);
                (!logprobs.is_empty()).then_some(LineLogprobs::Completion(logprobs))
            }
            CompletionRoute::Chat => {
                let mut logprobs = ChatLogprobs::default();
                logprobs.push(token);
                (!logprobs.is_empty()).then_some(LineLogprobs::Chat(logprobs))
            }
        }
    }

    /// Number of characters written for a choice.
    fn offset(&mut self, index: u32) -> &mut u64 {
        let at = usize::try_from(index).expect("a request has at most 128 choices");
        if self.offsets.len() <= at {
            self.offsets.resize(at + 1, 0);
        }
        &mut self.offsets[at]
    }

    /// Writes the part of the line before the text.
    fn put_start(&self, out: &mut BytesMut, index: u32) {
        self.begin_record(out);
        out.put_slice(&self.prefix);
        put_number(out, index);
    }

    fn put_text(&self, out: &mut BytesMut, text: &str) {
        out.put_slice(self.before_text.as_bytes());
        put_json_string(out, text);
        out.put_slice(self.after_text.as_bytes());
    }

    /// Writes the part of the line after the text.
    fn put_end(&self, out: &mut BytesMut, end: &LineEnd<'_>) {
        out.put_slice(b",\"logprobs\":");
        match &end.logprobs {
            None => out.put_slice(b"null"),
            Some(logprobs) => put_json(out, logprobs),
        }
        out.put_slice(b",\"finish_reason\":");
        match end.finish_reason {
            None => out.put_slice(b"null"),
            Some(reason) => put_json_string(out, finish_reason_name(reason)),
        }
        if self.options.return_token_ids {
            out.put_slice(b",\"token_ids\":[");
            if let Some(token) = end.token {
                put_number(out, token.id);
            }
            out.put_slice(b"]");
        }
        out.put_slice(b"}]");
        if self.options.include_stamps
            && let Some(token) = end.token
        {
            put_timestamps(out, token.timestamps);
        }
        if self.options.continuous_usage_stats {
            out.put_slice(b",\"usage\":");
            put_json(out, &Usage::new(self.prompt_tokens, self.completion_tokens));
        } else if self.options.include_usage {
            out.put_slice(b",\"usage\":null");
        }
        out.put_slice(b"}");
        self.end_record(out);
    }

    fn put_object(&self, out: &mut BytesMut, object: &impl Serialize) {
        self.begin_record(out);
        put_json(out, object);
        self.end_record(out);
    }

    fn begin_record(&self, out: &mut BytesMut) {
        if self.format == StreamFormat::Sse {
            out.put_slice(b"data: ");
        }
    }

    fn end_record(&self, out: &mut BytesMut) {
        out.put_slice(match self.format {
            StreamFormat::Ndjson => b"\n",
            StreamFormat::Sse => b"\n\n",
        });
    }
}

impl RecordWriter for LineWriter {
    fn write_start(&mut self, out: &mut BytesMut, started: &v1::Started) {
        self.add_prompt(started.prompt_tokens);
        for choice in 0..self.roles {
            self.write_role(out, choice);
        }
    }

    /// Writes the first line of a choice that repeats its prompt.
    fn write_prompt(&mut self, out: &mut BytesMut, choice: u32, prompt: &PromptEcho) {
        let logprobs = self
            .has_logprobs
            .then(|| CompletionLogprobs::of_prompt(prompt));
        *self.offset(choice) = char_count(&prompt.text);
        self.put_start(out, choice);
        self.put_text(out, &prompt.text);
        let end = LineEnd {
            logprobs: logprobs
                .filter(|logprobs| !logprobs.is_empty())
                .map(LineLogprobs::Completion),
            ..LineEnd::default()
        };
        self.put_end(out, &end);
    }

    fn write_tokens(&mut self, out: &mut BytesMut, tokens: &ChoiceTokens<'_>) {
        Self::write_tokens(self, out, tokens);
    }

    /// Writes one line. `/v1/completions` has no such parts, and the cluster rejects an engine that sends any.
    fn write_chat_delta(&mut self, out: &mut BytesMut, delta: &v1::ChatDelta) {
        if self.metadata.route != CompletionRoute::Chat {
            return;
        }
        self.put_start(out, delta.choice);
        out.put_slice(b",\"delta\":");
        put_json(out, &DeltaObject::from(delta));
        self.put_end(out, &LineEnd::default());
    }

    fn write_end(&mut self, out: &mut BytesMut, end: &StreamEnd) {
        let timings = || timings::timings_object(&end.timings, end.delivery);
        self.write_usage_and_timings(out, end.usage.into(), timings);
        self.write_done(out);
    }

    fn write_error(&mut self, out: &mut BytesMut, error: &Error, tokens_delivered: u64) {
        self.put_object(out, &ErrorObject::in_stream(error, tokens_delivered));
    }

    /// Returns a comment as the keep-alive record. NDJSON has no comments.
    fn keep_alive(&self) -> Option<Bytes> {
        match self.format {
            StreamFormat::Sse => Some(Bytes::from_static(b": keep-alive\n\n")),
            StreamFormat::Ndjson => None,
        }
    }
}

fn put_json(out: &mut BytesMut, object: &impl Serialize) {
    crate::gateway::json::write(out.writer(), object).expect("writing to memory cannot fail");
}
