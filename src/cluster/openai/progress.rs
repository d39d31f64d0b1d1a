//! The part of an engine's response that has been read, as completion events. This module must not know sockets or
//! timers.

use std::collections::VecDeque;

use serde_json::Value;
use tokio::time::Instant;

use super::chunk::{Chunk, ChunkChoice, ChunkUsage, LlamaCppChunk, SeenTokens};
use super::json_text::JsonText;
use super::logprobs::{self, ScoredToken};
use super::rejection;
use super::request_body::Api;
use super::server_sent_events::SentEvent;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::tokens::{Timestamps, TokenBatch};

#[cfg(test)]
mod tests;

/// Maximum number of tokens of one event. More tokens that arrived together become further events.
const MAX_BATCH: usize = 256;

/// Facts about a request that are needed to read its response.
pub(super) struct RequestFacts {
    /// The API whose events the response has.
    pub(super) api: Api,
    pub(super) request_id: String,
    /// Name of the model, if the engine does not report it.
    pub(super) model: String,
    pub(super) choices: u32,
    pub(super) seed: i64,
    /// True if the engine reports the ids of its tokens.
    pub(super) has_token_ids: bool,
    /// Number of most likely tokens at each position, if the client asked for log probabilities.
    pub(super) logprobs: Option<u32>,
    /// The prompt, if the client asked for it with `echo`.
    pub(super) echo: Option<String>,
    pub(super) arrived: Instant,
}

/// The part of a response that has been read.
pub(super) struct Progress {
    facts: RequestFacts,
    choices: Vec<ChoiceProgress>,
    /// Events to return. Tokens of one choice that arrive together are one event.
    pub(super) ready: VecDeque<Event>,
    has_started: bool,
    first_token: Option<Instant>,
    usage: Option<ChunkUsage>,
    has_end_marker: bool,
}

#[derive(Clone, Default)]
struct ChoiceProgress {
    /// Index of the next token.
    next_index: u32,
    /// The tokens that llama.cpp has reported.
    seen: SeenTokens,
    /// Number of deltas that are not text, such as reasoning. Used only if the engine reports no usage.
    other_deltas: u32,
    /// True if the prompt that `echo` asks for has arrived.
    has_echoed: bool,
    has_ended: bool,
}

impl Progress {
    pub(super) fn new(facts: RequestFacts) -> Self {
        let choices = usize::try_from(facts.choices).unwrap_or(0);
        Self {
            choices: vec![ChoiceProgress::default(); choices],
            facts,
            ready: VecDeque::new(),
            has_started: false,
            first_token: None,
            usage: None,
            has_end_marker: false,
        }
    }

    /// Reads an event of the engine.
    ///
    /// # Errors
    /// The event reports an error, or it is malformed, so that text may be missing.
    pub(super) fn read(&mut self, event: &SentEvent) -> Result<(), Error> {
        if event.data[..] == *b"[DONE]" {
            self.has_end_marker = true;
            return self.check_end();
        }
        if !event.is_error && !is_object(&event.data) {
            return skip_without_text(&event.data);
        }
        let Ok(chunk) = self.parse(&event.data) else {
            return Err(if event.is_error {
                rejection::error_in_stream(None)
            } else {
                broken_stream()
            });
        };
        if event.is_error || chunk.error.is_some() {
            return Err(rejection::error_in_stream(chunk.error));
        }
        self.start(&chunk);
        if let Some(usage) = chunk.usage {
            match &mut self.usage {
                // llama.cpp reports the usage of each choice.
                Some(total) if self.facts.api == Api::LlamaCpp => total.add_choice(usage),
                total => *total = Some(usage),
            }
        }
        for choice in chunk.choices.iter().flatten() {
            self.read_choice(choice)?;
        }
        Ok(())
    }

