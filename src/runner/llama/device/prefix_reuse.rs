//! Starts sequences from computed tokens in their own slot, in another slot, or in the store. Before a slot is
//! overwritten, its computed tokens are copied to the store.

use llama_cpp_2::context::session::{LlamaStateSeqFlags, SeqState};

use super::LlamaRunner;
use super::slot_state::{SlotSource, SlotState};
use crate::request::TokenId;
use crate::runner::llama::computed_tokens::{ComputedTokens, PrefixQuery};
use crate::runner::llama::first_logits::FirstLogits;
use crate::runner::llama::prefix_cache::StoredSequence;
use crate::runner::llama::sequence::{ActiveSequence, Leader};
use crate::runner::{Sequence, Slot};

/// Computed tokens from which a new sequence starts.
enum Source {
    /// Tokens in a slot. The slot may run a sequence.
    Slot(SlotSource),
    /// Tokens in an entry of the store.
    Stored {
        /// Index of the entry.
        index: usize,
        /// Number of tokens to reuse.
        tokens: usize,
    },
    /// Tokens that a running sequence is going to compute.
    Leader(Leader),
}

impl Source {
    fn tokens(&self) -> usize {
        match self {
            Self::Slot(source) => source.tokens,
            Self::Stored { tokens, .. } => *tokens,
            Self::Leader(leader) => leader.tokens,
        }
    }
}

impl LlamaRunner {
    /// Returns the slot in which a new sequence should start: the slot whose tokens it reuses, if the slot loses at
    /// most half of them, or else the slot that was used least recently.
    pub(super) fn choose_slot_by_prefix(&self, sequence: &Sequence, free: &[Slot]) -> Slot {
        let ids: Vec<TokenId> = [&*sequence.prompt, &*sequence.delivered].concat();
        let plan = self.prefill_plan(&sequence.prompt);
        let query = PrefixQuery {
            ids: &ids,
            plan: &plan,
            salt: &sequence.options.cache_salt,
        };
        let query = Some(query).filter(|_| !sequence.scores_prompt);
        let source = match self.find_source(query, u64::MAX) {
            Some(Source::Slot(source)) if free.contains(&source.slot) => source,
            Some(_) | None => return self.slots.least_recently_used(free, None),
        };
        let loses_most = match self.slots.get(source.slot) {
            Some(SlotState::Kept(kept)) => loses_most(&kept.tokens, source.tokens),
            Some(SlotState::Empty | SlotState::Active(_)) | None => false,
        };
        if loses_most {
            return self.slots.least_recently_used(free, Some(source.slot));
        }
        source.slot
    }

    /// Starts a sequence in a slot that runs none. Returns the number of tokens that the sequence reuses. If
    /// the sequence waits for a leader, the leader still has to compute these tokens.
    pub(super) fn start(&mut self, slot: Slot, mut sequence: ActiveSequence) -> usize {
        let source = self.find_source(sequence.query(), sequence.admission);
        let first_logits = source.as_ref().and_then(|it| self.first_logits(it));
        let kept = self.slots.take_kept(slot);
        let reused = match source {
            Some(Source::Slot(own)) if own.slot == slot => {
                if let Some(kept) = kept.filter(|kept| loses_most(kept, own.tokens)) {
                    self.copy_to_store(slot, kept);
                }
                self.truncate(slot, own.tokens)
            }
            Some(Source::Slot(other)) => {
                self.vacate(slot, kept);
                self.copy_from_slot(other, slot)
            }
            Some(Source::Stored { index, tokens }) => {
                let stored = self.store.take(index);
                self.vacate(slot, kept);
                self.restore(stored, tokens, slot)
            }
            Some(Source::Leader(leader)) => {
                self.vacate(slot, kept);
                sequence.leader = Some(leader);
                0
            }
            None => {
                self.vacate(slot, kept);
                0
            }
        };
        let promised = sequence.leader.map_or(0, |leader| leader.tokens);
        sequence.start_from(reused, first_logits);
        self.slots.occupy(slot, sequence);
        reused.max(promised)
    }

