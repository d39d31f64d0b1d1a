//! The outputs of a sequence, in the form in which a token channel carries them.

use crate::request::FinishReason;
use crate::runner::{ModelError, Token};

/// A message on a token channel. A sequence sends its messages in the order of these variants.
#[derive(Debug)]
pub enum Output {
    /// A worker has accepted the sequence.
    Accepted {
        /// Number of tokens at the start of the prompt that the worker does not compute again.
        cached_tokens: u32,
    },
    /// The next token of the prompt.
    Prompt(Token),
    /// The next token of the completion.
    Token(Token),
    /// The next tokens of the completion, from one step.
    Tokens(Vec<Token>),
    /// The sequence has finished. The token is its last one; `None` if the last token was sent before.
    Finished(Option<Token>, FinishReason),
    /// The sequence failed.
    Failed(Failure),
}

/// Reason for the early end of a sequence. After a crash there is no failure: the channel closes without an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The model rejected the sequence or failed on it.
    Model(ModelError),
    /// The reader made no progress within the slow-reader timeout.
    SlowReader,
    /// The deadline passed.
    DeadlineExceeded,
    /// The server is shutting down.
    Draining,
    /// The sequence has lost its place in the queue to a request of another caller.
    Displaced,
}

/// The result of sending an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendOutcome {
    /// The output was put on the channel.
    Delivered,
    /// The reader is gone.
    Closed,
    /// The channel has too little credit for the output.
    NoCredit,
}

impl Output {
    /// Returns the completion tokens in this output.
    pub fn completion_tokens(&self) -> &[Token] {
        match self {
            Self::Token(token) | Self::Finished(Some(token), _) => std::slice::from_ref(token),
            Self::Tokens(tokens) => tokens,
            Self::Accepted { .. } | Self::Prompt(_) | Self::Finished(None, _) | Self::Failed(_) => {
                &[]
            }
        }
    }

    /// Number of tokens of credit that this output needs.
    pub(super) fn credit(&self) -> usize {
        match self {
            Self::Prompt(_) | Self::Token(_) => 1,
            Self::Tokens(tokens) => tokens.len(),
            Self::Accepted { .. } | Self::Finished(..) | Self::Failed(_) => 0,
        }
    }
}
