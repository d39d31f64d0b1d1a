//! A stream's lines: one JSON object for each token, written by hand around the parts that are the
//! same in all of them, because this runs for every token.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde_json::{Value, json};

use super::accept::StreamFormat;
use super::answer::Usage;
use super::body::{Route, StreamOptions};
use super::echo::Prompt;
use super::error_response::ErrorObject;
use super::logprobs::{ChatLogprobs, CompletionLogprobs, characters};
use crate::error::Error;
use crate::tokens::{TextToken, TokenBatch};

mod json;
#[cfg(test)]
mod tests;

use json::{put_json_string, put_number, put_timestamp};

/// What one line takes besides its prefix, about: a short text, and what stands around it.
const LINE: usize = 96;

/// What a line's stamp takes.
const STAMP: usize = 80;

/// Writes the lines of one response.
pub struct LineWriter {
    format: StreamFormat,
    options: StreamOptions,
    /// Everything up to the choice's index.
    prefix: Bytes,
    /// Everything between the choice's index and a text.
    before_text: &'static str,
    /// What closes a text.
    after_text: &'static str,
    /// Everything after the text of a token with which nothing ends; `None` where each token has an
    /// end of its own, with its id, its times or its log probabilities.
    tail: Option<Bytes>,
    has_logprobs: bool,
    /// For each choice, how many characters its lines have so far. Only for the log probabilities of
    /// completions.
    offsets: Vec<u64>,
    /// Tokens of the prompts that have begun.
    prompt_tokens: u64,
    /// Tokens that have their line.
    completion_tokens: u64,
    head: ResponseMetadata,
}

/// What every object of a response has in common.
#[derive(Clone)]
pub struct ResponseMetadata {
    /// Which kind of object it is.
    pub route: Route,
    /// The response's id, `cmpl-…` or `chatcmpl-…`.
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

/// What follows a line's text.
#[derive(Default)]
struct Rest<'a> {
    token: Option<&'a TextToken<'a>>,
    logprobs: Option<LineLogprobs>,
    finish_reason: Option<&'static str>,
}

/// The log probabilities of one line.
#[derive(Serialize)]
#[serde(untagged)]
enum LineLogprobs {
    Completion(CompletionLogprobs),
    Chat(ChatLogprobs),
}

impl ResponseMetadata {
    fn object(&self) -> &'static str {
        match self.route {
            Route::Completions => "text_completion",
            Route::Chat => "chat.completion.chunk",
        }
    }
}

impl LineWriter {
    /// The lines of a stream of this form, with what is asked for besides the text.
    #[must_use]
    pub fn new(format: StreamFormat, options: StreamOptions, head: ResponseMetadata) -> Self {
        let mut prefix = BytesMut::new();
        prefix.put_slice(b"{\"id\":");
        put_json_string(&mut prefix, &head.id);
        prefix.put_slice(b",\"object\":");
        put_json_string(&mut prefix, head.object());
        prefix.put_slice(b",\"created\":");
        put_number(&mut prefix, head.created);
        prefix.put_slice(b",\"model\":");
        put_json_string(&mut prefix, &head.model);
        prefix.put_slice(b",\"choices\":[{\"index\":");
        let (before_text, after_text) = match head.route {
            Route::Completions => (",\"text\":", ""),
            Route::Chat => (",\"delta\":{\"content\":", "}"),
        };
        let mut lines = Self {
            format,
            options,
            prefix: prefix.freeze(),
            before_text,
            after_text,
            tail: None,
            has_logprobs: false,
            offsets: Vec::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            head,
        };
        if !options.return_token_ids && !options.include_stamps && !options.continuous_usage_stats {
            let mut tail = BytesMut::new();
            tail.put_slice(after_text.as_bytes());
            lines.put_rest(&mut tail, &Rest::default());
            lines.tail = Some(tail.freeze());
        }
        lines
    }

    /// The same lines with each token's log probabilities.
    #[must_use]
    pub fn with_logprobs(mut self) -> Self {
        self.tail = None;
        self.has_logprobs = true;
        self
    }

    /// Counts a prompt that has begun.
    pub(super) fn begun(&mut self, prompt_tokens: u32) {
        self.prompt_tokens += u64::from(prompt_tokens);
    }

