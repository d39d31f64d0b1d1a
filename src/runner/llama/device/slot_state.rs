//! The state of each slot: empty, running a sequence, or keeping the computed tokens of a sequence that has ended.
//!
//! This module must not know llama.cpp.

use std::cmp::Reverse;

use crate::runner::Slot;
use crate::runner::llama::computed_tokens::{ComputedTokens, PrefixQuery, is_worth_copying};
use crate::runner::llama::prefill::TILED_ROWS;
use crate::runner::llama::sequence::{ActiveSequence, Leader};

/// The state of one slot.
pub(super) enum SlotState {
    /// No sequence runs, and no computed tokens are kept.
    Empty,
    /// No sequence runs. The computed tokens of the last one are kept.
    Kept(KeptTokens),
    /// A sequence runs.
    Active(Box<ActiveSequence>),
}

/// The computed tokens of a sequence that has ended.
pub(super) struct KeptTokens {
    pub(super) tokens: ComputedTokens,
    /// Number of sequences that had left a slot before this one. The lowest number belongs to the slot that was used
    /// least recently.
    released: u64,
}

/// A slot with computed tokens from which a new sequence can start, and the number of tokens to reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotSource {
    pub(super) slot: Slot,
    pub(super) tokens: usize,
}

/// The states of all slots.
pub(super) struct SlotStates {
    states: Vec<SlotState>,
    releases: u64,
}

