//! JSON objects of a completion's stream: only the fields that a client needs.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::timestamps::TokenTimestamps;

#[derive(Deserialize)]
pub(super) struct RecordObject<'a> {
    #[serde(borrow)]
    pub(super) choices: Option<Vec<Choice<'a>>>,
    pub(super) stamp: Option<TokenTimestamps>,
    pub(super) error: Option<Value>,
    pub(super) timings: Option<Timings>,
    pub(super) usage: Option<Usage>,
}

#[derive(Deserialize)]
pub(super) struct Choice<'a> {
    #[serde(borrow)]
    pub(super) text: Option<Cow<'a, str>>,
    pub(super) delta: Option<Delta<'a>>,
    pub(super) finish_reason: Option<IgnoredAny>,
}

/// New part of a chat's message.
#[derive(Deserialize)]
pub(super) struct Delta<'a> {
    role: Option<IgnoredAny>,
    #[serde(borrow)]
    pub(super) content: Option<Cow<'a, str>>,
}

/// Resumptions of a completion by a gateway, from the timings at the end of its stream. llama.cpp's server sends
/// timings of another kind, which have none of these fields.
#[derive(Debug, Deserialize)]
pub(crate) struct Timings {
    #[serde(default)]
    pub(crate) resumptions: u32,
    /// Method of the last resumption.
    pub(crate) resumption_method: Option<String>,
}

/// Numbers of tokens of a request, as the server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    #[serde(default)]
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
struct PromptTokensDetails {
    cached_tokens: Option<u32>,
}

impl Delta<'_> {
    pub(super) fn is_role_only(&self) -> bool {
        self.role.is_some() && self.content.is_none()
    }
}

impl Usage {
    /// Returns the number of prompt tokens that the server did not compute, because it had computed them for an earlier
    /// request. `None` if the server does not report it.
    pub(crate) fn cached_tokens(&self) -> Option<u32> {
        self.prompt_tokens_details?.cached_tokens
    }
}