    fn parse<'a>(&mut self, json: &'a [u8]) -> serde_json::Result<Chunk<'a>> {
        if self.facts.api != Api::LlamaCpp {
            return serde_json::from_slice(json);
        }
        let chunk: LlamaCppChunk<'_> = serde_json::from_slice(json)?;
        let index = usize::try_from(chunk.index()).ok();
        let choice = index.and_then(|index| self.choices.get_mut(index));
        Ok(match choice {
            Some(choice) => chunk.into_chunk(&mut choice.seen),
            None => chunk.into_chunk(&mut SeenTokens::default()),
        })
    }

    /// Reports the start of the completion, once.
    fn start(&mut self, chunk: &Chunk<'_>) {
        if std::mem::replace(&mut self.has_started, true) {
            return;
        }
        let model = chunk.model.map(|model| model.to_text());
        let reported = model.filter(|model| !model.is_empty());
        self.ready.push_back(Event::Started(v1::Started {
            request_id: self.facts.request_id.clone(),
            model: reported.unwrap_or_else(|| self.facts.model.clone()),
            prompt_tokens: chunk
                .usage
                .and_then(|usage| usage.prompt_tokens())
                .unwrap_or(0),
            seed: self.facts.seed,
            text_only: !self.facts.has_token_ids,
        }));
    }

    fn read_choice(&mut self, choice: &ChunkChoice<'_>) -> Result<(), Error> {
        let index = usize::try_from(choice.index()).map_err(|_| broken_stream())?;
        let progress = self.choices.get_mut(index);
        let progress = progress.ok_or_else(broken_stream)?;
        if progress.has_ended {
            // Some engines repeat an empty delta beside the usage.
            return match choice.is_empty() {
                true => Ok(()),
                false => Err(broken_stream()),
            };
        }
        if choice.text().is_some_and(|text| !text.is_string()) {
            return Err(broken_stream());
        }
        let finish_reason = choice.finish_reason().map(finish_reason).transpose()?;
        // The tokens come last, because their event may end the choice.
        if let Some(delta) = choice.chat_delta().map_err(|_| broken_stream())? {
            self.first_token.get_or_insert_with(Instant::now);
            if choice.token_ids().is_empty() {
                progress.other_deltas += 1;
            }
            self.ready.push_back(Event::Chat(delta));
        }
        if choice.text().is_some() && self.expects_echo(index) {
            return self.read_echo(index, choice, finish_reason);
        }
        let scored = self.scored_tokens(choice)?;
        // The ids of llama.cpp's own API stand beside the text, unless some are missing.
        let has_scored_ids = self.facts.api != Api::LlamaCpp;
        let new_tokens = match (scored.len(), choice.token_ids().len(), choice.text()) {
            (0, 0, None) => 0,
            (0, 0, Some(_)) => 1,
            (0, ids, _) => ids,
            (scored, _, _) => scored,
        };
        self.add_tokens(index, new_tokens, finish_reason, |batch| {
            if scored.is_empty() {
                push_tokens(batch, choice);
            } else {
                push_scored(batch, choice, scored, has_scored_ids);
            }
        })
    }

    /// Adds new tokens of a choice, which `push` appends to their event, and the end of the choice.
    fn add_tokens(
        &mut self,
        index: usize,
        new_tokens: usize,
        finish_reason: Option<v1::FinishReason>,
        push: impl FnOnce(&mut TokenBatch),
    ) -> Result<(), Error> {
        if new_tokens == 0 && finish_reason.is_none() {
            return Ok(());
        }
        if new_tokens > 0 {
            self.first_token.get_or_insert_with(Instant::now);
        }
        let choice = &mut self.choices[index];
        let first_index = choice.next_index;
        choice.next_index += u32::try_from(new_tokens).map_err(|_| broken_stream())?;
        choice.has_ended = finish_reason.is_some();
        let number = u32::try_from(index).map_err(|_| broken_stream())?;
        let tokens = self.batch(number, first_index);
        push(&mut tokens.tokens);
        tokens.finish_reason = finish_reason.unwrap_or_default().into();
        Ok(())
    }

    /// Returns the new tokens with their log probabilities. Empty if the client did not ask for them. Also empty if the
    /// engine sent another number of ids than of log probabilities: the ids are kept, and the log probabilities dropped.
    fn scored_tokens(&self, choice: &ChunkChoice<'_>) -> Result<Vec<ScoredToken>, Error> {
        let (Some(top), Some(json)) = (self.facts.logprobs, choice.logprobs) else {
            return Ok(Vec::new());
        };
        let scored = logprobs::read(json, top).map_err(|_| broken_stream())?;
        let ids = choice.token_ids().len();
        if ids > 0 && ids != scored.len() {
            tracing::debug!(
                ids,
                scored = scored.len(),
                "an engine's lists of tokens differ"
            );
            return Ok(Vec::new());
        }
        Ok(scored)
    }

    /// Returns true if the first text of this choice must start with the prompt.
    fn expects_echo(&self, index: usize) -> bool {
        self.facts.echo.is_some() && !self.choices[index].has_echoed
    }

    /// Reads the first text of a choice of a request with `echo`. The text starts with the prompt, which is reported once
    /// for all choices.
    fn read_echo(
        &mut self,
        index: usize,
        choice: &ChunkChoice<'_>,
        finish_reason: Option<v1::FinishReason>,
    ) -> Result<(), Error> {
        let prompt = self.facts.echo.as_deref().unwrap_or_default();
        let text = choice.text().map(JsonText::to_text).unwrap_or_default();
        let Some(rest) = text.strip_prefix(prompt) else {
            let message = "The engine did not start its text with the prompt, as `echo` asks.";
            return Err(Error::new(ErrorKind::UpstreamError, message));
        };
        if !self.choices.iter().any(|choice| choice.has_echoed) {
            self.ready.push_back(Event::Prompt(v1::EchoedPrompt {
                text: prompt.to_owned(),
                tokens: None,
            }));
        }
        self.choices[index].has_echoed = true;
        self.add_tokens(
            index,
            usize::from(!rest.is_empty()),
            finish_reason,
            |batch| {
                if !rest.is_empty() {
                    batch.push_with(0, Timestamps::default(), |text| text.push_str(rest));
                }
            },
        )
    }

    /// Returns the event to which the next tokens of this choice belong: the last event, if it has tokens of the same
    /// choice and is not full, or a new one.
    fn batch(&mut self, choice: u32, first_index: u32) -> &mut v1::Tokens {
        let is_same = |event: &Event| match event {
            Event::Tokens(tokens) => tokens.choice == choice && tokens.tokens.len() < MAX_BATCH,
            Event::Started(_) | Event::Summary(_) | Event::Prompt(_) | Event::Chat(_) => false,
        };
        if !self.ready.back().is_some_and(is_same) {
            self.ready.push_back(Event::Tokens(v1::Tokens {
                choice,
                first_index,
                ..v1::Tokens::default()
            }));
        }
        match self.ready.back_mut() {
            Some(Event::Tokens(tokens)) => tokens,
            Some(Event::Started(_) | Event::Summary(_) | Event::Prompt(_) | Event::Chat(_))
            | None => unreachable!("the last event has tokens"),
        }
    }

    pub(super) fn all_choices_ended(&self) -> bool {
        self.has_started && self.choices.iter().all(|choice| choice.has_ended)
    }

    /// Returns true if the response is whole and nothing more is expected.
    pub(super) fn is_whole(&self) -> bool {
        self.all_choices_ended() && (self.usage.is_some() || self.has_end_marker)
    }

    /// Checks that the response may end here.
    ///
    /// # Errors
    /// A choice has not ended: the stream was cut.
    pub(super) fn check_end(&self) -> Result<(), Error> {
        if self.all_choices_ended() {
            return Ok(());
        }
        Err(broken_stream())
    }

    pub(super) fn summary(&self) -> v1::Summary {
        let usage = self.usage.unwrap_or_default();
        let deltas = |choice: &ChoiceProgress| choice.next_index + choice.other_deltas;
        let received = || self.choices.iter().map(deltas).sum();
        let since_arrival = |then: Instant| {
            let elapsed = then
                .saturating_duration_since(self.facts.arrived)
                .as_nanos();
            u64::try_from(elapsed).unwrap_or(u64::MAX)
        };
        v1::Summary {
            usage: Some(v1::Usage {
                prompt_tokens: usage.prompt_tokens().unwrap_or(0),
                completion_tokens: usage.completion_tokens.unwrap_or_else(received),
                cached_prompt_tokens: usage.cached_prompt_tokens(),
                reasoning_tokens: usage.reasoning_tokens(),
            }),
            timings: Some(v1::Timings {
                first_token_ns: self.first_token.map_or(0, since_arrival),
                total_ns: since_arrival(Instant::now()),
                ..v1::Timings::default()
            }),
        }
    }
}

