//! One event of a streamed response. Only the fields that Tokenway uses are read, and nothing is allocated for the text
//! of one choice.

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::json_text::JsonText;
use crate::proto::v1;
use crate::request::TokenId;

mod llama_cpp;

pub(super) use llama_cpp::{LlamaCppChunk, SeenTokens};

/// A chunk of `/completions` or `/chat/completions`.
#[derive(Deserialize)]
pub(super) struct Chunk<'a> {
    #[serde(borrow, default)]
    pub(super) model: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    pub(super) choices: Option<SmallVec<[ChunkChoice<'a>; 1]>>,
    /// A malformed usage is ignored, because it contains no text.
    #[serde(default, deserialize_with = "usage_or_none")]
    pub(super) usage: Option<ChunkUsage>,
    /// The error that ended the stream.
    #[serde(borrow, default)]
    pub(super) error: Option<&'a RawValue>,
}

/// A part of one choice.
#[derive(Deserialize)]
pub(super) struct ChunkChoice<'a> {
    #[serde(default)]
    index: Option<u32>,
    /// New text (`/completions`).
    #[serde(borrow, default)]
    text: Option<JsonText<'a>>,
    /// New text (`/chat/completions`).
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
    /// Ids of the new tokens, if the engine was asked for them and can report them.
    #[serde(default)]
    token_ids: Option<SmallVec<[TokenId; 8]>>,
    /// Parsed only if the client asked for log probabilities.
    #[serde(borrow, default)]
    pub(super) logprobs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    finish_reason: Option<JsonText<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    reasoning_content: Option<JsonText<'a>>,
    /// Newer name of `reasoning_content` (vLLM).
    #[serde(borrow, default)]
    reasoning: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    refusal: Option<JsonText<'a>>,
    /// Parsed only if it is present, so that it costs a delta without tool calls nothing.
    #[serde(borrow, default)]
    tool_calls: Option<&'a RawValue>,
}

/// A part of a tool call. Engines leave out what has not changed.
#[derive(Deserialize)]
struct ToolCall<'a> {
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow, default)]
    id: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    r#type: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    function: Option<Function<'a>>,
}

#[derive(Deserialize)]
struct Function<'a> {
    #[serde(borrow, default)]
    name: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    arguments: Option<JsonText<'a>>,
}

/// A part of a delta has the wrong JSON type.
#[derive(Debug)]
pub(super) struct MalformedDelta;

impl<'a> ChunkChoice<'a> {
    /// Returns the index of the choice.
    pub(super) fn index(&self) -> u32 {
        self.index.unwrap_or(0)
    }

    /// Returns the finish reason. Some engines send an empty one while the choice goes on.
    pub(super) fn finish_reason(&self) -> Option<JsonText<'a>> {
        self.finish_reason.filter(|reason| !reason.is_empty())
    }

    /// Returns true if the choice has nothing new.
    pub(super) fn is_empty(&self) -> bool {
        let has_parts = || matches!(self.chat_delta(), Ok(Some(_)) | Err(_));
        self.text().is_none()
            && self.token_ids().is_empty()
            && self.finish_reason().is_none()
            && !has_parts()
    }

    /// Returns the new text. `None` if there is none.
    pub(super) fn text(&self) -> Option<JsonText<'a>> {
        let present = |text: Option<JsonText<'a>>| text.filter(|text| !text.is_empty());
        let content = self.delta.as_ref().and_then(|delta| delta.content);
        present(self.text).or(present(content))
    }

    /// Returns the new parts of the message besides its text. `None` if there are none.
    ///
    /// # Errors
    /// A part is malformed, so that some of it would be lost.
    pub(super) fn chat_delta(&self) -> Result<Option<v1::ChatDelta>, MalformedDelta> {
        let Some(delta) = &self.delta else {
            return Ok(None);
        };
        let present = |text: Option<JsonText<'a>>| text.filter(|text| !text.is_empty());
        let reasoning = present(delta.reasoning_content).or(present(delta.reasoning));
        let refusal = present(delta.refusal);
        if reasoning.is_none() && refusal.is_none() && delta.tool_calls.is_none() {
            return Ok(None);
        }
        let delta = v1::ChatDelta {
            choice: self.index(),
            tool_calls: tool_calls(delta.tool_calls)?,
            reasoning_content: text_of(reasoning)?,
            refusal: text_of(refusal)?,
        };
        let is_empty = delta.tool_calls.is_empty() && reasoning.is_none() && refusal.is_none();
        Ok((!is_empty).then_some(delta))
    }

    /// Returns the ids of the new tokens. Empty if the engine does not report ids.
    pub(super) fn token_ids(&self) -> &[TokenId] {
        self.token_ids.as_deref().unwrap_or_default()
    }
}

fn usage_or_none<'de, D: Deserializer<'de>>(json: D) -> Result<Option<ChunkUsage>, D::Error> {
    let json = Option::<&RawValue>::deserialize(json)?;
    Ok(json.and_then(|json| serde_json::from_str(json.get()).ok()))
}

fn tool_calls(list: Option<&RawValue>) -> Result<Vec<v1::ToolCallDelta>, MalformedDelta> {
    let Some(list) = list else {
        return Ok(Vec::new());
    };
    let calls: Vec<ToolCall<'_>> = serde_json::from_str(list.get()).map_err(|_| MalformedDelta)?;
    let numbered = (0..).zip(calls);
    numbered
        .map(|(position, call)| {
            let function = call.function.as_ref();
            Ok(v1::ToolCallDelta {
                index: call.index.unwrap_or(position),
                id: text_of(call.id)?,
                r#type: text_of(call.r#type)?,
                name: text_of(function.and_then(|it| it.name))?,
                arguments: text_of(function.and_then(|it| it.arguments))?,
            })
        })
        .collect()
}

/// Returns a text, or an empty text if it is missing.
fn text_of(json: Option<JsonText<'_>>) -> Result<String, MalformedDelta> {
    let mut text = String::new();
    match json {
        Some(json) if !json.append_to(&mut text) => Err(MalformedDelta),
        Some(_) | None => Ok(text),
    }
}

/// Token counts of the request.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) struct ChunkUsage {
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    pub(super) completion_tokens: Option<u32>,
    #[serde(default)]
    prompt_tokens_details: Option<PromptDetails>,
    #[serde(default)]
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
struct CompletionDetails {
    #[serde(default)]
    reasoning_tokens: Option<u32>,
}

impl ChunkUsage {
    /// Number of prompt tokens. `None` if the engine does not know it yet.
    pub(super) fn prompt_tokens(&self) -> Option<u32> {
        self.prompt_tokens
    }

    /// Number of prompt tokens from the engine's cache, if the engine reports it.
    pub(super) fn cached_prompt_tokens(&self) -> Option<u32> {
        self.prompt_tokens_details?.cached_tokens
    }

    /// Number of tokens of reasoning, if the engine reports it.
    pub(super) fn reasoning_tokens(&self) -> Option<u32> {
        self.completion_tokens_details?.reasoning_tokens
    }

    /// Adds the completion tokens of another choice of the same prompt.
    pub(super) fn add_choice(&mut self, other: Self) {
        let tokens = self.completion_tokens.unwrap_or(0);
        let more = other.completion_tokens.unwrap_or(0);
        self.completion_tokens = Some(tokens.saturating_add(more));
    }
}
