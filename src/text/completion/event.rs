//! The events of a completion.

use std::time::Duration;

use crate::request::FinishReason;
use crate::telemetry::StageSummary;
use crate::tokens::TokenBatch;

/// An event of a completion. The order is: one `Started`, the prompt if the request echoes it, tokens, one `Summary`.
#[derive(Clone, Debug, PartialEq)]
pub enum CompletionEvent {
    /// A worker has accepted the first of the choices.
    Started,
    /// A part of the prompt.
    Prompt {
        /// The prompt's text. Empty if `tokens` is not empty.
        text: String,
        /// The index of the first of `tokens` within the prompt.
        first_index: u32,
        /// The prompt's tokens with their log probabilities, if the request asks for log probabilities.
        tokens: TokenBatch,
    },
    /// Consecutive tokens of one choice.
    Tokens {
        /// The number of the choice.
        choice: u32,
        /// The index of the first of `tokens` within the choice.
        first_index: u32,
        /// The tokens. Empty if the choice ends without a token.
        tokens: TokenBatch,
        /// The finish reason, if the choice ends with this event.
        finish: Option<FinishReason>,
    },
    /// All choices have finished.
    Summary(Summary),
}

/// The usage and the timings of a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The number of tokens of the prompt.
    pub prompt_tokens: u32,
    /// The number of prompt tokens that were not computed again, because an earlier request had computed them. `None`
    /// if the model's runner reuses no prefixes.
    pub cached_prompt_tokens: Option<u32>,
    /// The number of tokens of all choices, with or without text.
    pub completion_tokens: u32,
    /// The time from arrival until a worker accepted the first of the choices.
    pub queue: Duration,
    /// The time from arrival until the first token.
    pub first_token: Duration,
    /// The time from arrival until the last choice ended.
    pub total: Duration,
    /// The time from each token's emission until this stream received it.
    pub engine: StageSummary,
}