    /// Copies computed tokens to the sequences whose leaders are done. If a leader ended before it had computed the
    /// common tokens, the first sequence that waited for it becomes the leader of the others.
    pub(super) fn copy_from_leaders(&mut self) {
        let slots = &self.slots;
        let waiting = slots.active().filter_map(|(slot, sequence)| {
            let leader = sequence.leader?;
            slots.is_done(leader).then_some((sequence.admission, slot))
        });
        let mut ready: Vec<_> = waiting.collect();
        ready.sort_unstable();
        for (admission, slot) in ready {
            let Some(mut sequence) = self.slots.take_active(slot) else {
                continue;
            };
            sequence.leader = None;
            // If the leader has ended, its tokens may be in its slot, in the store or in another sequence.
            let source = self.find_source(sequence.query(), admission);
            let first_logits = source.as_ref().and_then(|it| self.first_logits(it));
            let reused = match source {
                Some(Source::Slot(source)) => self.copy_from_slot(source, slot),
                Some(Source::Stored { index, tokens }) => {
                    let stored = self.store.take(index);
                    self.restore(stored, tokens, slot)
                }
                Some(Source::Leader(leader)) => {
                    sequence.leader = Some(leader);
                    0
                }
                None => 0,
            };
            sequence.start_from(reused, first_logits);
            self.slots.occupy(slot, *sequence);
        }
    }

    /// Keeps the computed tokens of a sequence that has ended.
    pub(super) fn keep(&mut self, slot: Slot, sequence: ActiveSequence) {
        let tokens = sequence.into_computed();
        if self.reuses_prefixes && !tokens.ids.is_empty() {
            self.slots.keep(slot, tokens);
        } else {
            self.clear(slot);
        }
    }

    /// Returns the source with the most reusable tokens for a sequence that has computed nothing yet. `None` if the
    /// sequence has to compute all tokens. `admission` is the sequence's admission number.
    fn find_source(&self, query: Option<PrefixQuery<'_>>, admission: u64) -> Option<Source> {
        let query = query.filter(|_| self.reuses_prefixes)?;
        let computed = self.find_computed(&query);
        let count = computed.as_ref().map_or(0, Source::tokens);
        match self.slots.find_leader(&query, count, admission) {
            Some(leader) => Some(Source::Leader(leader)),
            None => computed,
        }
    }

    /// Returns the logits from which the sequence of this source sampled its first token.
    fn first_logits(&self, source: &Source) -> Option<FirstLogits> {
        let logits = match source {
            Source::Slot(source) => match self.slots.get(source.slot)? {
                SlotState::Kept(kept) => kept.tokens.first_logits.as_ref(),
                SlotState::Active(sequence) => sequence.first_logits(),
                SlotState::Empty => None,
            },
            Source::Stored { index, .. } => self.store.tokens(*index).first_logits.as_ref(),
            Source::Leader(_) => None,
        };
        logits.cloned()
    }

    /// Returns the source with the most computed tokens that `query` can reuse. Prefers a slot to the store if both
    /// have equally many.
    fn find_computed(&self, query: &PrefixQuery<'_>) -> Option<Source> {
        let slot = self.slots.find_computed(query);
        let count = slot.map_or(0, |source| source.tokens);
        let stored = self.store.find(query);
        match stored.filter(|(_, tokens)| *tokens > count) {
            Some((index, tokens)) => Some(Source::Stored { index, tokens }),
            None => slot.map(Source::Slot),
        }
    }

    /// Empties a slot. Its kept tokens go to the store.
    fn vacate(&mut self, slot: Slot, kept: Option<ComputedTokens>) {
        if let Some(kept) = kept {
            self.copy_to_store(slot, kept);
        }
        self.clear(slot);
    }