    /// The line that comes before a chat's choice: who speaks.
    pub(super) fn role(&self, out: &mut BytesMut, index: u32) {
        self.put_head(out, index);
        out.put_slice(b",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
        self.put_rest(out, &Rest::default());
    }

    /// The line that comes before a choice whose prompt is echoed.
    pub(super) fn prompt(&mut self, out: &mut BytesMut, index: u32, prompt: &Prompt) {
        let logprobs = self.has_logprobs.then(|| prompt.logprobs());
        *self.offset(index) = characters(&prompt.text);
        self.put_head(out, index);
        self.put_text(out, &prompt.text);
        let rest = Rest {
            logprobs: logprobs
                .filter(|logprobs| !logprobs.is_empty())
                .map(LineLogprobs::Completion),
            ..Rest::default()
        };
        self.put_rest(out, &rest);
    }

    /// One line for each token. The finish reason of a completion is on the line of its last token. The
    /// finish reason of a chat is on a line of its own, which has no content: clients of OpenAI's streams
    /// stop reading content at the finish reason. A choice that ends with no token has such a line, too.
    pub fn tokens(&mut self, out: &mut BytesMut, choice: &ChoiceTokens<'_>) {
        let on_last_token = match self.head.route {
            Route::Completions => choice.finish_reason,
            Route::Chat => None,
        };
        self.token_lines(out, choice, on_last_token);
        let is_told = on_last_token.is_some() && !choice.tokens.is_empty();
        if choice.finish_reason.is_some() && !is_told {
            self.finish(out, choice);
        }
    }

    fn token_lines(
        &mut self,
        out: &mut BytesMut,
        choice: &ChoiceTokens<'_>,
        on_last_token: Option<&'static str>,
    ) {
        let Some(last) = choice.tokens.len().checked_sub(1) else {
            return;
        };
        let stamp = if self.options.include_stamps {
            STAMP
        } else {
            0
        };
        out.reserve(choice.tokens.len() * (self.prefix.len() + LINE + stamp));
        for (at, token) in choice.tokens.iter().enumerate() {
            let finish_reason = on_last_token.filter(|_| at == last);
            self.token(out, choice.index, &token, finish_reason);
        }
    }

    /// The last object of a stream that shows what it used or what it took. `timings` are asked for
    /// only where they are shown.
    pub(super) fn last(&self, out: &mut BytesMut, usage: Usage, timings: impl FnOnce() -> Value) {
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
            "object": self.head.object(),
            "created": self.head.created,
            "model": self.head.model,
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

    /// The end of a stream that succeeded.
    pub(super) fn done(&self, out: &mut BytesMut) {
        if self.format == StreamFormat::Sse {
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    /// The end of a stream that failed.
    pub(super) fn error(&self, out: &mut BytesMut, error: &Error, tokens_delivered: u64) {
        self.put_object(out, &ErrorObject::in_stream(error, tokens_delivered));
    }

    /// What keeps a silent stream alive, where the form has such a thing.
    pub(super) fn keep_alive(&self) -> Option<Bytes> {
        match self.format {
            StreamFormat::Sse => Some(Bytes::from_static(b": keep-alive\n\n")),
            StreamFormat::Ndjson => None,
        }
    }

    fn token(
        &mut self,
        out: &mut BytesMut,
        index: u32,
        token: &TextToken<'_>,
        finish_reason: Option<&'static str>,
    ) {
        self.completion_tokens += 1;
        self.put_head(out, index);
        match &self.tail {
            Some(tail) if finish_reason.is_none() => {
                out.put_slice(self.before_text.as_bytes());
                put_json_string(out, token.text);
                out.put_slice(tail);
            }
            Some(_) | None => {
                self.put_text(out, token.text);
                let rest = Rest {
                    token: Some(token),
                    logprobs: self.logprobs(index, token),
                    finish_reason,
                };
                self.put_rest(out, &rest);
            }
        }
    }

    /// A line that has the finish reason and no token.
    fn finish(&self, out: &mut BytesMut, choice: &ChoiceTokens<'_>) {
        self.put_head(out, choice.index);
        match self.head.route {
            Route::Completions => self.put_text(out, ""),
            Route::Chat => out.put_slice(b",\"delta\":{}"),
        }
        let rest = Rest {
            finish_reason: choice.finish_reason,
            ..Rest::default()
        };
        self.put_rest(out, &rest);
    }

    fn logprobs(&mut self, index: u32, token: &TextToken<'_>) -> Option<LineLogprobs> {
        if !self.has_logprobs {
            return None;
        }
        match self.head.route {
            Route::Completions => {
                let offset = self.offset(index);
                let begin = *offset;
                *offset += characters(token.text);
                let mut logprobs = CompletionLogprobs::default();
                logprobs.push(token, begin);
                (!logprobs.is_empty()).then_some(LineLogprobs::Completion(logprobs))
            }
            Route::Chat => {
                let mut logprobs = ChatLogprobs::default();
                logprobs.push(token);
                (!logprobs.is_empty()).then_some(LineLogprobs::Chat(logprobs))
            }
        }
    }

    /// How many characters a choice's lines have so far.
    fn offset(&mut self, index: u32) -> &mut u64 {
        let at = usize::try_from(index).expect("there are at most 128 choices");
        if self.offsets.len() <= at {
            self.offsets.resize(at + 1, 0);
        }
        &mut self.offsets[at]
    }

    /// Everything up to the text.
    fn put_head(&self, out: &mut BytesMut, index: u32) {
        self.begin(out);
        out.put_slice(&self.prefix);
        put_number(out, index);
    }

    fn put_text(&self, out: &mut BytesMut, text: &str) {
        out.put_slice(self.before_text.as_bytes());
        put_json_string(out, text);
        out.put_slice(self.after_text.as_bytes());
    }

    /// Everything after the text.
    fn put_rest(&self, out: &mut BytesMut, rest: &Rest<'_>) {
        out.put_slice(b",\"logprobs\":");
        match &rest.logprobs {
            None => out.put_slice(b"null"),
            Some(logprobs) => put_json(out, logprobs),
        }
        out.put_slice(b",\"finish_reason\":");
        match rest.finish_reason {
            None => out.put_slice(b"null"),
            Some(reason) => put_json_string(out, reason),
        }
        if self.options.return_token_ids {
            out.put_slice(b",\"token_ids\":[");
            if let Some(token) = rest.token {
                put_number(out, token.id);
            }
            out.put_slice(b"]");
        }
        out.put_slice(b"}]");
        if self.options.include_stamps
            && let Some(token) = rest.token
        {
            put_timestamp(out, token.timestamps);
        }
        if self.options.continuous_usage_stats {
            out.put_slice(b",\"usage\":");
            put_json(out, &Usage::new(self.prompt_tokens, self.completion_tokens));
        } else if self.options.include_usage {
            out.put_slice(b",\"usage\":null");
        }
        out.put_slice(b"}");
        self.end(out);
    }

    fn put_object(&self, out: &mut BytesMut, object: &impl Serialize) {
        self.begin(out);
        put_json(out, object);
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

fn put_json(out: &mut BytesMut, object: &impl Serialize) {
    super::json::write(out.writer(), object).expect("memory takes all that is written");
}
