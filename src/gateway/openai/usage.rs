//! Token counts and finish reasons, as OpenAI's objects show them.

use serde::Serialize;
use utoipa::ToSchema;

use crate::gateway::dialect::FinishReason;
use crate::proto::v1;

/// Token counts of a request. The details are shown only if the engine reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Tokens of all prompts; each prompt counts once, however many choices it has.
    pub(super) prompt_tokens: u64,
    /// Generated tokens of all choices, including those that `best_of` discards.
    pub(super) completion_tokens: u64,
    /// Sum of the prompt and completion tokens.
    pub(super) total_tokens: u64,
    /// Details of `prompt_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
    /// Details of `completion_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

/// Details of the prompt tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
struct PromptTokensDetails {
    /// Tokens that were found in the engine's prompt cache.
    cached_tokens: u64,
}

/// Details of the generated tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
struct CompletionTokensDetails {
    /// Tokens that were reasoning.
    reasoning_tokens: u64,
}

impl Usage {
    pub(super) fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            ..Self::default()
        }
    }
}

impl From<v1::Usage> for Usage {
    fn from(usage: v1::Usage) -> Self {
        let cached = usage.cached_prompt_tokens.map(u64::from);
        let reasoning = usage.reasoning_tokens.map(u64::from);
        Self {
            prompt_tokens_details: cached
                .map(|cached_tokens| PromptTokensDetails { cached_tokens }),
            completion_tokens_details: reasoning
                .map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens }),
            ..Self::new(usage.prompt_tokens.into(), usage.completion_tokens.into())
        }
    }
}

/// Returns OpenAI's name of a finish reason.
pub(super) fn finish_reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ContentFilter => "content_filter",
        FinishReason::ToolCalls => "tool_calls",
    }
}
