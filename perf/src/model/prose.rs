//! Texts of prompts: sentences of random common words. The same seed gives the same texts, so all servers get the same
//! prompts.
//!
//! The first 64 texts of a seed begin with different words, so that no server reuses a computed prompt by accident.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};

/// Words that are one token in most vocabularies.
const WORDS: [&str; 64] = [
    "river", "stone", "winter", "garden", "letter", "window", "market", "island", "summer",
    "bridge", "forest", "music", "paper", "silver", "engine", "village", "doctor", "captain",
    "teacher", "farmer", "mother", "brother", "soldier", "king", "old", "young", "small", "great",
    "quiet", "bright", "dark", "green", "open", "early", "strong", "simple", "found", "carried",
    "opened", "followed", "crossed", "reached", "built", "watched", "heard", "wrote", "turned",
    "kept", "under", "behind", "before", "after", "across", "between", "without", "around", "the",
    "a", "every", "another", "their", "this", "that", "some",
];
/// Number of words in a sentence.
const SENTENCE_WORDS: usize = 12;

/// Generator of the texts of one scenario in one round.
pub(crate) struct Prose {
    random: StdRng,
    /// Words with which no text has begun yet.
    openings: Vec<&'static str>,
}

impl Prose {
    pub(crate) fn from_seed(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut openings = WORDS.to_vec();
        openings.shuffle(&mut random);
        Self { random, openings }
    }

    /// Returns a text of this many words.
    pub(crate) fn text(&mut self, words: usize) -> String {
        let mut text = String::new();
        for at in 0..words {
            let word = match at {
                0 => self.openings.pop(),
                _ => None,
            };
            let word = word.or_else(|| WORDS.choose(&mut self.random).copied());
            let word = word.unwrap_or_default();
            match (at, at % SENTENCE_WORDS) {
                (0, _) => text.push_str(word),
                (_, 0) => {
                    text.push_str(". ");
                    text.push_str(word);
                }
                _ => {
                    text.push(' ');
                    text.push_str(word);
                }
            }
        }
        text.push('.');
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn texts_begin_with_different_words_and_have_the_wanted_length() {
        let mut prose = Prose::from_seed(1);
        let texts: Vec<_> = WORDS.iter().map(|_| prose.text(30)).collect();
        let first = |text: &String| text.split(' ').next().map(str::to_owned);
        assert_eq!(
            texts.iter().map(first).collect::<BTreeSet<_>>().len(),
            WORDS.len()
        );
        assert!(texts.iter().all(|text| text.split(' ').count() == 30));
        assert!(texts.iter().all(|text| text.matches('.').count() == 3));
    }

    #[test]
    fn the_same_seed_draws_the_same_texts() {
        let draw = |seed| Prose::from_seed(seed).text(100);
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
