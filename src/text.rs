//! Converts the tokens of a request into text: UTF-8 decoding across tokens, stop strings, finish reasons and usage.
//!
//! This module must not know the protocols. Workers do not use this module, because they send the bytes of tokens.

use std::sync::Arc;

use crate::request::{FinishReason, StopStringOptions};
use crate::runner::Token;
use crate::tokens::{Timestamps, TokenBatch};

pub mod completion;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod stop;
pub mod utf8;

use stop::{StopMatcher, StopStatus, StopStrings};
use utf8::Utf8Assembler;

/// Converts the tokens of one choice into text and applies its stop strings.
struct IncrementalDetokenizer {
    utf8: Utf8Assembler,
    stop: StopMatcher<Token>,
    /// True if the text of a stop token is included in the output.
    include_stop: bool,
    /// Number of tokens that still have to come before stop strings are matched (`min_tokens`).
    min_tokens_left: u32,
    /// Text of the current token.
    text: String,
}

impl IncrementalDetokenizer {
    fn new(strings: Arc<StopStrings>, stopping: &StopStringOptions, min_tokens: u32) -> Self {
        Self {
            utf8: Utf8Assembler::default(),
            stop: StopMatcher::new(strings),
            include_stop: stopping.include_stop,
            min_tokens_left: min_tokens,
            text: String::new(),
        }
    }

    /// Decodes the next token. Appends to `ready` every token that can no longer be part of a stop string.
    fn push(&mut self, token: Token, ready: &mut TokenBatch) -> StopStatus {
        if self.stop.has_no_stop_strings() || self.min_tokens_left > 0 {
            self.min_tokens_left = self.min_tokens_left.saturating_sub(1);
            ready.push_with(token.id, timestamps(&token), |text| {
                self.utf8.push(&token.bytes, text);
            });
            ready.set_last_logprobs(token.logprobs);
            return StopStatus::Open;
        }
        self.text.clear();
        self.utf8.push(&token.bytes, &mut self.text);
        self.match_stop(token, ready)
    }

    /// Decodes the tokens that the client already has. Returns the number of tokens that are released. The other
    /// tokens are held back, as they were in the interrupted stream. Returns `None` if the tokens contain a stop
    /// string.
    fn replay(&mut self, tokens: impl Iterator<Item = Token>) -> Option<usize> {
        let mut released = TokenBatch::default();
        for token in tokens {
            if self.push(token, &mut released) == StopStatus::Matched {
                return None;
            }
        }
        Some(released.len())
    }

    /// Ends the choice: appends the held tokens and the last token to `ready`. Returns [`FinishReason::Stop`] if the
    /// last token completes a stop string.
    fn finish(
        &mut self,
        token: Option<Token>,
        reason: FinishReason,
        ready: &mut TokenBatch,
    ) -> FinishReason {
        self.text.clear();
        let mut last = None;
        match (token, reason) {
            (Some(token), FinishReason::Length) => {
                self.utf8.push(&token.bytes, &mut self.text);
                self.utf8.finish(&mut self.text);
                if self.min_tokens_left > 0 {
                    last = Some(token);
                } else if self.match_stop(token, ready) == StopStatus::Matched {
                    return FinishReason::Stop;
                }
            }
            (Some(token), FinishReason::Stop) => {
                if self.include_stop {
                    self.utf8.push(&token.bytes, &mut self.text);
                }
                // If the model left a character incomplete, the character becomes U+FFFD in the last token.
                self.utf8.finish(&mut self.text);
                last = Some(token);
            }
            (None, FinishReason::Stop | FinishReason::Length) => {}
        }
        self.stop
            .finish(|token, text| push_token(ready, token, text));
        if let Some(token) = last {
            push_token(ready, token, &self.text);
        }
        reason
    }

    /// Matches `self.text`, which is the text of `token`, against the stop strings.
    fn match_stop(&mut self, token: Token, ready: &mut TokenBatch) -> StopStatus {
        let text = &self.text;
        self.stop
            .push(token, text, |token, text| push_token(ready, token, text))
    }
}

/// Appends a token with this text.
fn push_token(ready: &mut TokenBatch, token: Token, text: &str) {
    ready.push_with(token.id, timestamps(&token), |out| out.push_str(text));
    ready.set_last_logprobs(token.logprobs);
}

