//! One sequence on the device: its tokens, and how far the device has taken them in. It must not
//! know the device or the other sequences.

use std::sync::Arc;

use super::sampling::{DrawKey, History, LogitAdjustments};
use crate::request::{Sampling, StopTokens, TokenId};
use crate::runner::Sequence;

/// A sequence that has a slot.
pub(super) struct ActiveSequence {
    /// The prompt and then the completion so far.
    tokens: Vec<TokenId>,
    prompt_len: usize,
    /// How many of `tokens` the device has taken in. One is always left while the sequence runs: the
    /// device is asked for what follows it.
    taken: usize,
    /// How long `tokens` may become.
    limit: usize,
    pub(super) sampling: Sampling,
    pub(super) history: History,
    bias: Arc<[(TokenId, f32)]>,
    stop_tokens: StopTokens,
    /// The tokens that would end it, where something must come before them.
    ends: Vec<TokenId>,
    /// With how many of the likeliest tokens each token is told.
    pub(super) logprobs: Option<u32>,
    scores_prompt: bool,
    seed: u64,
    choice: u32,
    /// Counts admissions: the lower has waited longer.
    pub(super) number: u64,
}

impl ActiveSequence {
    /// A sequence that has taken nothing yet. `ends` are the tokens by which the model ends its output.
    pub(super) fn new(sequence: &Sequence, ends: &[TokenId], number: u64) -> Self {
        let prompt_len = sequence.prompt.len();
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let limit = prompt_len.saturating_add(max_tokens);
        let mut tokens = Vec::with_capacity(limit);
        tokens.extend_from_slice(&sequence.prompt);
        tokens.extend_from_slice(&sequence.delivered);
        Self {
            tokens,
            prompt_len,
            taken: 0,
            limit,
            sampling: sequence.sampling,
            history: History::new(&sequence.sampling, &sequence.prompt, &sequence.delivered),
            bias: Arc::clone(&sequence.logit_bias),
            ends: all_ends(&sequence.stop_tokens, ends),
            stop_tokens: sequence.stop_tokens.clone(),
            logprobs: sequence.logprobs,
            scores_prompt: sequence.scores_prompt,
            seed: sequence.seed,
            choice: sequence.choice,
            number,
        }
    }

    /// How many tokens the device has to take in before the next one can be sampled; 0 when there is
    /// no next one, and nothing of the prompt left to score.
    fn pending(&self) -> usize {
        if self.tokens.len() >= self.limit && !self.is_scoring() {
            return 0;
        }
        self.tokens.len() - self.taken
    }

    /// How many rows of it the next step may hold, where there is credit for so many tokens.
    pub(super) fn rows(&self, credit: usize) -> usize {
        if credit == 0 {
            0
        } else if self.is_scoring() {
            // The first row tells of the prompt's first token too; each, of the prompt's token behind it; and the
            // last may be followed by a token of the completion.
            let credit = credit.saturating_sub(usize::from(self.taken == 0));
            let behind = self.prompt_len - self.taken - 1;
            let all = self.pending();
            if behind + usize::from(self.samples_after(all)) <= credit {
                all
            } else {
                credit.min(behind)
            }
        } else {
            self.pending()
        }
    }

    /// Whether the device is still taking in a prompt whose tokens are asked for.
    pub(super) fn is_scoring(&self) -> bool {
        self.scores_prompt && self.taken < self.prompt_len
    }

    /// Whether the token after so many rows is to be sampled.
    pub(super) fn samples_after(&self, rows: usize) -> bool {
        self.taken + rows == self.tokens.len() && self.tokens.len() < self.limit
    }

    /// The prompt's token at this position.
    pub(super) fn prompt_token(&self, position: usize) -> Option<TokenId> {
        self.tokens[..self.prompt_len].get(position).copied()
    }

    /// What the request does to the logits of the next token.
    pub(super) fn moved(&self) -> LogitAdjustments<'_> {
        let is_too_early = self.draw().position < self.stop_tokens.min_tokens;
        LogitAdjustments {
            bias: &self.bias,
            banned: if is_too_early { &self.ends } else { &[] },
        }
    }

    /// Whether this token ends it. `is_end` says that the model ends its output by it.
    pub(super) fn ends_with(&self, id: TokenId, is_end: bool) -> bool {
        (is_end && !self.stop_tokens.ignore_eos) || self.stop_tokens.ids.contains(&id)
    }

    /// The next `rows` tokens for the device, and the position of the first.
    pub(super) fn next_rows(&self, rows: usize) -> (usize, &[TokenId]) {
        let end = (self.taken + rows).min(self.tokens.len());
        (self.taken, &self.tokens[self.taken..end])
    }

    /// Notes that the device has taken in `rows` tokens more.
    pub(super) fn took(&mut self, rows: usize) {
        self.taken = (self.taken + rows).min(self.tokens.len());
    }

    /// How many tokens the device has taken in.
    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    /// What the next random draw is keyed by.
    pub(super) fn draw(&self) -> DrawKey {
        let position = self.tokens.len() - self.prompt_len;
        DrawKey {
            seed: self.seed,
            choice: self.choice,
            position: u32::try_from(position).unwrap_or(u32::MAX),
        }
    }

    /// Appends a token of the completion.
    pub(super) fn push(&mut self, id: TokenId) {
        self.tokens.push(id);
        self.history.push(id);
    }
}

/// The tokens that would end a sequence, where it matters which they are.
fn all_ends(stop_tokens: &StopTokens, ends: &[TokenId]) -> Vec<TokenId> {
    if stop_tokens.min_tokens == 0 {
        return Vec::new();
    }
    let own = if stop_tokens.ignore_eos { &[] } else { ends };
    own.iter().chain(&*stop_tokens.ids).copied().collect()
}
