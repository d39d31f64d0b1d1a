//! The state of one sequence on the device: its tokens, and how many of them the device has computed. This module
//! must not know the device or other sequences.

use std::collections::VecDeque;
use std::sync::Arc;

use super::computed_tokens::{ComputedTokens, PrefixQuery};
use super::first_logits::{FirstLogits, LogitsBuffers};
use super::prefill::{Chunk, PrefillPlan, TILED_ROWS};
use super::sampling::{DrawKey, LogitAdjustments, PenaltyHistory};
use crate::request::{CacheSalt, Sampling, StopTokens, TokenId};
use crate::runner::{Emission, Sequence, Slot, Step};

/// Maximum budget for the rows of a scored prompt in one call. Each of its rows needs memory for the logits of the
/// whole vocabulary. A call has up to 127 rows if the rest would be too small for the tiled kernel.
const SCORED_ROWS: usize = 64;

/// A sequence that has a slot.
pub(super) struct ActiveSequence {
    /// The prompt, followed by the completion tokens so far.
    tokens: Vec<TokenId>,
    prompt_len: usize,
    /// Number of entries of `tokens` that the device has computed. While the sequence runs, at least one entry is not
    /// computed yet, because the logits of the last token give the next token. Only a sequence that reuses
    /// `first_logits` starts with all entries computed.
    computed: usize,
    /// The logits from which the first token was or will be sampled. `None` before they are known.
    first_logits: Option<FirstLogits>,
    /// Maximum length of `tokens`.
    max_len: usize,
    pub(super) sampling: Sampling,
    pub(super) history: PenaltyHistory,
    bias: Arc<[(TokenId, f32)]>,
    stop_tokens: StopTokens,
    /// Tokens that are banned before `min_tokens` is reached, because they would end the sequence. Empty if
    /// `min_tokens` is 0.
    early_end_tokens: Vec<TokenId>,
    /// Number of most likely tokens to report with each token. `None` reports no log probabilities.
    pub(super) logprobs: Option<u32>,
    scores_prompt: bool,
    seed: u64,
    choice: u32,
    /// Admission number on this device. The sequence with the lowest number has waited longest.
    pub(super) admission: u64,
    plan: PrefillPlan,
    salt: CacheSalt,
    /// The sequence whose tokens this sequence waits for. `None` if it waits for none.
    pub(super) leader: Option<Leader>,
    /// Emissions for which the sequence had no credit. While there are any, the sequence computes nothing more.
    unsent: VecDeque<Emission>,
}

/// A running sequence whose prompt starts like the prompt of another sequence, which waits until the leader has
/// computed their common tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leader {
    pub(super) slot: Slot,
    /// Admission number of the leader. Another sequence in its slot has another number.
    pub(super) admission: u64,
    /// Number of tokens to copy from the leader.
    pub(super) tokens: usize,
}

impl ActiveSequence {
    /// Creates a sequence of which nothing is computed yet. `end_tokens` are the tokens with which the model ends a
    /// completion.
    pub(super) fn new(
        sequence: &Sequence,
        end_tokens: &[TokenId],
        admission: u64,
        plan: PrefillPlan,
    ) -> Self {
        let options = &sequence.options;
        let prompt_len = sequence.prompt.len();
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let max_len = prompt_len.saturating_add(max_tokens);
        let mut tokens = Vec::with_capacity(max_len);
        tokens.extend_from_slice(&sequence.prompt);
        tokens.extend_from_slice(&sequence.delivered);
        Self {
            tokens,
            prompt_len,
            computed: 0,
            first_logits: None,
            max_len,
            sampling: options.sampling,
            history: PenaltyHistory::new(&options.sampling, &sequence.prompt, &sequence.delivered),
            bias: Arc::clone(&options.logit_bias),
            early_end_tokens: early_end_tokens(&options.stop_tokens, end_tokens),
            stop_tokens: options.stop_tokens.clone(),
            logprobs: options.logprobs,
            scores_prompt: sequence.scores_prompt,
            seed: options.seed,
            choice: sequence.choice,
            admission,
            plan,
            salt: options.cache_salt.clone(),
            leader: None,
            unsent: VecDeque::new(),
        }
    }

