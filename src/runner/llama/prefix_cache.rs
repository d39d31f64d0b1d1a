//! A bounded store in memory for the computed tokens of sequences that had to leave their slot. This module knows
//! tokens and the size of a sequence's state. It must not know llama.cpp or the slots.

use std::cmp::Reverse;

use super::computed_tokens::{ComputedTokens, PrefixQuery, is_worth_copying};

/// Sequences that had to leave their slot, with their states. `S` is the type of a state.
pub(super) struct PrefixStore<S> {
    /// The most recently used entry is last.
    entries: Vec<StoredSequence<S>>,
    bytes: usize,
    capacity: usize,
    evictions: u64,
}

/// A sequence in the store.
pub(super) struct StoredSequence<S> {
    pub(super) tokens: ComputedTokens,
    pub(super) state: S,
    bytes: usize,
}

impl<S> PrefixStore<S> {
    /// Creates an empty store. Its states and their tokens use at most `capacity` bytes in total.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            entries: Vec::new(),
            bytes: 0,
            capacity,
            evictions: 0,
        }
    }

    /// The memory of all states and their tokens, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of sequences whose computed tokens were lost, because they were dropped to make room or could not be
    /// stored.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Counts an eviction, because a sequence could not be stored.
    pub(super) fn count_eviction(&mut self) {
        self.evictions += 1;
    }

    /// Returns true if the store can hold an entry of this size, if necessary after it has dropped all others.
    pub(super) fn can_hold(&self, bytes: usize) -> bool {
        bytes <= self.capacity
    }

    /// Returns the index of the entry of which `query` can reuse the most tokens, and the number of these tokens.
    /// Leaves out entries that are not worth copying.
    pub(super) fn find(&self, query: &PrefixQuery<'_>) -> Option<(usize, usize)> {
        let entries = self.entries.iter().enumerate();
        let found = entries.map(|(index, entry)| (index, entry.tokens.reusable_by(query)));
        let length = |index: usize| self.entries[index].tokens.ids.len();
        found
            .filter(|(index, reusable)| is_worth_copying(length(*index), *reusable))
            .max_by_key(|(index, reusable)| (*reusable, Reverse(length(*index))))
    }

    /// Returns true if a sequence in the store has all these tokens.
    pub(super) fn contains(&self, tokens: &ComputedTokens) -> bool {
        let mut entries = self.entries.iter();
        entries.any(|entry| tokens.is_part_of(&entry.tokens))
    }

    /// Returns the tokens of an entry that [`PrefixStore::find`] returned.
    pub(super) fn tokens(&self, index: usize) -> &ComputedTokens {
        &self.entries[index].tokens
    }

    /// Removes an entry that [`PrefixStore::find`] returned.
    pub(super) fn take(&mut self, index: usize) -> StoredSequence<S> {
        let entry = self.entries.remove(index);
        self.bytes -= entry.bytes;
        entry
    }

    /// Puts back an entry that [`PrefixStore::take`] returned. It is now the most recently used one.
    pub(super) fn put_back(&mut self, entry: StoredSequence<S>) {
        self.add(entry.tokens, entry.state, entry.bytes);
    }

    /// Adds a sequence. `bytes` is the size of its state and its tokens. Drops the entries that are part of it, and the
    /// least recently used entries if there is no room. The caller has checked [`PrefixStore::can_hold`].
    pub(super) fn add(&mut self, tokens: ComputedTokens, state: S, bytes: usize) {
        self.entries
            .retain(|entry| !entry.tokens.is_part_of(&tokens));
        self.bytes = self.entries.iter().map(|entry| entry.bytes).sum();
        let mut surplus = 0;
        while self.bytes + bytes > self.capacity && surplus < self.entries.len() {
            self.bytes -= self.entries[surplus].bytes;
            surplus += 1;
        }
        self.entries.drain(..surplus);
        self.evictions += u64::try_from(surplus).unwrap_or(u64::MAX);
        self.bytes += bytes;
        self.entries.push(StoredSequence {
            tokens,
            state,
            bytes,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{CacheSalt, TokenId};
    use crate::runner::llama::prefill::PrefillPlan;

    fn tokens(ids: &[TokenId]) -> ComputedTokens {
        ComputedTokens {
            ids: ids.into(),
            plan: PrefillPlan::Contiguous,
            salt: CacheSalt::default(),
            first_logits: None,
        }
    }

    fn query<'a>(ids: &'a [TokenId], salt: &'a CacheSalt) -> PrefixQuery<'a> {
        PrefixQuery {
            ids,
            plan: &PrefillPlan::Contiguous,
            salt,
        }
    }

    /// Creates a store with room for 30 bytes, and adds these sequences of 10 bytes each.
    fn store(sequences: &[&[TokenId]]) -> PrefixStore<()> {
        let mut store = PrefixStore::new(30);
        for ids in sequences {
            store.add(tokens(ids), (), 10);
        }
        store
    }

    fn found(store: &PrefixStore<()>, ids: &[TokenId]) -> Option<usize> {
        let salt = CacheSalt::default();
        store.find(&query(ids, &salt)).map(|(_, reusable)| reusable)
    }

    #[test]
    fn the_longest_common_prefix_is_found() {
        let store = store(&[&[1, 2], &[1, 2, 3, 4], &[9]]);
        assert_eq!(found(&store, &[1, 2, 3, 7]), Some(3));
        assert_eq!(
            found(&store, &[1, 2, 3]),
            Some(2),
            "the last token is computed"
        );
        assert_eq!(found(&store, &[7]), None);
    }

    #[test]
    fn a_full_store_drops_the_least_recently_used_sequence() {
        let mut store = store(&[&[1, 1], &[2, 2], &[3, 3]]);
        let entry = store.take(0);
        assert_eq!(store.bytes(), 20);
        store.put_back(entry);
        store.add(tokens(&[4, 4]), (), 15);
        assert_eq!(found(&store, &[2, 2, 0]), None);
        assert_eq!(found(&store, &[3, 3, 0]), None);
        assert_eq!(found(&store, &[1, 1, 0]), Some(2));
        assert_eq!((store.bytes(), store.evictions()), (25, 2));
        assert!(!store.can_hold(31));
    }

    #[test]
    fn a_longer_sequence_replaces_its_own_prefix_without_an_eviction() {
        let mut store = store(&[&[1, 2], &[1, 3]]);
        assert!(store.contains(&tokens(&[1])));
        store.add(tokens(&[1, 2, 3]), (), 10);
        assert_eq!((store.bytes(), store.evictions()), (20, 0));
        assert_eq!(found(&store, &[1, 3, 0]), Some(2));
    }

    #[test]
    fn sequences_with_other_salts_share_nothing() {
        let salted = |salt: &str| ComputedTokens {
            salt: CacheSalt(Some(salt.into())),
            ..tokens(&[1, 2, 3])
        };
        let mut store = PrefixStore::new(30);
        store.add(salted("a"), (), 10);
        assert!(store.contains(&salted("a")));
        assert!(!store.contains(&salted("b")) && !store.contains(&tokens(&[1, 2, 3])));
        assert_eq!(found(&store, &[1, 2, 3]), None);
        let salt = CacheSalt(Some("a".into()));
        assert_eq!(store.find(&query(&[1, 2, 3], &salt)), Some((0, 2)));
    }
}
