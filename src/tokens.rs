//! Tokens as a client is shown them: many of one choice at once, their texts in one piece of memory.
//!
//! Every token passes through here on its way from text to the doors, so a token costs no allocation
//! of its own.

use crate::request::TokenId;

/// Tokens of one choice, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenBatch {
    /// The texts of all tokens, with nothing between them.
    text: String,
    tokens: Vec<Entry>,
    /// Up to the last token that has any: most requests ask for none.
    logprobs: Vec<Option<Box<Logprobs>>>,
}

/// A token of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextToken<'a> {
    /// Its id.
    pub id: TokenId,
    /// Its text: empty while a character is unfinished, and for the end of sequence.
    pub text: &'a str,
    /// When it was due and emitted.
    pub timestamps: Timestamps,
    /// How likely it was, where its client asked.
    pub logprobs: Option<&'a Logprobs>,
}

/// What a model thought of one position: natural logarithms of probabilities, as its logits give them,
/// before bias, penalties and temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// The token's own; `None` for the first token of a prompt, which nothing comes before.
    pub logprob: Option<f32>,
    /// The bytes that name the token, also where it is never shown.
    pub token_bytes: Vec<u8>,
    /// The likeliest tokens, as many as were asked for, the likeliest first.
    pub top: Vec<TopLogprob>,
}

/// One of the likeliest tokens of a position.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprob {
    /// Its id.
    pub id: TokenId,
    /// The bytes that name it.
    pub token_bytes: Vec<u8>,
    /// Its log probability.
    pub logprob: f32,
}

/// Stands for the log probability of what cannot be: JSON has no infinity.
pub const MIN_LOGPROB: f32 = -9999.0;

/// A token's times, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamps {
    /// When the token was due; 0 where its device keeps no schedule, or nobody asked.
    pub due_ns: u64,
    /// When it was emitted; 0 where nobody asked.
    pub emitted_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    id: TokenId,
    /// Where the token's text ends; it begins where the one before ends.
    end: usize,
    timestamps: Timestamps,
}

impl TokenBatch {
    /// Makes room for so many more tokens, and so many more bytes of text.
    pub fn reserve(&mut self, tokens: usize, text: usize) {
        self.text.reserve(text);
        self.tokens.reserve(tokens);
    }

    /// Appends a token.
    pub fn push(&mut self, token: TextToken<'_>) {
        self.set_text(token.text);
        self.end_token(token.id, token.timestamps);
        self.attach(token.logprobs.cloned().map(Box::new));
    }

    /// Appends a token whose text is written by `write`, which must only append.
    pub(crate) fn push_written(
        &mut self,
        id: TokenId,
        timestamps: Timestamps,
        write: impl FnOnce(&mut String),
    ) {
        write(&mut self.text);
        self.end_token(id, timestamps);
    }

    /// Says what the text of the next token is, for who reads a token piece by piece.
    pub(crate) fn set_text(&mut self, text: &str) {
        let begin = self.tokens.last().map_or(0, |last| last.end);
        self.text.truncate(begin);
        self.text.push_str(text);
    }

    /// Appends a token with the text that was set since the one before, or none.
    pub(crate) fn end_token(&mut self, id: TokenId, timestamps: Timestamps) {
        self.tokens.push(Entry {
            id,
            end: self.text.len(),
            timestamps,
        });
    }

    /// Says how likely the last token was, where that is known.
    pub(crate) fn attach(&mut self, logprobs: Option<Box<Logprobs>>) {
        if logprobs.is_some() {
            let before_it = self.tokens.len().saturating_sub(1);
            self.logprobs.resize_with(before_it, || None);
            self.logprobs.push(logprobs);
        }
    }

    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The texts of all tokens, one after the other.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tokens, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = TextToken<'_>> + ExactSizeIterator {
        (0..self.tokens.len()).map(|at| {
            let token = self.tokens[at];
            let begin = at
                .checked_sub(1)
                .map_or(0, |before| self.tokens[before].end);
            TextToken {
                id: token.id,
                text: &self.text[begin..token.end],
                timestamps: token.timestamps,
                logprobs: self.logprobs.get(at).and_then(Option::as_deref),
            }
        })
    }

    /// The tokens behind the first so many.
    #[must_use]
    pub(crate) fn without_first(self, count: usize) -> Self {
        if count == 0 {
            return self;
        }
        let mut rest = Self::default();
        for token in self.iter().skip(count) {
            rest.push(token);
        }
        rest
    }

    /// Forgets when the tokens were due and emitted.
    pub fn clear_timestamps(&mut self) {
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
        let rest = batch.clone().without_first(1);
        assert!(rest.iter().eq(tokens[1..].iter().copied()));
        assert_eq!(rest.text(), "token");
        batch.clear_timestamps();
        assert!(
            batch
                .iter()
                .all(|token| token.timestamps == Timestamps::default())
        );
    }
}
