//! Bytes to text, for each request on the engine's side: characters across tokens, stop strings,
//! finish reasons, usage. It must not know protocols; workers know nothing of it.

use crate::request::{FinishReason, TokenId};
use crate::runner::Token;

pub mod completion;
mod stop;
mod utf8;

use stop::{StopMatcher, Watch};
use utf8::Utf8Assembler;

/// A token with the text that its line shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextToken {
    /// Its id.
    pub id: TokenId,
    /// Its text: empty while a character is unfinished, and for the end of sequence.
    pub text: String,
    /// When it was due, in nanoseconds of CLOCK_MONOTONIC, or 0.
    pub due_ns: u64,
    /// When it was emitted, in nanoseconds of CLOCK_MONOTONIC, or 0.
    pub emitted_ns: u64,
}

/// Turns the tokens of one choice into text.
struct ChoiceText {
    utf8: Utf8Assembler,
    stop: StopMatcher<Token>,
}

impl ChoiceText {
    fn new(stops: Vec<String>) -> Self {
        Self {
            utf8: Utf8Assembler::default(),
            stop: StopMatcher::new(stops),
        }
    }

    /// Takes the next token; appends to `ready` the tokens whose lines may go out now.
    fn push(&mut self, token: Token, ready: &mut Vec<TextToken>) -> Watch {
        let text = self.utf8.push(&token.bytes);
        self.stop.push(token, text, |token, text| {
            ready.push(with_text(&token, text))
        })
    }

    /// Ends the choice; appends to `ready` what was held, and the end-of-sequence token if there is
    /// one. The reason may turn out to be a stop string within the last token.
    fn finish(
        &mut self,
        token: Option<Token>,
        reason: FinishReason,
        ready: &mut Vec<TextToken>,
    ) -> FinishReason {
        let mut end_of_sequence = None;
        match (token, reason) {
            (Some(token), FinishReason::Length) => {
                let mut text = self.utf8.push(&token.bytes);
                text.extend(self.utf8.finish());
                let watch = self.stop.push(token, text, |token, text| {
                    ready.push(with_text(&token, text))
                });
                if watch == Watch::Matched {
                    return FinishReason::Stop;
                }
            }
            (token, FinishReason::Stop | FinishReason::Length) => end_of_sequence = token,
        }
        self.stop
            .finish(|token, text| ready.push(with_text(&token, text)));
        if let Some(token) = end_of_sequence {
            // What the model left unfinished before it ended is shown as such on the last line.
            let unfinished = self.utf8.finish().map(String::from).unwrap_or_default();
            ready.push(with_text(&token, unfinished));
        }
        reason
    }
}

fn with_text(token: &Token, text: String) -> TextToken {
    TextToken {
        id: token.id,
        text,
        due_ns: token.due_ns,
        emitted_ns: token.emitted_ns,
    }
}
