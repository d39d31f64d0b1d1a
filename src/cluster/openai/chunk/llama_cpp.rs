//! One event of a streamed response of llama.cpp's own API, `POST /completion`. Unlike its copy of OpenAI's API, it
//! reports the ids of the tokens.

use serde::Deserialize;
use serde_json::value::RawValue;
use smallvec::{SmallVec, smallvec};

use super::{Chunk, ChunkChoice, ChunkUsage, PromptDetails};
use crate::cluster::openai::json_text::JsonText;
use crate::request::TokenId;

/// A chunk of one choice.
#[derive(Deserialize)]
pub(in crate::cluster::openai) struct LlamaCppChunk<'a> {
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow, default)]
    content: Option<JsonText<'a>>,
    /// Ids of the new tokens. A token that ends within a character has no event, so its id is missing.
    #[serde(default)]
    tokens: Option<SmallVec<[TokenId; 8]>>,
    /// Number of tokens so far, with those that have no event.
    #[serde(default)]
    tokens_predicted: Option<u32>,
    /// Number of tokens of the prompt.
    #[serde(default)]
    tokens_evaluated: Option<u32>,
    #[serde(borrow, default)]
    completion_probabilities: Option<&'a RawValue>,
    /// True in the last event of the choice.
    #[serde(default)]
    stop: bool,
    #[serde(borrow, default)]
    stop_type: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    model: Option<JsonText<'a>>,
    #[serde(default)]
    timings: Option<Timings>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Timings {
    /// Number of tokens of the prompt that were in the cache.
    #[serde(default)]
    cache_n: Option<u32>,
}

/// The tokens of a choice so far.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cluster::openai) struct SeenTokens {
    /// Number of tokens that the engine has generated.
    predicted: u32,
    /// True if an id is missing since the last text.
    misses_ids: bool,
}

impl<'a> LlamaCppChunk<'a> {
    /// Returns the index of the choice.
    pub(in crate::cluster::openai) fn index(&self) -> u32 {
        self.index.unwrap_or(0)
    }

    /// Converts the event to a chunk of OpenAI's API. If ids before its text are missing, it has no ids.
    pub(in crate::cluster::openai) fn into_chunk(self, seen: &mut SeenTokens) -> Chunk<'a> {
        let ids = self.tokens.unwrap_or_default();
        let count = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let expected = seen.predicted.saturating_add(count);
        let predicted = self.tokens_predicted.unwrap_or(expected);
        seen.predicted = predicted;
        seen.misses_ids |= predicted != expected;
        let has_text = self.content.is_some_and(|text| !text.is_empty());
        let misses_ids = has_text && std::mem::take(&mut seen.misses_ids);
        let usage = self.stop.then_some(ChunkUsage {
            prompt_tokens: self.tokens_evaluated,
            completion_tokens: self.tokens_predicted,
            prompt_tokens_details: Some(PromptDetails {
                cached_tokens: self.timings.and_then(|timings| timings.cache_n),
            }),
            completion_tokens_details: None,
        });
        let is_limit = self.stop_type.is_some_and(|reason| reason.is("limit"));
        let finish_reason = match is_limit {
            true => JsonText::constant("\"length\""),
            false => JsonText::constant("\"stop\""),
        };
        let choice = ChunkChoice {
            index: self.index,
            text: self.content,
            delta: None,
            token_ids: (!misses_ids).then_some(ids),
            logprobs: self.completion_probabilities,
            finish_reason: finish_reason.filter(|_| self.stop),
        };
        Chunk {
            model: self.model,
            choices: Some(smallvec![choice]),
            usage,
            error: self.error,
        }
    }
}
