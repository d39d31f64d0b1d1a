//! One event of a streamed response. Only the fields that Tokenway uses are read, and nothing is allocated for a chunk
//! with one choice.

use serde::Deserialize;
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::json_text::JsonText;
use crate::request::TokenId;

/// A chunk of `/completions` or `/chat/completions`.
#[derive(Deserialize)]
pub(super) struct Chunk<'a> {
    #[serde(borrow, default)]
    pub(super) model: Option<JsonText<'a>>,
    #[serde(borrow, default)]
    pub(super) choices: Option<SmallVec<[ChunkChoice<'a>; 1]>>,
    #[serde(default)]
    pub(super) usage: Option<ChunkUsage>,
    /// The error that ended the stream.
    #[serde(borrow, default)]
    pub(super) error: Option<&'a RawValue>,
}

/// A part of one choice.
#[derive(Deserialize)]
pub(super) struct ChunkChoice<'a> {
    #[serde(default)]
    pub(super) index: u32,
    /// New text (`/completions`).
    #[serde(borrow, default)]
    text: Option<JsonText<'a>>,
    /// New text (`/chat/completions`).
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
    /// Ids of the new tokens, if the engine was asked for them and can report them.
    #[serde(default)]
    token_ids: Option<SmallVec<[TokenId; 8]>>,
    #[serde(borrow, default)]
    pub(super) finish_reason: Option<JsonText<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<JsonText<'a>>,
}

impl<'a> ChunkChoice<'a> {
    /// Returns the new text. `None` if there is none.
    pub(super) fn text(&self) -> Option<JsonText<'a>> {
        let text = self
            .text
            .or(self.delta.as_ref().and_then(|delta| delta.content));
        text.filter(|text| !text.is_empty())
    }

    /// Returns the ids of the new tokens. Empty if the engine does not report ids.
    pub(super) fn token_ids(&self) -> &[TokenId] {
        self.token_ids.as_deref().unwrap_or_default()
    }
}

/// Token counts of the request.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) struct ChunkUsage {
    #[serde(default)]
    pub(super) prompt_tokens: u32,
    #[serde(default)]
    pub(super) completion_tokens: Option<u32>,
}
