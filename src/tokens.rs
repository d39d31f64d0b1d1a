//! Batches of tokens with their text, as clients receive them.
//!
//! A batch keeps the texts of all its tokens in one string, so that a token needs no allocation of its own.

use crate::request::TokenId;

/// Consecutive tokens of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenBatch {
    /// The concatenated texts of all tokens.
    text: String,
    tokens: Vec<Entry>,
    /// Log probabilities of the tokens. The list ends at the last token that has any, so it is empty for most
    /// requests.
    logprobs: Vec<Option<Box<Logprobs>>>,
}

/// One token of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextToken<'a> {
    /// The token id.
    pub id: TokenId,
    /// Text of the token. Empty for an end-of-sequence token, and while a UTF-8 character is incomplete.
    pub text: &'a str,
    /// Times at which the token was due and was emitted.
    pub timestamps: Timestamps,
    /// The log probabilities, if the request asked for them.
    pub logprobs: Option<&'a Logprobs>,
}

/// The log probabilities at one position: natural logarithms, computed from the logits before bias, penalties and
/// temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// The log probability of the token itself. `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The bytes of the token. A special token has bytes here although its text is empty.
    pub token_bytes: Vec<u8>,
    /// The most likely tokens, as many as the request asked for, in descending order.
    pub top: Vec<TopLogprob>,
}

/// One of the most likely tokens at a position.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprob {
    /// The token id.
    pub id: TokenId,
    /// The bytes of the token.
    pub token_bytes: Vec<u8>,
    /// The log probability.
    pub logprob: f32,
}

/// Log probability that stands for an impossible token, because JSON has no infinity.
pub(crate) const MIN_LOGPROB: f32 = -9999.0;

/// The times of a token, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamps {
    /// Scheduled emission time. 0 if the runner has no schedule or the request did not ask for timestamps.
    pub due_ns: u64,
    /// Actual emission time. 0 if the request did not ask for timestamps.
    pub emitted_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    id: TokenId,
    /// End of the token's text as an offset in the batch's text. The text starts at the end of the previous token.
    end: usize,
    timestamps: Timestamps,
}

impl TokenBatch {
    /// Reserves space for `tokens` more tokens and `text` more bytes of text.
    pub fn reserve(&mut self, tokens: usize, text: usize) {
        self.text.reserve(text);
        self.tokens.reserve(tokens);
    }

    /// Appends a token.
    pub fn push(&mut self, token: TextToken<'_>) {
        self.set_text(token.text);
        self.finish_token(token.id, token.timestamps);
        self.set_last_logprobs(token.logprobs.cloned().map(Box::new));
    }

    /// Appends a token. `write` appends the token's text to the string that it receives.
    pub(crate) fn push_with(
        &mut self,
        id: TokenId,
        timestamps: Timestamps,
        write: impl FnOnce(&mut String),
    ) {
        write(&mut self.text);
        self.finish_token(id, timestamps);
    }

    /// Sets the text of the next token. A protobuf decoder needs this, because it may read the fields of a token in
    /// any order.
    pub(crate) fn set_text(&mut self, text: &str) {
        let start = self.tokens.last().map_or(0, |last| last.end);
        self.text.truncate(start);
        self.text.push_str(text);
    }

    /// Appends a token. Its text is everything written since the previous token.
    pub(crate) fn finish_token(&mut self, id: TokenId, timestamps: Timestamps) {
        self.tokens.push(Entry {
            id,
            end: self.text.len(),
            timestamps,
        });
    }

    /// Sets the log probabilities of the last token.
    pub(crate) fn set_last_logprobs(&mut self, logprobs: Option<Box<Logprobs>>) {
        if logprobs.is_some() {
            let last = self.tokens.len().saturating_sub(1);
            self.logprobs.resize_with(last, || None);
            self.logprobs.push(logprobs);
        }
    }

    /// The number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns true if the batch has no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The concatenated texts of all tokens.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tokens, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = TextToken<'_>> + ExactSizeIterator {
        (0..self.tokens.len()).map(|at| {
            let token = self.tokens[at];
            let start = at
                .checked_sub(1)
                .map_or(0, |previous| self.tokens[previous].end);
            TextToken {
                id: token.id,
                text: &self.text[start..token.end],
                timestamps: token.timestamps,
                logprobs: self.logprobs.get(at).and_then(Option::as_deref),
            }
        })
    }

    /// Removes the first `count` tokens.
    #[must_use]
    pub(crate) fn skip_first(self, count: usize) -> Self {
        if count == 0 {
            return self;
        }
        let mut rest = Self::default();
        for token in self.iter().skip(count) {
            rest.push(token);
        }
        rest
    }

    /// Keeps only the first `count` tokens.
    pub(crate) fn truncate(&mut self, count: usize) {
        self.tokens.truncate(count);
        self.text
            .truncate(self.tokens.last().map_or(0, |last| last.end));
        self.logprobs.truncate(count);
    }

    /// Removes the timestamps of all tokens.
    pub(crate) fn clear_timestamps(&mut self) {
        for token in &mut self.tokens {
            token.timestamps = Timestamps::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_returns_the_tokens_that_were_pushed() {
        let timestamps = Timestamps {
            due_ns: 1,
            emitted_ns: 2,
        };
        let logprobs = Logprobs {
            logprob: Some(-0.5),
            ..Logprobs::default()
        };
        let token = |id, text, logprobs| TextToken {
            id,
            text,
            timestamps,
            logprobs,
        };
        let tokens = [
            token(7, "é", None),
            token(8, "", Some(&logprobs)),
            token(9, "token", None),
        ];
        let mut batch = TokenBatch::default();
        for token in tokens {
            batch.push(token);
        }
        assert!(batch.iter().eq(tokens));
        assert!(batch.iter().rev().eq(tokens.into_iter().rev()));
        assert_eq!((batch.len(), batch.text()), (3, "étoken"));
        let rest = batch.clone().skip_first(1);
        assert!(rest.iter().eq(tokens[1..].iter().copied()));
        assert_eq!(rest.text(), "token");
        let mut first = batch.clone();
        first.truncate(2);
        assert!(first.iter().eq(tokens[..2].iter().copied()));
        assert_eq!(first.text(), "é");
        batch.clear_timestamps();
        assert!(
            batch
                .iter()
                .all(|token| token.timestamps == Timestamps::default())
        );
    }
}
