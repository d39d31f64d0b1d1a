//! The gateway's prefix index: hashes of the prompts that it has sent, and the targets that got them. This module must
//! not know how a target is chosen.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::policy::TargetView;
use super::prompt_blocks::prompt_blocks;
use super::route::Target;
use super::spec::PlacementPolicy;
use crate::prefix_index::{PrefixIndex, PromptBlocks};
use crate::proto::v1;
use crate::telemetry::{PrefixPlacement, Telemetry};

/// The prefix index, and the key of its hashes. Clones share the index.
#[derive(Clone)]
pub(super) struct Prefixes(Arc<SharedPrefixes>);

struct SharedPrefixes {
    index: Mutex<PrefixIndex<TargetCache>>,
    max_blocks: NonZeroU32,
    /// Key of all hashes.
    key: RandomState,
}

/// The cache of an engine for the prompts of one model, as a hash of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TargetCache(u64);

/// The prompt of one request, and the prefix index.
pub(super) struct PromptPrefix {
    prefixes: Prefixes,
    blocks: PromptBlocks,
}

impl Prefixes {
    /// Returns the prefix index for a placement: `earlier` if it has the same size, otherwise an empty one. `None` if
    /// the placement needs no index.
    pub(super) fn for_placement(
        placement: PlacementPolicy,
        earlier: Option<&Self>,
    ) -> Option<Self> {
        let PlacementPolicy::CacheAware { max_blocks } = placement else {
            return None;
        };
        let kept = earlier.filter(|earlier| earlier.0.max_blocks == max_blocks);
        Some(kept.cloned().unwrap_or_else(|| Self::new(max_blocks)))
    }

    fn new(max_blocks: NonZeroU32) -> Self {
        let size = usize::try_from(max_blocks.get()).unwrap_or(usize::MAX);
        Self(Arc::new(SharedPrefixes {
            index: Mutex::new(PrefixIndex::new(size)),
            max_blocks,
            key: RandomState::new(),
        }))
    }

    /// Hashes the prompt of a request.
    pub(super) fn prompt(&self, message: &v1::CompletionRequest) -> PromptPrefix {
        PromptPrefix {
            blocks: prompt_blocks(message, &self.0.key),
            prefixes: self.clone(),
        }
    }

    fn cache_of(&self, target: &Target) -> TargetCache {
        let cache = target.member.cache_id();
        TargetCache(self.0.key.hash_one((cache, &target.model)))
    }

    fn index(&self) -> MutexGuard<'_, PrefixIndex<TargetCache>> {
        // The index stays valid if a thread panics while it holds the lock.
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PromptPrefix {
    /// Sets the number of prompt tokens that each target's engine is expected to reuse.
    pub(super) fn set_warm_tokens(&self, targets: &[Target], views: &mut [TargetView]) {
        let warm = self.warm_tokens(targets);
        for (view, warm_tokens) in views.iter_mut().zip(warm) {
            view.warm_tokens = warm_tokens;
        }
    }

    fn warm_tokens(&self, targets: &[Target]) -> Vec<u64> {
        let caches = targets.iter().map(|it| self.prefixes.cache_of(it));
        let caches: Vec<_> = caches.collect();
        let index = self.prefixes.index();
        let warm = caches.into_iter();
        warm.map(|cache| index.warm_tokens(&self.blocks, cache))
            .collect()
    }

    /// Records that the engine of a target has accepted the request, and counts the placement.
    pub(super) fn record(&self, targets: &[Target], target: usize, telemetry: &Telemetry) {
        let warm = self.warm_tokens(targets);
        let tiers = targets.iter().map(|target| target.tier);
        let tiers: Vec<_> = tiers.zip(warm.iter().copied()).collect();
        let placement = compare_with_tier(&tiers, target);
        let engine = &targets[target].member.name;
        telemetry.count_placement(engine, placement, warm[target]);
        let cache = self.prefixes.cache_of(&targets[target]);
        self.prefixes.index().record(&self.blocks, cache);
    }
}

/// Compares the chosen target with the others of its tier, among which the policy chooses. Each target is given by its
/// tier and its warm tokens.
fn compare_with_tier(targets: &[(usize, u64)], chosen: usize) -> PrefixPlacement {
    let (tier, warm) = targets[chosen];
    let in_tier = targets.iter().filter(|(other, _)| *other == tier);
    let longest = in_tier.map(|(_, warm)| *warm).max().unwrap_or_default();
    match warm {
        0 if longest == 0 => PrefixPlacement::Cold,
        here if here == longest => PrefixPlacement::Warm,
        _ => PrefixPlacement::WarmerElsewhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_is_compared_with_the_engines_of_its_own_tier() {
        use PrefixPlacement::{Cold, Warm, WarmerElsewhere};
        for (targets, chosen, expected) in [
            ([(0, 0), (0, 0), (1, 0)], 0, Cold),
            ([(0, 9), (0, 9), (1, 0)], 1, Warm),
            ([(0, 4), (0, 9), (1, 0)], 0, WarmerElsewhere),
            ([(0, 0), (0, 9), (1, 0)], 0, WarmerElsewhere),
            // The fallback is warmer, but no choice.
            ([(0, 0), (0, 0), (1, 9)], 0, Cold),
            ([(0, 4), (0, 0), (1, 9)], 0, Warm),
            // A fallback gets the request because the targets before it cannot.
            ([(0, 9), (0, 9), (1, 0)], 2, Cold),
            ([(0, 9), (0, 9), (1, 4)], 2, Warm),
        ] {
            let placement = compare_with_tier(&targets, chosen);
            assert_eq!(placement, expected, "{targets:?}, {chosen}");
        }
    }
}
