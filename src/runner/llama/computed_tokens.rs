//! The tokens that a device has computed for a sequence, and how many of them another sequence can reuse. This module
//! must not know where they are kept.

use std::sync::Arc;

use super::first_logits::FirstLogits;
use super::prefill::PrefillPlan;
use crate::request::{CacheSalt, TokenId};

/// The tokens of a sequence that a device has computed.
#[derive(Clone, Debug)]
pub(super) struct ComputedTokens {
    pub(super) ids: Arc<[TokenId]>,
    pub(super) plan: PrefillPlan,
    pub(super) salt: CacheSalt,
    pub(super) first_logits: Option<FirstLogits>,
}

impl ComputedTokens {
    /// Returns the number of these tokens that `query` can reuse.
    pub(super) fn reusable_by(&self, query: &PrefixQuery<'_>) -> usize {
        let tokens_before_logits = self.first_logits.as_ref().map(|it| it.tokens);
        query.reusable(&self.ids, &self.plan, &self.salt, tokens_before_logits)
    }

    /// Memory of the tokens and of the logits, in bytes.
    pub(super) fn bytes(&self) -> usize {
        let logits = self.first_logits.as_ref();
        size_of_val(&*self.ids) + logits.map_or(0, |it| size_of_val(&*it.logits))
    }

    /// Returns true if `other` has all these tokens, computed in the same way, so that a copy of them is of no use.
    pub(super) fn is_part_of(&self, other: &Self) -> bool {
        self.salt == other.salt
            && other.ids.starts_with(&self.ids)
            && self.plan.reusable(&other.plan, self.ids.len(), usize::MAX) >= self.ids.len()
    }
}

/// A sequence that looks for computed tokens.
pub(super) struct PrefixQuery<'a> {
    pub(super) ids: &'a [TokenId],
    pub(super) plan: &'a PrefillPlan,
    pub(super) salt: &'a CacheSalt,
}

impl PrefixQuery<'_> {
    /// Returns the number of computed tokens that this sequence can reuse. `ids`, `plan` and `salt` belong to the
    /// sequence for which the tokens were computed, and `tokens_before_logits` is the number of tokens after which its
    /// logits are known. Only with the logits after its last token can a sequence reuse all its tokens.
    pub(super) fn reusable(
        &self,
        ids: &[TokenId],
        plan: &PrefillPlan,
        salt: &CacheSalt,
        tokens_before_logits: Option<usize>,
    ) -> usize {
        if salt != self.salt {
            return 0;
        }
        let total = self.ids.len();
        let pairs = ids.iter().zip(self.ids);
        let common = pairs.take_while(|(own, other)| own == other).count();
        let is_whole = common == total && tokens_before_logits == Some(total);
        if is_whole && self.plan.reusable(plan, common, usize::MAX) == total {
            return total;
        }
        self.plan.reusable(plan, common, total)
    }
}

/// Maximum number of tokens that are copied for each token that a sequence reuses. A copy has all tokens of its source,
/// because llama.cpp copies a sequence as a whole. The number is an estimate; the cost of a copy was not measured.
const MAX_COPIED_PER_REUSED: usize = 32;

/// Returns true if `reused` is a large enough part of the `computed` tokens to copy them all.
pub(super) fn is_worth_copying(computed: usize, reused: usize) -> bool {
    reused > 0 && computed <= reused.saturating_mul(MAX_COPIED_PER_REUSED)
}