/// Returns true if an event may be a JSON object. serde would also read a list as the fields of a chunk.
fn is_object(json: &[u8]) -> bool {
    json.trim_ascii_start().first() == Some(&b'{')
}

/// Skips an event that is no object.
///
/// # Errors
/// The event is a list or no JSON, so that text may be missing.
fn skip_without_text(json: &[u8]) -> Result<(), Error> {
    match serde_json::from_slice::<Value>(json) {
        Ok(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => Ok(()),
        Ok(Value::Array(_) | Value::Object(_)) | Err(_) => Err(broken_stream()),
    }
}

/// Appends the tokens of a chunk. If the engine reports ids, the text belongs to the last of them. Otherwise the text
/// is one delta.
fn push_tokens(batch: &mut TokenBatch, choice: &ChunkChoice<'_>) {
    let append = |text: &mut String| {
        if let Some(new) = choice.text() {
            new.append_to(text);
        }
    };
    match (choice.token_ids().split_last(), choice.text()) {
        (None, None) => {}
        (None, Some(_)) => batch.push_with(0, Timestamps::default(), append),
        (Some((last, earlier)), _) => {
            for id in earlier {
                batch.push_with(*id, Timestamps::default(), |_| ());
            }
            batch.push_with(*last, Timestamps::default(), append);
        }
    }
}

/// Appends the tokens of a chunk with their log probabilities. `has_scored_ids` is true if the ids beside the log
/// probabilities may be used.
fn push_scored(
    batch: &mut TokenBatch,
    choice: &ChunkChoice<'_>,
    scored: Vec<ScoredToken>,
    has_scored_ids: bool,
) {
    let text = choice.text().map(JsonText::to_text).unwrap_or_default();
    let parts = logprobs::split_text(&text, &scored);
    let mut ids = choice.token_ids().iter();
    for (part, token) in parts.into_iter().zip(scored) {
        let scored_id = token.id.filter(|_| has_scored_ids);
        let id = ids.next().copied().or(scored_id).unwrap_or(0);
        batch.push_with(id, Timestamps::default(), |text| text.push_str(part));
        batch.set_last_logprobs(Some(Box::new(token.logprobs)));
    }
}

/// Converts the engine's finish reason.
///
/// # Errors
/// The reason is not one of a successful end. For example, vLLM sends `abort` for a request that it gave up.
fn finish_reason(reason: JsonText<'_>) -> Result<v1::FinishReason, Error> {
    // llama.cpp and vLLM send `stop` also for the end-of-sequence token.
    for (name, known) in [
        ("stop", v1::FinishReason::Stop),
        ("length", v1::FinishReason::Length),
        ("content_filter", v1::FinishReason::ContentFilter),
        ("tool_calls", v1::FinishReason::ToolCalls),
        // Older name of `tool_calls`.
        ("function_call", v1::FinishReason::ToolCalls),
    ] {
        if reason.is(name) {
            return Ok(known);
        }
    }
    Err(Error::new(
        ErrorKind::UpstreamError,
        "The engine gave up the request.",
    ))
}

/// Returns the error for a response of which text may be missing.
pub(super) fn broken_stream() -> Error {
    Error::new(
        ErrorKind::UpstreamError,
        "The engine's stream broke off before its end.",
    )
}
