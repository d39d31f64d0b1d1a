//! One sequence on the device: its tokens, and how far the device has taken them in. It must not
//! know the device or the other sequences.

use super::sampling::{Draw, History};
use crate::request::{Sampling, TokenId};
use crate::runner::Sequence;

/// A sequence that has a slot.
pub(super) struct Running {
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
    seed: u64,
    choice: u32,
    /// Counts admissions: the lower has waited longer.
    pub(super) number: u64,
}

impl Running {
    pub(super) fn new(sequence: &Sequence, number: u64) -> Self {
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
            seed: sequence.seed,
            choice: sequence.choice,
            number,
        }
    }

    /// How many tokens the device has to take in before the next one can be sampled; 0 when there is
    /// no next one.
    pub(super) fn pending(&self) -> usize {
        if self.tokens.len() >= self.limit {
            return 0;
        }
        self.tokens.len() - self.taken
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

    /// What the next random draw is keyed by.
    pub(super) fn draw(&self) -> Draw {
        let position = self.tokens.len() - self.prompt_len;
        Draw {
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
