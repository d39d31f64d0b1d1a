//! The events that echo a prompt: its text, or its tokens with their log probabilities.

use super::event::CompletionEvent;
use crate::runner::Token;
use crate::text::utf8::Utf8Assembler;
use crate::tokens::{Timestamps, TokenBatch};

/// Maximum number of bytes of the prompt's text in one event.
const MAX_ECHO_BYTES: usize = 64 * 1024;

/// The prompt's tokens with their log probabilities, received from the token channel of choice 0.
#[derive(Default)]
pub(super) struct ScoredPrompt {
    utf8: Utf8Assembler,
    text: String,
    /// Number of bytes of `text` that the tokens received so far cover.
    matched_bytes: usize,
    /// Index of the next prompt token to return.
    next_index: u32,
    /// Number of prompt tokens still to be received. Other choices are polled only after all have arrived.
    remaining: u32,
    /// The number of tokens received.
    received: u32,
    /// Number of tokens to skip because an earlier worker already sent them.
    repeated: u32,
}

impl ScoredPrompt {
    /// Creates the state for a prompt of `remaining` tokens with this text.
    pub(super) fn new(remaining: u32, text: &str) -> Self {
        Self {
            remaining,
            text: text.to_owned(),
            ..Self::default()
        }
    }

    /// Returns true if more tokens are to be received.
    pub(super) fn is_incomplete(&self) -> bool {
        self.remaining > 0
    }

    /// Prepares for another worker that sends all prompt tokens again from the first. Has no effect if all have
    /// arrived.
    pub(super) fn restart(&mut self) {
        self.repeated = if self.is_incomplete() {
            self.received
        } else {
            0
        };
    }

    /// Appends a received token to `prompt`.
    pub(super) fn push_token(&mut self, token: Token, prompt: &mut TokenBatch) {
        if self.repeated > 0 {
            self.repeated -= 1;
            return;
        }
        self.remaining = self.remaining.saturating_sub(1);
        self.received += 1;
        let token_bytes = token
            .logprobs
            .as_deref()
            .map(|logprobs| &logprobs.token_bytes[..]);
        let bytes = match token_bytes {
            // A special token has no text in a completion. In a prompt, it has the text that the client wrote for it.
            Some(token_bytes) if token.bytes.is_empty() && self.continues_with(token_bytes) => {
                token_bytes
            }
            Some(_) | None => &token.bytes,
        };
        prompt.push_with(token.id, Timestamps::default(), |text| {
            let start = text.len();
            self.utf8.push(bytes, text);
            if self.remaining == 0 {
                self.utf8.finish(text);
            }
            self.advance(&text[start..]);
        });
        prompt.set_last_logprobs(token.logprobs);
    }

    fn continues_with(&self, token_bytes: &[u8]) -> bool {
        self.text.as_bytes()[self.matched_bytes..].starts_with(token_bytes)
    }

    /// Advances `matched_bytes` past a token's text. Some tokenizers add a space before the first word; that space is
    /// not in the prompt's text.
    fn advance(&mut self, text: &str) {
        let rest = &self.text[self.matched_bytes..];
        let after = rest
            .strip_prefix(text)
            .or_else(|| rest.strip_prefix(text.strip_prefix(' ')?));
        if let Some(after) = after {
            self.matched_bytes = self.text.len() - after.len();
        }
    }

    /// Creates the event for these tokens. Returns `None` if there are no tokens.
    pub(super) fn event(&mut self, tokens: TokenBatch) -> Option<CompletionEvent> {
        if tokens.is_empty() {
            return None;
        }
        let first_index = self.next_index;
        self.next_index +=
            u32::try_from(tokens.len()).expect("a batch has at most a few thousand tokens");
        Some(CompletionEvent::Prompt {
            text: String::new(),
            first_index,
            tokens,
        })
    }
}

/// Creates the events of a prompt's text, of at most [`MAX_ECHO_BYTES`] each.
pub(super) fn echo_events(text: Option<String>) -> impl Iterator<Item = CompletionEvent> {
    let mut rest = text.unwrap_or_default();
    std::iter::from_fn(move || {
        let cut = rest.floor_char_boundary(MAX_ECHO_BYTES);
        let after = rest.split_off(cut);
        let text = std::mem::replace(&mut rest, after);
        (!text.is_empty()).then(|| CompletionEvent::Prompt {
            text,
            first_index: 0,
            tokens: TokenBatch::default(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::TokenBytes;
    use crate::tokens::Logprobs;

    /// Returns the text of each token of a prompt. `tokens` has the bytes of each token in a completion, and its
    /// `Logprobs::token_bytes`.
    fn texts(text: &str, tokens: &[(&str, &str)]) -> Vec<String> {
        let count = u32::try_from(tokens.len()).expect("a small number");
        let mut prompt = ScoredPrompt::new(count, text);
        let mut batch = TokenBatch::default();
        for (bytes, token_bytes) in tokens {
            let logprobs = Logprobs {
                token_bytes: token_bytes.as_bytes().to_vec(),
                ..Logprobs::default()
            };
            let token = Token {
                id: 0,
                bytes: TokenBytes::from_slice(bytes.as_bytes()),
                due_ns: 0,
                emitted_ns: 0,
                logprobs: Some(Box::new(logprobs)),
            };
            prompt.push_token(token, &mut batch);
        }
        batch.iter().map(|token| token.text.to_owned()).collect()
    }

    #[test]
    fn a_special_token_has_text_where_the_prompt_contains_it() {
        let tokens = [("", "<s>"), ("Hello", "Hello"), ("", "<end>"), (" x", " x")];
        assert_eq!(texts("Hello<end> x", &tokens), ["", "Hello", "<end>", " x"]);
        // A chat template writes the BOS token itself.
        let with_bos = texts("<s>Hello<end> x", &tokens);
        assert_eq!(with_bos, ["<s>", "Hello", "<end>", " x"]);
        assert_eq!(texts("Hello x", &tokens), ["", "Hello", "", " x"]);
    }

    #[test]
    fn a_leading_space_added_by_the_tokenizer_is_not_part_of_the_prompt() {
        let tokens = [(" Hello", " Hello"), ("", "<end>")];
        assert_eq!(texts("Hello<end>", &tokens), [" Hello", "<end>"]);
    }
}