impl SlotStates {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            states: (0..slots).map(|_| SlotState::Empty).collect(),
            releases: 0,
        }
    }

    /// Number of slots.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&SlotState> {
        self.states.get(slot.0)
    }

    /// Returns the running sequence in a slot.
    pub(super) fn sequence(&self, slot: Slot) -> Option<&ActiveSequence> {
        match self.get(slot) {
            Some(SlotState::Active(sequence)) => Some(sequence),
            Some(SlotState::Empty | SlotState::Kept(_)) | None => None,
        }
    }

    pub(super) fn sequence_mut(&mut self, slot: Slot) -> Option<&mut ActiveSequence> {
        match self.states.get_mut(slot.0) {
            Some(SlotState::Active(sequence)) => Some(sequence),
            Some(SlotState::Empty | SlotState::Kept(_)) | None => None,
        }
    }

    /// Returns the running sequences, by slot.
    pub(super) fn active(&self) -> impl Iterator<Item = (Slot, &ActiveSequence)> {
        let states = self.states.iter().enumerate();
        states.filter_map(|(index, state)| match state {
            SlotState::Active(sequence) => Some((Slot(index), &**sequence)),
            SlotState::Empty | SlotState::Kept(_) => None,
        })
    }

    pub(super) fn active_mut(&mut self) -> impl Iterator<Item = (Slot, &mut ActiveSequence)> {
        let states = self.states.iter_mut().enumerate();
        states.filter_map(|(index, state)| match state {
            SlotState::Active(sequence) => Some((Slot(index), &mut **sequence)),
            SlotState::Empty | SlotState::Kept(_) => None,
        })
    }

    /// Puts a sequence into a slot that runs none.
    pub(super) fn occupy(&mut self, slot: Slot, sequence: ActiveSequence) {
        self.states[slot.0] = SlotState::Active(Box::new(sequence));
    }

    /// Removes the running sequence from a slot. The slot is then empty.
    pub(super) fn take_active(&mut self, slot: Slot) -> Option<Box<ActiveSequence>> {
        let state = self.states.get_mut(slot.0)?;
        match std::mem::replace(state, SlotState::Empty) {
            SlotState::Active(sequence) => Some(sequence),
            kept @ (SlotState::Empty | SlotState::Kept(_)) => {
                *state = kept;
                None
            }
        }
    }

    /// Keeps the computed tokens of the sequence that has left this slot.
    pub(super) fn keep(&mut self, slot: Slot, tokens: ComputedTokens) {
        let released = self.releases;
        self.releases += 1;
        self.states[slot.0] = SlotState::Kept(KeptTokens { tokens, released });
    }

    /// Removes the kept tokens from a slot. The slot is then empty.
    pub(super) fn take_kept(&mut self, slot: Slot) -> Option<ComputedTokens> {
        let state = self.states.get_mut(slot.0)?;
        match std::mem::replace(state, SlotState::Empty) {
            SlotState::Kept(kept) => Some(kept.tokens),
            other @ (SlotState::Empty | SlotState::Active(_)) => {
                *state = other;
                None
            }
        }
    }

    /// Returns true if a slot keeps all these tokens.
    pub(super) fn keeps(&self, tokens: &ComputedTokens) -> bool {
        let mut states = self.states.iter();
        states.any(|state| match state {
            SlotState::Kept(kept) => tokens.is_part_of(&kept.tokens),
            SlotState::Empty | SlotState::Active(_) => false,
        })
    }

    /// Returns the slot with the most computed tokens that `query` can reuse now. Leaves out slots that are not worth
    /// copying. If several have equally many, prefers a slot that runs no sequence, because a new sequence can start
    /// there without a copy, and then the one with the fewest tokens.
    pub(super) fn find_computed(&self, query: &PrefixQuery<'_>) -> Option<SlotSource> {
        let states = self.states.iter().enumerate();
        let sources = states.filter_map(|(index, state)| {
            let (length, tokens) = match state {
                SlotState::Empty => return None,
                SlotState::Kept(kept) => (kept.tokens.ids.len(), kept.tokens.reusable_by(query)),
                SlotState::Active(sequence) => (sequence.computed(), sequence.reusable_now(query)),
            };
            let is_kept = matches!(state, SlotState::Kept(_));
            let slot = Slot(index);
            let source = SlotSource { slot, tokens };
            is_worth_copying(length, tokens).then_some((source, is_kept, length))
        });
        let best = sources
            .max_by_key(|(source, is_kept, length)| (source.tokens, *is_kept, Reverse(*length)));
        best.map(|(source, ..)| source)
    }

    /// Returns the running sequence that is going to compute the most tokens that `query` can reuse, if that is worth
    /// the wait and the copy. `computed` is the number of tokens that `query` can reuse now, and `admission` the
    /// admission number of its sequence. A sequence waits only for sequences that were admitted before it, so sequences
    /// never wait for each other.
    ///
    /// A leader with a long prompt may wait for its turn behind other long prompts. Waiting for such a leader pays only
    /// if it saves a call of the tiled kernel, because that call would wait behind the same prompts.
    pub(super) fn find_leader(
        &self,
        query: &PrefixQuery<'_>,
        computed: usize,
        admission: u64,
    ) -> Option<Leader> {
        let earlier = self.active();
        let earlier = earlier.filter(|(_, sequence)| sequence.admission < admission);
        let leaders = earlier.filter_map(|(slot, sequence)| {
            let tokens = sequence.reusable_later(query);
            let saved = tokens.saturating_sub(computed);
            let is_worth_waiting = saved >= TILED_ROWS || (saved > 0 && sequence.is_short());
            let is_worth_copying = is_worth_copying(sequence.certain_len(), tokens);
            let is_ahead = tokens > sequence.computed();
            (is_worth_waiting && is_worth_copying && is_ahead).then_some(Leader {
                slot,
                admission: sequence.admission,
                tokens,
            })
        });
        leaders.max_by_key(|leader| leader.tokens)
    }

    /// Returns true if the leader has computed the common tokens, or no longer runs.
    pub(super) fn is_done(&self, leader: Leader) -> bool {
        self.sequence(leader.slot).is_none_or(|sequence| {
            sequence.admission != leader.admission || sequence.computed() >= leader.tokens
        })
    }

    /// Returns the slot that a new sequence should overwrite: an empty slot, or else the slot that was used least
    /// recently. Returns `spared` only if no other slot is free.
    pub(super) fn least_recently_used(&self, free: &[Slot], spared: Option<Slot>) -> Slot {
        let released = |slot: &Slot| match self.get(*slot) {
            Some(SlotState::Kept(kept)) => Some(kept.released),
            Some(SlotState::Empty | SlotState::Active(_)) | None => None,
        };
        let others = free.iter().filter(|slot| Some(**slot) != spared);
        let oldest = others.min_by_key(|slot| released(slot));
        *oldest.or(free.last()).expect("at least one slot is free")
    }
}
