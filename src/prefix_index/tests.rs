//! Tests of the prefix index.

use super::*;

/// Hashes prompts of one-letter blocks, each of ten tokens.
struct Prompts(RandomState);

impl Prompts {
    fn new() -> Self {
        Self(RandomState::new())
    }

    fn of(&self, letters: &str) -> PromptBlocks {
        self.seeded("", letters)
    }

    fn seeded(&self, seed: &str, letters: &str) -> PromptBlocks {
        let mut hasher = BlockHasher::new(&self.0, &seed);
        letters.chars().for_each(|letter| hasher.push(&letter, 10));
        hasher.finish()
    }
}

#[test]
fn warm_tokens_is_the_length_of_the_longest_recorded_prefix() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(100));
    index.record(&prompts.of("abcd"), 'x');
    for (prompt, tokens) in [
        ("abcd", 40),
        ("abcdef", 40),
        ("abxy", 20),
        ("ab", 20),
        ("bcd", 0),
        ("xbcd", 0),
        ("", 0),
    ] {
        let warm = index.warm_tokens(&prompts.of(prompt), 'x');
        assert_eq!(warm, tokens, "{prompt}");
    }
    assert_eq!(index.warm_tokens(&prompts.of("abcd"), 'y'), 0);
}

#[test]
fn prompts_of_different_seeds_or_keys_have_nothing_in_common() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(100));
    index.record(&prompts.seeded("salt", "abc"), 'x');
    assert_eq!(index.warm_tokens(&prompts.seeded("salt", "abc"), 'x'), 30);
    assert_eq!(index.warm_tokens(&prompts.seeded("other", "abc"), 'x'), 0);
    let other_process = Prompts::new();
    assert_ne!(prompts.of("abc"), other_process.of("abc"));
}

#[test]
fn the_number_of_blocks_is_bounded() {
    for max_blocks in [0, 1, 2, 7, 64] {
        let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(max_blocks));
        for number in 0..500 {
            index.record(&prompts.of(&number.to_string()), number % 3);
            assert!(index.len() <= max_blocks, "{} blocks", index.len());
        }
    }
}

#[test]
fn the_least_recently_used_prompts_are_forgotten() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(40));
    let (used, unused) = (prompts.of("abcd"), prompts.of("efgh"));
    index.record(&used, 'x');
    index.record(&unused, 'x');
    for number in 0..100 {
        assert_eq!(index.warm_tokens(&used, 'x'), 40, "after {number} others");
        index.record(&used, 'x');
        index.record(&prompts.seeded("other", &number.to_string()), 'x');
    }
    assert_eq!(index.warm_tokens(&unused, 'x'), 0);
}

#[test]
fn a_prompt_is_remembered_until_half_as_many_other_blocks_as_fit_were_used() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(40));
    let prompt = prompts.of("abcdefgh");
    index.record(&prompt, 'x');
    for letter in "012345678901".chars() {
        index.record(&prompts.seeded("other", &letter.to_string()), letter);
    }
    assert_eq!(index.warm_tokens(&prompt, 'x'), 80);
}

#[test]
fn a_prompt_is_forgotten_from_its_end() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(8));
    let prompt = prompts.of("abcdef");
    index.record(&prompt, 'x');
    let mut last = 60;
    for number in 0..20 {
        let tokens = index.warm_tokens(&prompt, 'x');
        assert!(tokens <= last, "{tokens} after {last}");
        let known = prompt.0.iter().filter(|it| index.contains(it.hash, 'x'));
        assert_eq!(known.count() * 10, usize::try_from(tokens).unwrap());
        last = tokens;
        index.record(&prompts.seeded("other", "a"), char::from(b'a' + number));
    }
    assert_eq!(last, 0);
}

#[test]
fn only_the_first_blocks_of_a_very_long_prompt_are_kept() {
    let (prompts, mut index) = (Prompts::new(), PrefixIndex::new(10_000));
    let prompt = prompts.of(&"a".repeat(MAX_PROMPT_BLOCKS + 1));
    index.record(&prompt, 'x');
    assert_eq!(index.len(), MAX_PROMPT_BLOCKS);
}