    /// Returns the query with which this sequence looks for computed tokens. `None` for a scored prompt: it needs the
    /// logits of every row, so it can reuse nothing.
    pub(super) fn query(&self) -> Option<PrefixQuery<'_>> {
        (!self.scores_prompt).then_some(PrefixQuery {
            ids: &self.tokens,
            plan: &self.plan,
            salt: &self.salt,
        })
    }

    /// Returns the number of this sequence's tokens that `query` can reuse now.
    pub(super) fn reusable_now(&self, query: &PrefixQuery<'_>) -> usize {
        let computed = &self.tokens[..self.computed];
        let tokens_before_logits = self.first_logits.as_ref().map(|it| it.tokens);
        query.reusable(computed, &self.plan, &self.salt, tokens_before_logits)
    }

    /// Returns the number of this sequence's tokens that `query` can reuse once this sequence has computed its prompt.
    /// Returns 0 for a scored prompt: it stops while its reader is slow, and would hold up the sequences that wait for
    /// it.
    pub(super) fn reusable_later(&self, query: &PrefixQuery<'_>) -> usize {
        if self.scores_prompt {
            return 0;
        }
        let is_prefill = self.first_logits.is_none() && self.tokens.len() < self.max_len;
        if is_prefill {
            // The sequence is going to sample a token after all its present tokens.
            let count = Some(self.tokens.len());
            return query.reusable(&self.tokens, &self.plan, &self.salt, count);
        }
        let certain = &self.tokens[..self.certain_len()];
        query.reusable(certain, &self.plan, &self.salt, None)
    }

    /// Returns the number of tokens that the device is certain to compute. The last one may never be computed: no token
    /// follows the last one of a completion.
    pub(super) fn certain_len(&self) -> usize {
        self.tokens.len() - 1
    }

    /// Returns the tokens that the device has computed, after the sequence has ended.
    pub(super) fn into_computed(mut self) -> ComputedTokens {
        self.tokens.truncate(self.computed);
        ComputedTokens {
            ids: self.tokens.into(),
            plan: self.plan,
            salt: self.salt,
            first_logits: self.first_logits,
        }
    }

    /// Sets the number of computed tokens of a sequence that starts from the tokens of another one. `first_logits` are
    /// those of the other sequence. They are needed if all tokens are computed.
    pub(super) fn start_from(&mut self, computed: usize, first_logits: Option<FirstLogits>) {
        self.computed = computed;
        self.first_logits = first_logits.filter(|it| computed == it.tokens && self.is_computed());
        // Without logits, the sequence would wait for ever. After a panic the worker loads the model again.
        assert!(
            !self.is_computed() || self.first_logits.is_some(),
            "a sequence reuses all its tokens only together with the logits after them"
        );
    }

    /// Returns true if all tokens are computed.
    fn is_computed(&self) -> bool {
        self.computed == self.tokens.len()
    }

    pub(super) fn first_logits(&self) -> Option<&FirstLogits> {
        self.first_logits.as_ref()
    }

    /// Keeps a copy of the logits of the last row, from which the first token is sampled. Later calls have no effect.
    pub(super) fn keep_first_logits(&mut self, logits: &[f32], buffers: &mut LogitsBuffers) {
        if self.first_logits.is_none() {
            self.first_logits = Some(FirstLogits {
                tokens: self.tokens.len(),
                logits: buffers.copy(logits),
            });
        }
    }

    /// Returns the logits of the next token if the sequence reuses them and has credit for the token.
    pub(super) fn reused_logits(&self, credit: usize) -> Option<&FirstLogits> {
        let is_ready = credit > 0 && self.leader.is_none() && self.is_computed();
        self.first_logits.as_ref().filter(|_| is_ready)
    }

    /// Returns the number of tokens to compute before the next token can be sampled. Returns 0 if the sequence is
    /// complete and no prompt token is left to score.
    fn pending(&self) -> usize {
        if self.tokens.len() >= self.max_len && !self.is_scoring() {
            return 0;
        }
        self.tokens.len() - self.computed
    }

    /// Returns true if so few tokens are left to compute that the sequence needs no call of the tiled kernel.
    pub(super) fn is_short(&self) -> bool {
        self.pending() < TILED_ROWS
    }

    /// Returns the next call for this sequence, or `None` if it must wait or has nothing left to compute. `credit` is
    /// the number of tokens that the sequence may emit. For `tiled_budget`, see [`PrefillPlan::next_chunk`].
    pub(super) fn next_chunk(&self, credit: usize, tiled_budget: usize) -> Option<Chunk> {
        let is_blocked = credit == 0 || !self.unsent.is_empty() || self.leader.is_some();
        if is_blocked || self.pending() == 0 {
            return None;
        }
        let budget = if self.is_scoring() {
            tiled_budget.min(SCORED_ROWS)
        } else {
            tiled_budget
        };
        let chunk = self
            .plan
            .next_chunk(self.computed, self.tokens.len(), budget);
        Some(chunk)
    }

    /// Returns true if the sequence has emissions that its credit now allows.
    pub(super) fn has_unsent(&self, credit: usize) -> bool {
        credit > 0 && !self.unsent.is_empty()
    }

    /// Emits as many unsent emissions as the credit allows.
    pub(super) fn send(&mut self, slot: Slot, step: &mut Step<'_>) {
        let count = step.credit(slot).min(self.unsent.len());
        for emission in self.unsent.drain(..count) {
            step.push(emission);
        }
    }

    /// Adds an unsent emission. [`ActiveSequence::send`] emits it.
    pub(super) fn queue_emission(&mut self, emission: Emission) {
        self.unsent.push_back(emission);
    }

    /// Returns true while rows of a scored prompt are still to be computed.
    pub(super) fn is_scoring(&self) -> bool {
        self.scores_prompt && self.computed < self.prompt_len
    }

    /// Returns true if the next completion token can be sampled after `rows` more rows.
    pub(super) fn samples_after(&self, rows: usize) -> bool {
        self.computed + rows == self.tokens.len() && self.tokens.len() < self.max_len
    }

    /// Returns the prompt token at this position, from 0.
    pub(super) fn prompt_token(&self, position: usize) -> Option<TokenId> {
        self.tokens[..self.prompt_len].get(position).copied()
    }

    /// Returns the bias and the banned tokens for the next token.
    pub(super) fn logit_adjustments(&self) -> LogitAdjustments<'_> {
        let is_too_early = self.draw_key().position < self.stop_tokens.min_tokens;
        LogitAdjustments {
            bias: &self.bias,
            banned: if is_too_early {
                &self.early_end_tokens
            } else {
                &[]
            },
        }
    }

    /// Returns true if this token ends the sequence. `is_end_token` tells whether the model ends a completion with
    /// this token.
    pub(super) fn ends_with(&self, id: TokenId, is_end_token: bool) -> bool {
        (is_end_token && !self.stop_tokens.ignore_eos) || self.stop_tokens.ids.contains(&id)
    }

    /// Returns the next `rows` tokens to compute, and the position of the first one.
    pub(super) fn next_rows(&self, rows: usize) -> (usize, &[TokenId]) {
        let end = (self.computed + rows).min(self.tokens.len());
        (self.computed, &self.tokens[self.computed..end])
    }

    /// Records that the device has computed `rows` more tokens.
    pub(super) fn advance(&mut self, rows: usize) {
        self.computed = (self.computed + rows).min(self.tokens.len());
    }

    /// Forgets the computed tokens of a sequence that has failed, so that no other sequence reuses them.
    pub(super) fn forget_computed(&mut self) {
        self.computed = 0;
    }

    /// Number of tokens that the device has computed.
    pub(super) fn computed(&self) -> usize {
        self.computed
    }

    /// Returns the key of the random draw for the next token.
    pub(super) fn draw_key(&self) -> DrawKey {
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

/// Returns all tokens that end the sequence, or none if `min_tokens` is 0.
fn early_end_tokens(stop_tokens: &StopTokens, end_tokens: &[TokenId]) -> Vec<TokenId> {
    if stop_tokens.min_tokens == 0 {
        return Vec::new();
    }
    let end_tokens = if stop_tokens.ignore_eos {
        &[]
    } else {
        end_tokens
    };
    end_tokens
        .iter()
        .chain(&*stop_tokens.ids)
        .copied()
        .collect()
}