    /// Copies the tokens in a slot to the store, unless a copy of them is kept elsewhere.
    fn copy_to_store(&mut self, slot: Slot, tokens: ComputedTokens) {
        if self.slots.keeps(&tokens) || self.store.contains(&tokens) {
            return;
        }
        let size = self.context.with_dependent(|_, context| {
            context.state_seq_get_size_ext(seq_id(slot), LlamaStateSeqFlags::empty())
        });
        let bytes = size + tokens.bytes();
        if !self.store.can_hold(bytes) {
            return self.store.count_eviction();
        }
        match self.state(slot) {
            Some(state) => self.store.add(tokens, state, bytes),
            None => self.store.count_eviction(),
        }
    }

    /// Copies computed tokens from another slot to an empty slot. Returns the number of tokens.
    fn copy_from_slot(&mut self, source: SlotSource, slot: Slot) -> usize {
        match self.state(source.slot) {
            Some(state) => self.set_state(slot, &state, source.tokens),
            None => 0,
        }
    }

    /// Copies computed tokens from the store to an empty slot. Puts the entry back unless the slot then has all
    /// its tokens. Returns the number of tokens.
    fn restore(&mut self, stored: StoredSequence<SeqState>, tokens: usize, slot: Slot) -> usize {
        let reused = self.set_state(slot, &stored.state, tokens);
        if reused < stored.tokens.ids.len() {
            self.store.put_back(stored);
        }
        reused
    }

    /// Returns a copy of the state of a slot.
    fn state(&self, slot: Slot) -> Option<SeqState> {
        let state = self.context.with_dependent(|_, context| {
            context.state_seq_get(seq_id(slot), LlamaStateSeqFlags::empty())
        });
        state
            .inspect_err(|error| {
                tracing::error!(slot = slot.0, %error, "could not copy the KV cache of a slot");
            })
            .ok()
    }

    /// Writes a state into an empty slot, and removes all but the first `tokens` tokens. Returns the number of tokens
    /// that the slot then has: 0 if llama.cpp reports an error.
    fn set_state(&mut self, slot: Slot, state: &SeqState, tokens: usize) -> usize {
        let set = self
            .context
            .with_dependent_mut(|_, context| context.state_seq_set(state, seq_id(slot)));
        if let Err(error) = set {
            tracing::error!(slot = slot.0, %error, "could not write the KV cache of a slot");
            self.clear(slot);
            return 0;
        }
        self.truncate(slot, tokens)
    }

    /// Removes all but the first `tokens` tokens of a slot. Returns the number of tokens that the slot then has: 0 if
    /// llama.cpp cannot remove only the last tokens, or no longer has the first ones.
    fn truncate(&mut self, slot: Slot, tokens: usize) -> usize {
        let Ok(first) = u32::try_from(tokens) else {
            self.clear(slot);
            return 0;
        };
        let (removed, first_position) = self.context.with_dependent_mut(|_, context| {
            let removed = context
                .kv_cache_seq_rm(seq_id(slot), Some(first), None)
                .is_ok();
            (removed, context.kv_cache_seq_pos_min(seq_id(slot)))
        });
        if removed && first_position == 0 {
            return tokens;
        }
        self.clear(slot);
        0
    }

    /// Removes all tokens of a slot.
    fn clear(&mut self, slot: Slot) {
        let removed = self
            .context
            .with_dependent_mut(|_, context| context.kv_cache_seq_rm(seq_id(slot), None, None));
        if removed.is_err() {
            tracing::error!(slot = slot.0, "could not free the KV cache of a slot");
        }
    }
}

/// Returns true if a slot loses more than half of its tokens when it keeps only the first `tokens`.
fn loses_most(kept: &ComputedTokens, tokens: usize) -> bool {
    tokens < kept.ids.len().div_ceil(2)
}

/// Returns llama.cpp's sequence id of a slot.
fn seq_id(slot: Slot) -> i32 {
    i32::try_from(slot.0).expect("a context has at most 256 slots")
}
