//! The prompt as a client is told it: its text, and its tokens with their log probabilities.

use super::CompletionEvent;
use crate::runner::Token;
use crate::text::utf8::Utf8Assembler;
use crate::tokens::{Stamp, TokenBatch};

/// The most bytes of the prompt's text in one event.
const ECHO: usize = 64 * 1024;

/// The prompt's tokens on their way with their log probabilities, which come by the first choice's lane.
#[derive(Default)]
pub(super) struct ScoredPrompt {
    utf8: Utf8Assembler,
    next_index: u32,
    /// How many are still to come: until then no other choice is looked at.
    left: u32,
}

impl ScoredPrompt {
    /// A prompt of which so many tokens are to come.
    pub(super) fn of(left: u32) -> Self {
        Self {
            left,
            ..Self::default()
        }
    }

    /// Whether there are more to come.
    pub(super) fn is_coming(&self) -> bool {
        self.left > 0
    }

    pub(super) fn take(&mut self, token: Token, prompt: &mut TokenBatch) {
        self.left = self.left.saturating_sub(1);
        prompt.push_written(token.id, Stamp::default(), |text| {
            self.utf8.push(&token.bytes, text);
            if self.left == 0 {
                self.utf8.finish(text);
            }
        });
        prompt.attach(token.logprobs);
    }

    pub(super) fn event(&mut self, tokens: TokenBatch) -> Option<CompletionEvent> {
        if tokens.is_empty() {
            return None;
        }
        let first_index = self.next_index;
        self.next_index += u32::try_from(tokens.len()).expect("a batch is small");
        Some(CompletionEvent::Prompt {
            text: String::new(),
            first_index,
            tokens,
        })
    }
}

/// The events that tell a prompt's text, in pieces that fit well into a message.
pub(super) fn echoed(text: Option<String>) -> impl Iterator<Item = CompletionEvent> {
    let mut rest = text.unwrap_or_default();
    std::iter::from_fn(move || {
        let cut = rest.floor_char_boundary(ECHO);
        let after = rest.split_off(cut);
        let text = std::mem::replace(&mut rest, after);
        (!text.is_empty()).then(|| CompletionEvent::Prompt {
            text,
            first_index: 0,
            tokens: TokenBatch::default(),
        })
    })
}
