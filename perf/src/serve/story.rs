//! The text of a scripted engine. It is a function of the prompt's first line, so that every engine tells the same
//! story, and so that a prompt with the first part of the story is continued with exactly the rest.

use std::fmt::Write;

/// Id of the first token. The ids of a story's tokens are consecutive.
const FIRST_ID: u32 = 1_000;
/// Ends of tokens: white space, and characters of several bytes or with an escape in JSON. None has a digit.
const WORDS: [&str; 8] = [
    " ",
    "\n",
    " \u{e9}t\u{e9}",
    " \"so\"",
    "\u{65e5}\u{672c}",
    "\\",
    " \u{1f600}",
    " and",
];

/// A story, whose tokens are its indices with a word after each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Story {
    number: u32,
    /// Number that makes this telling of the story different from all others.
    salt: Option<u64>,
}

impl Story {
    /// Returns the story of a prompt with this first line.
    pub(crate) fn of_line(line: &str) -> Self {
        let hash = |hash: u32, byte: u8| hash.wrapping_mul(31).wrapping_add(byte.into());
        Self::of_number(line.bytes().fold(0, hash))
    }

    /// Returns the story of a prompt that starts with this token id.
    pub(crate) fn of_number(number: u32) -> Self {
        Self { number, salt: None }
    }

    pub(super) fn salted(self, salt: Option<u64>) -> Self {
        Self { salt, ..self }
    }

    pub(super) fn token_id(index: u32) -> u32 {
        FIRST_ID.wrapping_add(index)
    }

    pub(crate) fn token(self, index: u32) -> String {
        let word = self.number.wrapping_add(index.wrapping_mul(index)) >> 1;
        let word = WORDS[usize::try_from(word % 8).unwrap_or(0)];
        let mut token = format!("{index}{word}");
        if let Some(salt) = self.salt {
            let _ = write!(token, "~{salt}");
        }
        token
    }

    /// Returns the first tokens as one text.
    pub(crate) fn text(self, tokens: u32) -> String {
        (0..tokens).map(|index| self.token(index)).collect()
    }

    /// Returns the index of the token after this part of the story, and the number of that token's bytes that the part
    /// already has. `None` if the story does not start with the part.
    pub(super) fn position(self, part: &str) -> Option<(u32, usize)> {
        let mut rest = part;
        let mut index = 0;
        loop {
            let token = self.token(index);
            match rest.strip_prefix(&*token) {
                Some(after) => rest = after,
                None => return token.starts_with(rest).then_some((index, rest.len())),
            }
            index += 1;
        }
    }

    /// Returns the index of the token after these token ids of the story. `None` if they are not its first ids.
    pub(super) fn position_of_ids(ids: &[u32]) -> Option<(u32, usize)> {
        let is_first = (0..).zip(ids).all(|(at, id)| *id == Self::token_id(at));
        Some((u32::try_from(ids.len()).ok()?, 0)).filter(|_| is_first)
    }
}

/// Tokens of a story that a client did not get exactly once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoryFaults {
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    /// 1 if each token arrived once, but the text differs nevertheless.
    pub(crate) wrong: u64,
}

impl StoryFaults {
    pub(crate) fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.repeated += other.repeated;
        self.wrong += other.wrong;
    }

    /// Compares a received text with the expected one, byte by byte.
    pub(crate) fn find(received: &str, expected: &str) -> Self {
        let (mut got, due) = (indices(received), indices(expected));
        let count = got.len();
        got.sort_unstable();
        got.dedup();
        let lost = due.iter().filter(|it| got.binary_search(it).is_err());
        let (lost, repeated) = (lost.count(), count - got.len());
        let is_wrong = received != expected && lost + repeated == 0;
        let [lost, repeated] = [lost, repeated].map(|it| u64::try_from(it).unwrap_or(u64::MAX));
        Self {
            lost,
            repeated,
            wrong: is_wrong.into(),
        }
    }
}

/// Returns the index of each token in a text.
fn indices(text: &str) -> Vec<u32> {
    let numbers = text.split(|c: char| !c.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_goes_on_after_any_part_of_it() {
        let story = Story::of_line("Once");
        let text = story.text(40);
        for (at, _) in text.char_indices() {
            let (index, offset) = story.position(&text[..at]).unwrap();
            assert_eq!(text[..at].len(), story.text(index).len() + offset);
        }
        assert_eq!(story.position("0?"), None);
        assert_eq!(Story::position_of_ids(&[1_000, 1_001]), Some((2, 0)));
        assert_eq!(Story::position_of_ids(&[1_001]), None);
    }

    #[test]
    fn lost_repeated_and_wrong_tokens_are_told_apart() {
        let found = |text: &str| {
            let StoryFaults {
                lost,
                repeated,
                wrong,
            } = StoryFaults::find(text, "0 1 2 ");
            [lost, repeated, wrong]
        };
        assert_eq!(found("0 1 2 "), [0, 0, 0]);
        assert_eq!(found("0 2 "), [1, 0, 0]);
        assert_eq!(found("0 1 1 2 "), [0, 1, 0]);
        assert_eq!(found("0 1 2"), [0, 0, 1]);
    }
}
