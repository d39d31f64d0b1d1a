//! Records which prompt prefixes are in which prefix cache, in bounded memory. A cache belongs to a worker or an
//! engine.
//!
//! `PrefixIndex` is a plain struct without a clock and without I/O. It stores hashes of a prompt's blocks, not its
//! text. It must not know whose cache it is, or how a prompt is cut into blocks.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, RandomState};

#[cfg(test)]
mod tests;

/// Maximum number of blocks of one prompt that are hashed. The rest of a longer prompt counts as new for every
/// cache. The limit prevents one prompt from filling an index of the default size.
pub(crate) const MAX_PROMPT_BLOCKS: usize = 4_096;

/// The blocks in each cache. The least recently used blocks are forgotten first.
///
/// A key `K` identifies a cache. A worker or engine that has lost its cache needs a new key: the blocks of the old key
/// are then never found again, and are forgotten like all blocks that are no longer used.
///
/// The blocks are in two sets. A block that is used moves to the recent set. When the recent set is full, the older set
/// is dropped, and the recent set becomes the older one. So a block is remembered as long as fewer than half of the
/// maximum number of other blocks have been used since.
#[derive(Debug)]
pub(crate) struct PrefixIndex<K> {
    recent: HashSet<(BlockHash, K)>,
    older: HashSet<(BlockHash, K)>,
    /// Maximum number of blocks in each of the two sets.
    max_set_len: usize,
}

/// Hash of a block and of all blocks before it.
type BlockHash = u64;

/// The hashes of a prompt's blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptBlocks(Vec<Block>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    hash: BlockHash,
    /// Number of tokens up to the end of this block.
    tokens: u64,
}

/// Hashes a prompt block by block. Each hash includes the hash before it, so equal hashes mean equal prefixes.
///
/// The hash is SipHash with a key that is random in each process. Clients do not know the key, so they cannot construct
/// prompts whose hashes collide.
pub(crate) struct BlockHasher<'a> {
    key: &'a RandomState,
    last: BlockHash,
    tokens: u64,
    blocks: Vec<Block>,
}

impl<K: Copy + Eq + Hash> PrefixIndex<K> {
    /// Creates an empty index of at most this number of blocks.
    pub(crate) fn new(max_blocks: usize) -> Self {
        Self {
            recent: HashSet::new(),
            older: HashSet::new(),
            max_set_len: max_blocks / 2,
        }
    }

    /// Returns the number of tokens in the longest prefix of the prompt that a cache has.
    pub(crate) fn warm_tokens(&self, prompt: &PromptBlocks, cache: K) -> u64 {
        // `record` keeps the first blocks longest. So a cache that has a block also has all blocks before it.
        let known = prompt
            .0
            .partition_point(|block| self.contains(block.hash, cache));
        let last = known.checked_sub(1).map(|last| prompt.0[last]);
        last.map_or(0, |block| block.tokens)
    }

    /// Records that a cache gets this prompt.
    pub(crate) fn record(&mut self, prompt: &PromptBlocks, cache: K) {
        // The first block is recorded last, so the last blocks of a prompt are forgotten first.
        for block in prompt.0.iter().rev() {
            self.record_block((block.hash, cache));
        }
    }

    fn record_block(&mut self, block: (BlockHash, K)) {
        if self.recent.contains(&block) || self.max_set_len == 0 {
            return;
        }
        if self.recent.len() == self.max_set_len {
            std::mem::swap(&mut self.recent, &mut self.older);
            self.recent.clear();
        }
        self.older.remove(&block);
        self.recent.insert(block);
    }

    fn contains(&self, hash: BlockHash, cache: K) -> bool {
        let block = (hash, cache);
        self.recent.contains(&block) || self.older.contains(&block)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.recent.len() + self.older.len()
    }
}

impl PromptBlocks {
    /// Number of tokens in all blocks together.
    pub(crate) fn tokens(&self) -> u64 {
        self.0.last().map_or(0, |block| block.tokens)
    }
}

impl<'a> BlockHasher<'a> {
    /// Starts a prompt. Prompts with different seeds share no blocks.
    pub(crate) fn new(key: &'a RandomState, seed: &impl Hash) -> Self {
        Self {
            key,
            last: key.hash_one(seed),
            tokens: 0,
            blocks: Vec::new(),
        }
    }

    /// Adds the next block, with its number of tokens.
    pub(crate) fn push(&mut self, content: &impl Hash, tokens: u64) {
        if self.blocks.len() == MAX_PROMPT_BLOCKS {
            return;
        }
        self.last = self.key.hash_one((self.last, content));
        self.tokens += tokens;
        self.blocks.push(Block {
            hash: self.last,
            tokens: self.tokens,
        });
    }

    /// Returns the hashes of all blocks.
    pub(crate) fn finish(self) -> PromptBlocks {
        PromptBlocks(self.blocks)
    }
}
