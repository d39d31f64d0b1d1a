//! The prompts that an answer repeats: gathered from the engine's events, and given out once for each
//! choice.

use std::sync::Arc;

use super::logprobs::{CompletionLogprobs, characters};
use crate::proto::v1;
use crate::tokens::TokenBatch;

/// The prompts of one request. Each is kept until all its choices have begun.
pub(super) struct Echo {
    prompts: Vec<Echoed>,
    /// Which choices have begun.
    begun: Vec<bool>,
    choices_per_prompt: usize,
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
        }
    }

    /// Takes the next part of a prompt.
    pub(super) fn take(&mut self, prompt: u32, part: v1::EchoedPrompt) {
        let prompt = Arc::make_mut(&mut self.prompts[at(prompt)].prompt);
        prompt.text.push_str(&part.text);
        prompt
            .tokens
            .extend(part.tokens.map(|tokens| tokens.tokens));
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
