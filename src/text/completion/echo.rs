//! The prompt as a client is told it: its text, and its tokens with their log probabilities.

use super::CompletionEvent;
use crate::runner::Token;
use crate::text::utf8::Utf8Assembler;
use crate::tokens::{Timestamps, TokenBatch};

/// The most bytes of the prompt's text in one event.
const MAX_ECHO_BYTES: usize = 64 * 1024;

/// The prompt's tokens on their way with their log probabilities, which come by the first choice's token_channel.
#[derive(Default)]
pub(super) struct ScoredPrompt {
    utf8: Utf8Assembler,
    /// The prompt's text, and how much of it the tokens that have come stand for.
    text: String,
    passed: usize,
    next_index: u32,
    /// How many are still to come: until then no other choice is looked at.
    left: u32,
    /// How many have come, and how many of these come again from another worker.
    told: u32,
    again: u32,
}

impl ScoredPrompt {
    /// A prompt of which so many tokens are to come, with the text that they stand for.
    pub(super) fn new(left: u32, text: &str) -> Self {
        Self {
            left,
            text: text.to_owned(),
            ..Self::default()
        }
    }

    /// Whether there are more to come.
    pub(super) fn is_coming(&self) -> bool {
        self.left > 0
    }

    /// The worker was lost. Another begins with the first token again, where not all had come.
    pub(super) fn comes_again(&mut self) {
        self.again = if self.is_coming() { self.told } else { 0 };
    }

    pub(super) fn take(&mut self, token: Token, prompt: &mut TokenBatch) {
        if self.again > 0 {
            self.again -= 1;
            return;
        }
        self.left = self.left.saturating_sub(1);
        self.told += 1;
        let token_bytes = token
            .logprobs
            .as_deref()
            .map(|known| &known.token_bytes[..]);
        let bytes = match token_bytes {
            // What steers the model has no text where the model writes it. In a prompt it has the text by
            // which the client named it.
            Some(token_bytes) if token.bytes.is_empty() && self.goes_on_with(token_bytes) => {
                token_bytes
            }
            Some(_) | None => &token.bytes,
        };
        prompt.push_with(token.id, Timestamps::default(), |text| {
            let begin = text.len();
            self.utf8.push(bytes, text);
            if self.left == 0 {
                self.utf8.finish(text);
            }
            self.pass(&text[begin..]);
        });
        prompt.set_last_logprobs(token.logprobs);
    }

    fn goes_on_with(&self, token_bytes: &[u8]) -> bool {
        self.text.as_bytes()[self.passed..].starts_with(token_bytes)
    }

    /// Goes on behind a token's text. Some tokenizers write a space before the first word.
    fn pass(&mut self, text: &str) {
        let rest = &self.text[self.passed..];
        let after = rest
            .strip_prefix(text)
            .or_else(|| rest.strip_prefix(text.strip_prefix(' ')?));
        if let Some(after) = after {
            self.passed = self.text.len() - after.len();
        }
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

    /// The texts that these tokens of a prompt are told with: each its own text, and its token_bytes.
    fn told(text: &str, tokens: &[(&str, &str)]) -> Vec<String> {
        let count = u32::try_from(tokens.len()).expect("a few");
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
            prompt.take(token, &mut batch);
        }
        batch.iter().map(|token| token.text.to_owned()).collect()
    }

    #[test]
    fn a_special_token_has_text_where_the_prompt_contains_it() {
        let tokens = [("", "<s>"), ("Hello", "Hello"), ("", "<end>"), (" x", " x")];
        assert_eq!(told("Hello<end> x", &tokens), ["", "Hello", "<end>", " x"]);
        // A conversation's template writes the beginning itself.
        let whole = told("<s>Hello<end> x", &tokens);
        assert_eq!(whole, ["<s>", "Hello", "<end>", " x"]);
        assert_eq!(told("Hello x", &tokens), ["", "Hello", "", " x"]);
    }

    #[test]
    fn a_leading_space_added_by_the_tokenizer_is_not_part_of_the_prompt() {
        let tokens = [(" Hello", " Hello"), ("", "<end>")];
        assert_eq!(told("Hello<end>", &tokens), [" Hello", "<end>"]);
    }
}
