//! The prompts that an answer repeats: gathered from the engine's events, and given out once for each
//! choice.

use std::sync::Arc;

use super::logprobs::{CompletionLogprobs, characters};
use super::size;
use crate::error::Error;
use crate::proto::v1;
use crate::tokens::TokenBatch;

/// The prompts of one request. Each is kept until all its choices have begun.
pub(super) struct Echo {
    prompts: Vec<Echoed>,
    /// Which choices have begun.
    begun: Vec<bool>,
    choices_per_prompt: usize,
    /// What all choices together repeat, as far as it is known.
    size: usize,
}

struct Echoed {
    prompt: Arc<Prompt>,
    /// How many choices have not begun.
    left: usize,
}

/// One prompt, as far as it has been told.
#[derive(Clone, Default)]
pub(super) struct Prompt {
    /// Its text.
    pub(super) text: String,
    /// Its tokens, where log probabilities are asked for.
    tokens: Vec<TokenBatch>,
    /// What it takes in an answer.
    pub(super) size: usize,
}

impl Echo {
    pub(super) fn new(prompts: usize, choices_per_prompt: usize) -> Self {
        let echoed = || Echoed {
            prompt: Arc::default(),
            left: choices_per_prompt,
        };
        Self {
            prompts: std::iter::repeat_with(echoed).take(prompts).collect(),
            begun: vec![false; prompts * choices_per_prompt],
            choices_per_prompt,
            size: 0,
        }
    }

    /// Looks whether a prompt of so many tokens, each with the log probabilities of so many, can be repeated at all.
    ///
    /// # Errors
    /// When the answer would be too long.
    pub(super) fn check(&self, tokens: u32, top: u32) -> Result<(), Error> {
        let (tokens, top) = (usize_of(tokens), usize_of(top));
        let size = size::of_logprobs(tokens, top).saturating_mul(self.choices_per_prompt);
        size::check_echo(size)
    }

    /// Takes the next part of a prompt.
    ///
    /// # Errors
    /// When the answer would be too long with it.
    pub(super) fn take(&mut self, prompt: u32, part: v1::EchoedPrompt) -> Result<(), Error> {
        let of_tokens = part
            .tokens
            .iter()
            .map(|tokens| size::of_tokens(&tokens.tokens));
        let size = size::of_text(&part.text) + of_tokens.sum::<usize>();
        self.size += size.saturating_mul(self.choices_per_prompt);
        size::check_echo(self.size)?;
        let prompt = Arc::make_mut(&mut self.prompts[at(prompt)].prompt);
        prompt.size += size;
        prompt.text.push_str(&part.text);
        prompt
            .tokens
            .extend(part.tokens.map(|tokens| tokens.tokens));
        Ok(())
    }

    /// The prompt of a choice that begins now; `None` for one that has begun. All of a prompt comes before
    /// the first of its choices.
    pub(super) fn begin(&mut self, choice: u32) -> Option<Arc<Prompt>> {
        let choice = at(choice);
        if std::mem::replace(&mut self.begun[choice], true) {
            return None;
        }
        let echoed = &mut self.prompts[choice / self.choices_per_prompt];
        echoed.left -= 1;
        Some(if echoed.left == 0 {
            std::mem::take(&mut echoed.prompt)
        } else {
            Arc::clone(&echoed.prompt)
        })
    }
}

impl Prompt {
    /// The log probabilities of its tokens.
    pub(super) fn logprobs(&self) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        let mut offset = 0;
        for token in self.tokens.iter().flat_map(TokenBatch::iter) {
            logprobs.push(&token, offset);
            offset += characters(token.text);
        }
        logprobs
    }
}

fn at(index: u32) -> usize {
    usize::try_from(index).expect("there are at most 128 choices")
}

fn usize_of(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
