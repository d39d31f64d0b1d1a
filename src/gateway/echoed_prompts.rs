//! The prompts that a response repeats (`echo`). They are collected from the engine's events, and each choice returns
//! its prompt once.

use std::sync::Arc;

use super::response_size;
use crate::error::Error;
use crate::proto::v1;
use crate::tokens::TokenBatch;

/// The prompts of one request. A prompt is freed once all its choices have returned it.
pub(super) struct EchoedPrompts {
    prompts: Vec<SharedPrompt>,
    /// For each choice, true once the choice has started.
    started: Vec<bool>,
    choices_per_prompt: usize,
    /// Number of bytes that all choices together repeat, for the parts received so far.
    size: usize,
}

struct SharedPrompt {
    prompt: Arc<PromptEcho>,
    /// Number of choices that have not started.
    remaining: usize,
}

/// The parts of one prompt received so far.
#[derive(Clone, Default)]
pub(super) struct PromptEcho {
    pub(super) text: String,
    /// Tokens with log probabilities; empty unless the request sets `logprobs`.
    pub(super) tokens: Vec<TokenBatch>,
    /// Estimated size in a response, in bytes.
    pub(super) size: usize,
}

impl EchoedPrompts {
    pub(super) fn new(prompts: usize, choices_per_prompt: usize) -> Self {
        let prompt = || SharedPrompt {
            prompt: Arc::default(),
            remaining: choices_per_prompt,
        };
        Self {
            prompts: std::iter::repeat_with(prompt).take(prompts).collect(),
            started: vec![false; prompts * choices_per_prompt],
            choices_per_prompt,
            size: 0,
        }
    }

    /// Checks the size of a prompt before it arrives. The prompt has `tokens` tokens, each with `top` top log
    /// probabilities.
    ///
    /// # Errors The response would be too large.
    pub(super) fn check_logprobs(&self, tokens: u32, top: u32) -> Result<(), Error> {
        let (tokens, top) = (to_usize(tokens), to_usize(top));
        let size =
            response_size::logprobs_size(tokens, top).saturating_mul(self.choices_per_prompt);
        response_size::check_echo(size)
    }

    /// Appends a part to a prompt.
    ///
    /// # Errors The response would be too large.
    pub(super) fn add(&mut self, prompt: u32, part: v1::EchoedPrompt) -> Result<(), Error> {
        let of_tokens = part
            .tokens
            .iter()
            .map(|tokens| response_size::tokens_size(&tokens.tokens));
        let size = response_size::text_size(&part.text) + of_tokens.sum::<usize>();
        self.size += size.saturating_mul(self.choices_per_prompt);
        response_size::check_echo(self.size)?;
        let prompt = Arc::make_mut(&mut self.prompts[to_index(prompt)].prompt);
        prompt.size += size;
        prompt.text.push_str(&part.text);
        prompt
            .tokens
            .extend(part.tokens.map(|tokens| tokens.tokens));
        Ok(())
    }

    /// Returns the prompt of a choice on the first call for the choice, and then `None`. The prompt is complete,
    /// because the engine sends the whole prompt before the first token of its choices.
    pub(super) fn start_choice(&mut self, choice: u32) -> Option<Arc<PromptEcho>> {
        let choice = to_index(choice);
        if std::mem::replace(&mut self.started[choice], true) {
            return None;
        }
        let shared = &mut self.prompts[choice / self.choices_per_prompt];
        shared.remaining -= 1;
        Some(if shared.remaining == 0 {
            std::mem::take(&mut shared.prompt)
        } else {
            Arc::clone(&shared.prompt)
        })
    }
}

fn to_index(index: u32) -> usize {
    usize::try_from(index).expect("a request has at most 128 choices")
}

fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
