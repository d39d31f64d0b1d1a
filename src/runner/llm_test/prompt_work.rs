//! Simulates the time that a prompt takes: a fixed time for each prompt token that no earlier sequence has computed.
//! Tests of scheduling by prefix therefore need no real model.
//!
//! Each slot keeps the prompt and the completion of its last sequence. A sequence starts from the longest common
//! prefix of any slot.

use std::sync::Arc;
use std::time::Duration;

use crate::request::{CacheSalt, TokenId};
use crate::runner::{PrefixCacheStats, Sequence, Slot};

/// The computed tokens in each slot.
pub(super) struct PromptWork {
    /// Time for each prompt token that is not computed yet.
    per_token: Duration,
    slots: Vec<ComputedTokens>,
    /// Number of sequences so far.
    uses: u64,
    evictions: u64,
}

/// The computed tokens in one slot.
#[derive(Clone, Default)]
struct ComputedTokens {
    prompt: Arc<[TokenId]>,
    /// Number of tokens of the completion. Their ids are their indices.
    completion: u32,
    salt: CacheSalt,
    /// Number of the last sequence in this slot, counted from 1. 0 if no sequence has used the slot.
    used: u64,
    /// True while the sequence runs.
    is_running: bool,
}

impl ComputedTokens {
    fn ids(&self) -> impl Iterator<Item = TokenId> {
        self.prompt.iter().copied().chain(0..self.completion)
    }

    fn len(&self) -> usize {
        self.prompt.len() + usize::try_from(self.completion).unwrap_or(usize::MAX)
    }

    /// Returns the number of these tokens with which the sequence's prompt starts. The last token of the prompt does
    /// not count, because a device always computes it.
    fn shared_with(&self, sequence: &Sequence) -> usize {
        if self.salt != sequence.options.cache_salt {
            return 0;
        }
        let prompt = sequence.prompt.iter().copied();
        let shared = self
            .ids()
            .zip(prompt)
            .take_while(|(own, other)| own == other);
        shared.count().min(sequence.prompt.len().saturating_sub(1))
    }
}

impl PromptWork {
    pub(super) fn new(per_token: Duration, slots: usize) -> Self {
        Self {
            per_token,
            slots: vec![ComputedTokens::default(); slots],
            uses: 0,
            evictions: 0,
        }
    }

    /// Returns the free slot with the longest common prefix. Among equals, returns the one that was used least
    /// recently.
    pub(super) fn choose_slot(&self, sequence: &Sequence, free: &[Slot]) -> Slot {
        let key = |slot: &&Slot| {
            let computed = &self.slots[slot.0];
            let shared = computed.shared_with(sequence);
            (shared, std::cmp::Reverse(computed.used))
        };
        *free
            .iter()
            .max_by_key(key)
            .expect("at least one slot is free")
    }

    /// Puts a sequence into a slot. Returns the number of prompt tokens that an earlier sequence has computed.
    pub(super) fn admit(&mut self, slot: Slot, sequence: &Sequence) -> usize {
        if self.per_token.is_zero() {
            return 0;
        }
        let shared = |computed: &ComputedTokens| computed.shared_with(sequence);
        let cached = self.slots.iter().map(shared).max().unwrap_or(0);
        let overwritten = &self.slots[slot.0];
        if overwritten.len() > 0 && overwritten.shared_with(sequence) == 0 {
            self.evictions += 1;
        }
        self.uses += 1;
        self.slots[slot.0] = ComputedTokens {
            prompt: Arc::clone(&sequence.prompt),
            completion: 0,
            salt: sequence.options.cache_salt.clone(),
            used: self.uses,
            is_running: true,
        };
        cached
    }

    /// Records the end of the sequence in a slot, after this number of completion tokens.
    pub(super) fn release(&mut self, slot: Slot, completion: u32) {
        let computed = &mut self.slots[slot.0];
        if std::mem::take(&mut computed.is_running) {
            computed.completion = completion;
        }
    }

    /// Returns the time that a prompt takes if `cached` of its tokens are not computed again.
    pub(super) fn duration(&self, sequence: &Sequence, cached: usize) -> Duration {
        let tokens = sequence.prompt.len().saturating_sub(cached);
        self.per_token
            .saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX))
    }

    pub(super) fn stats(&self) -> PrefixCacheStats {
        PrefixCacheStats {
            bytes: 0,
            evictions: self.evictions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(slots: usize) -> PromptWork {
        PromptWork::new(Duration::from_millis(2), slots)
    }

    fn salted(ids: &[TokenId], salt: &str) -> Sequence {
        let mut sequence = Sequence::new(ids, 8);
        sequence.options.cache_salt = CacheSalt(Some(salt.into()));
        sequence
    }

    #[test]
    fn only_tokens_that_no_earlier_sequence_has_computed_take_time() {
        let mut work = work(2);
        let first = Sequence::new([7, 8, 9], 8);
        assert_eq!(work.admit(Slot(0), &first), 0);
        assert_eq!(work.duration(&first, 0), Duration::from_millis(6));
        work.release(Slot(0), 2);
        // The next turn repeats the prompt and the completion, whose ids are 0 and 1.
        let next = Sequence::new([7, 8, 9, 0, 1, 5], 8);
        assert_eq!(work.choose_slot(&next, &[Slot(1), Slot(0)]), Slot(0));
        assert_eq!(work.admit(Slot(0), &next), 5);
        assert_eq!(work.duration(&next, 5), Duration::from_millis(2));
    }

    #[test]
    fn the_last_token_of_a_prompt_is_always_computed() {
        let mut work = work(2);
        let sequence = Sequence::new([7, 8, 9], 8);
        work.admit(Slot(0), &sequence);
        assert_eq!(work.admit(Slot(1), &sequence), 2);
    }

    #[test]
    fn an_unrelated_prompt_gets_the_slot_that_was_used_least_recently() {
        let mut work = work(3);
        for (slot, id) in [(1, 1), (0, 2), (2, 3)] {
            work.admit(Slot(slot), &Sequence::new([id, id], 8));
            work.release(Slot(slot), 0);
        }
        let unrelated = Sequence::new([9, 9], 8);
        let free = [Slot(0), Slot(1), Slot(2)];
        assert_eq!(work.choose_slot(&unrelated, &free), Slot(1));
        work.admit(Slot(1), &unrelated);
        assert_eq!(work.stats().evictions, 1);
    }

    #[test]
    fn prompts_with_different_salts_share_nothing() {
        let mut work = work(2);
        work.admit(Slot(0), &salted(&[7, 8, 9], "a"));
        assert_eq!(work.admit(Slot(1), &salted(&[7, 8, 9], "b")), 0);
        assert_eq!(work.admit(Slot(0), &salted(&[7, 8, 9], "b")), 2);
    }

    #[test]
    fn without_a_time_per_token_nothing_is_reused() {
        let mut work = PromptWork::new(Duration::ZERO, 1);
        let sequence = Sequence::new([7, 8, 9], 8);
        assert_eq!(work.admit(Slot(0), &sequence), 0);
        work.release(Slot(0), 0);
        assert_eq!(work.admit(Slot(0), &sequence), 0);
    }
}