fn timestamps(token: &Token) -> Timestamps {
    Timestamps {
        due_ns: token.due_ns,
        emitted_ns: token.emitted_ns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::TokenBytes;

    fn token(bytes: &[u8]) -> Token {
        Token {
            id: 0,
            bytes: TokenBytes::from_slice(bytes),
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        }
    }

    /// Decodes `tokens` and `last`. Returns the text of each released token and the finish reason.
    fn finish(
        stops: &[&str],
        tokens: &[&[u8]],
        last: &[u8],
        reason: FinishReason,
    ) -> (Vec<String>, FinishReason) {
        let stopping = StopStringOptions {
            strings: stops.iter().map(ToString::to_string).collect(),
            ..StopStringOptions::default()
        };
        finish_with(&stopping, 0, tokens, last, reason)
    }

    fn finish_with(
        stopping: &StopStringOptions,
        min_tokens: u32,
        tokens: &[&[u8]],
        last: &[u8],
        reason: FinishReason,
    ) -> (Vec<String>, FinishReason) {
        let strings =
            StopStrings::new(&stopping.strings).with_included_match(stopping.include_stop);
        let mut choice = IncrementalDetokenizer::new(Arc::new(strings), stopping, min_tokens);
        let mut ready = TokenBatch::default();
        for bytes in tokens {
            assert_eq!(choice.push(token(bytes), &mut ready), StopStatus::Open);
        }
        let reason = choice.finish(Some(token(last)), reason, &mut ready);
        let texts = ready.iter().map(|token| token.text.to_owned()).collect();
        (texts, reason)
    }

    #[test]
    fn a_character_cut_off_by_max_tokens_is_replaced_in_the_last_token() {
        let (texts, _) = finish(&[], &[b"a"], b"b\xf0\x9f", FinishReason::Length);
        assert_eq!(texts, ["a", "b\u{fffd}"]);
    }

    #[test]
    fn a_character_left_incomplete_by_the_model_is_replaced_in_the_last_token() {
        let (texts, _) = finish(&[], &[b"a\xf0\x9f"], b"</s>", FinishReason::Stop);
        assert_eq!(texts, ["a", "\u{fffd}"]);
    }

    #[test]
    fn a_stop_string_completed_by_the_last_token_sets_the_finish_reason() {
        let (texts, reason) = finish(&["STOP"], &[b"a", b"bS"], b"TOP.", FinishReason::Length);
        assert_eq!(
            (texts.concat(), reason),
            ("ab".to_owned(), FinishReason::Stop)
        );
    }

    #[test]
    fn the_end_of_sequence_token_follows_the_held_tokens() {
        let (texts, reason) = finish(&["STOP"], &[b"a", b"S"], b"TOP", FinishReason::Stop);
        assert_eq!(
            (&texts[..], reason),
            (&["a", "S", ""].map(str::to_owned)[..], FinishReason::Stop)
        );
    }

    #[test]
    fn the_text_of_a_stop_token_is_included_only_on_request() {
        let stopping = |include_stop| StopStringOptions {
            include_stop,
            ..StopStringOptions::default()
        };
        let (texts, _) = finish_with(&stopping(false), 0, &[b"a"], b"b", FinishReason::Stop);
        assert_eq!(texts, ["a", ""]);
        let (texts, _) = finish_with(&stopping(true), 0, &[b"a"], b"b", FinishReason::Stop);
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn stop_strings_are_ignored_below_min_tokens() {
        let stopping = StopStringOptions {
            strings: vec!["STOP".to_owned()],
            ..StopStringOptions::default()
        };
        let finish = |min_tokens| {
            finish_with(
                &stopping,
                min_tokens,
                &[b"a", b"S"],
                b"TOP.",
                FinishReason::Length,
            )
        };
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            finish(3),
            (owned(&["a", "S", "TOP."]), FinishReason::Length)
        );
        // The first two tokens are below `min_tokens`, so a match cannot include them.
        assert_eq!(
            finish(2),
            (owned(&["a", "S", "TOP."]), FinishReason::Length)
        );
        assert_eq!(finish(1), (owned(&["a"]), FinishReason::Stop));
    }
}
