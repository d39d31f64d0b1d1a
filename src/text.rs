//! Bytes to text, for each request on the engine's side: characters across tokens, stop strings,
//! finish reasons, usage. It must not know protocols; workers know nothing of it.

use std::sync::Arc;

use crate::request::{FinishReason, Stopping};
use crate::runner::Token;
use crate::tokens::{Timestamps, TokenBatch};

pub mod completion;
pub mod stop;
pub mod utf8;

use stop::{StopMatcher, StopStatus, StopStrings};
use utf8::Utf8Assembler;

/// Turns the tokens of one choice into text.
struct IncrementalDetokenizer {
    utf8: Utf8Assembler,
    stop: StopMatcher<Token>,
    /// Whether a stop token's own text is shown.
    include_stop: bool,
    /// How many tokens more come before stop strings are looked for.
    min_tokens_left: u32,
    /// The text of the token that is looked at.
    text: String,
}

impl IncrementalDetokenizer {
    fn new(strings: Arc<StopStrings>, stopping: &Stopping) -> Self {
        Self {
            utf8: Utf8Assembler::default(),
            stop: StopMatcher::new(strings),
            include_stop: stopping.include_stop,
            min_tokens_left: stopping.tokens.min_tokens,
            text: String::new(),
        }
    }

    /// Takes the next token; appends to `ready` the tokens whose lines may go out now.
    fn push(&mut self, token: Token, ready: &mut TokenBatch) -> StopStatus {
        if self.stop.is_idle() || self.min_tokens_left > 0 {
            self.min_tokens_left = self.min_tokens_left.saturating_sub(1);
            ready.push_written(token.id, timestamps(&token), |text| {
                self.utf8.push(&token.bytes, text);
            });
            ready.attach(token.logprobs);
            return StopStatus::Open;
        }
        self.text.clear();
        self.utf8.push(&token.bytes, &mut self.text);
        self.watch(token, ready)
    }

    /// Takes in the tokens that a client already has, and says how many of them have their lines; the rest is held
    /// back, as it was when they were made. `None` where a stop string among them has ended the choice.
    fn replay(&mut self, tokens: impl Iterator<Item = Token>) -> Option<usize> {
        let mut told = TokenBatch::default();
        for token in tokens {
            if self.push(token, &mut told) == StopStatus::Matched {
                return None;
            }
        }
        Some(told.len())
    }

    /// Ends the choice; appends to `ready` what was held, and the end-of-sequence or stop token if there
    /// is one. The reason may turn out to be a stop string within the last token.
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
                } else if self.watch(token, ready) == StopStatus::Matched {
                    return FinishReason::Stop;
                }
            }
            (Some(token), FinishReason::Stop) => {
                if self.include_stop {
                    self.utf8.push(&token.bytes, &mut self.text);
                }
                // What the model left unfinished before it ended is shown as such on the last line.
                self.utf8.finish(&mut self.text);
                last = Some(token);
            }
            (None, FinishReason::Stop | FinishReason::Length) => {}
        }
        self.stop.finish(|token, text| put(ready, token, text));
        if let Some(token) = last {
            put(ready, token, &self.text);
        }
        reason
    }

    /// Has the token's text looked at for stop strings.
    fn watch(&mut self, token: Token, ready: &mut TokenBatch) -> StopStatus {
        let text = &self.text;
        self.stop
            .push(token, text, |token, text| put(ready, token, text))
    }
}

/// Appends a token with the text that is shown of it.
fn put(ready: &mut TokenBatch, token: Token, text: &str) {
    ready.push_written(token.id, timestamps(&token), |shown| shown.push_str(text));
    ready.attach(token.logprobs);
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
    use crate::request::StopTokens;
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

    /// What is shown of a choice whose tokens end with this one, and why it ended.
    fn ended(
        stops: &[&str],
        tokens: &[&[u8]],
        last: &[u8],
        reason: FinishReason,
    ) -> (Vec<String>, FinishReason) {
        let stopping = Stopping {
            strings: stops.iter().map(ToString::to_string).collect(),
            ..Stopping::default()
        };
        ended_by(&stopping, tokens, last, reason)
    }

    fn ended_by(
        stopping: &Stopping,
        tokens: &[&[u8]],
        last: &[u8],
        reason: FinishReason,
    ) -> (Vec<String>, FinishReason) {
        let strings = StopStrings::new(&stopping.strings).shown(stopping.include_stop);
        let mut choice = IncrementalDetokenizer::new(Arc::new(strings), stopping);
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
        let (texts, _) = ended(&[], &[b"a"], b"b\xf0\x9f", FinishReason::Length);
        assert_eq!(texts, ["a", "b\u{fffd}"]);
    }

    #[test]
    fn a_character_left_incomplete_by_the_model_is_replaced_in_the_last_token() {
        let (texts, _) = ended(&[], &[b"a\xf0\x9f"], b"</s>", FinishReason::Stop);
        assert_eq!(texts, ["a", "\u{fffd}"]);
    }

    #[test]
    fn a_stop_string_completed_by_the_last_token_sets_the_finish_reason() {
        let (texts, reason) = ended(&["STOP"], &[b"a", b"bS"], b"TOP.", FinishReason::Length);
        assert_eq!(
            (texts.concat(), reason),
            ("ab".to_owned(), FinishReason::Stop)
        );
    }

    #[test]
    fn the_end_of_sequence_token_follows_the_held_tokens() {
        let (texts, reason) = ended(&["STOP"], &[b"a", b"S"], b"TOP", FinishReason::Stop);
        assert_eq!(
            (&texts[..], reason),
            (&["a", "S", ""].map(str::to_owned)[..], FinishReason::Stop)
        );
    }

    #[test]
    fn the_text_of_a_stop_token_is_included_only_on_request() {
        let stopping = |include_stop| Stopping {
            include_stop,
            ..Stopping::default()
        };
        let (texts, _) = ended_by(&stopping(false), &[b"a"], b"b", FinishReason::Stop);
        assert_eq!(texts, ["a", ""]);
        let (texts, _) = ended_by(&stopping(true), &[b"a"], b"b", FinishReason::Stop);
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn stop_strings_are_ignored_below_min_tokens() {
        let stopping = |min_tokens| Stopping {
            strings: vec!["STOP".to_owned()],
            tokens: StopTokens {
                min_tokens,
                ..StopTokens::default()
            },
            ..Stopping::default()
        };
        let ended = |min_tokens| {
            ended_by(
                &stopping(min_tokens),
                &[b"a", b"S"],
                b"TOP.",
                FinishReason::Length,
            )
        };
        let whole = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(ended(3), (whole(&["a", "S", "TOP."]), FinishReason::Length));
        // What came before is not looked at, so it is no part of a match either.
        assert_eq!(ended(2), (whole(&["a", "S", "TOP."]), FinishReason::Length));
        assert_eq!(ended(1), (whole(&["a"]), FinishReason::Stop));
    }
}
