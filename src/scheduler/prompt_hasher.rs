//! Hashes the token ids of a prompt for the scheduler's choice of a worker.

use std::hash::RandomState;

use crate::prefix_index::{BlockHasher, PromptBlocks};
use crate::request::{CacheSalt, TokenId};

/// Number of tokens in a block. A block counts as warm only if all its tokens are equal. The last block of a prompt may
/// be shorter.
const BLOCK_TOKENS: usize = 32;

/// Hashes prompts with a key that is random in each process.
#[derive(Default)]
pub(super) struct PromptHasher {
    key: RandomState,
}

impl PromptHasher {
    /// Hashes a prompt. Prompts with different salts share no blocks.
    pub(super) fn hash(&self, prompt: &[TokenId], salt: &CacheSalt) -> PromptBlocks {
        let mut hasher = BlockHasher::new(&self.key, &salt.0);
        for block in prompt.chunks(BLOCK_TOKENS) {
            hasher.push(&block, u64::try_from(block.len()).unwrap_or(u64::MAX));
        }
        hasher.finish()
    }
}
