//! Stop strings: a token that may begin a match is held until that is decided, so that a match never
//! leaks.
//!
//! Each string is looked for as Knuth, Morris and Pratt (1977) do it: what is known of the text so far is how
//! much of the string it ends with, so a byte costs the same however long the strings are, and however often
//! they begin.

use std::collections::VecDeque;
use std::sync::Arc;

/// The stop strings of a request, ready to be looked for.
#[derive(Debug, Default)]
pub struct StopStrings {
    strings: Vec<StopString>,
    /// Whether the text ends after a match rather than before it.
    are_shown: bool,
}

#[derive(Debug)]
struct StopString {
    bytes: Vec<u8>,
    /// For each beginning of the string, by its last byte: how much of the string it ends with, itself left
    /// out.
    borders: Vec<usize>,
}

/// Watches one choice's text for any of its stop strings. Tokens pass through as `T`s with their
/// text.
#[derive(Debug)]
pub struct StopMatcher<T> {
    stops: Arc<StopStrings>,
    /// For each stop string, how much of it the text ends with.
    begun: Vec<usize>,
    /// The tokens that may belong to a match, in order, each with where its text ends in `tail`.
    held: VecDeque<(T, usize)>,
    /// The text of the held tokens.
    tail: String,
}

/// What came of a token.
#[derive(Debug, PartialEq, Eq)]
pub enum StopStatus {
    /// No stop string has matched.
    Open,
    /// One has; what follows is not part of the completion.
    Matched,
}

impl StopStrings {
    /// These strings, none of which is empty. The text ends before a match.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self {
            strings: stops.iter().map(|stop| StopString::new(stop)).collect(),
            are_shown: false,
        }
    }

    /// Whether the text ends after a match instead.
    #[must_use]
    pub fn shown(self, are_shown: bool) -> Self {
        Self { are_shown, ..self }
    }
}

impl StopString {
    fn new(stop: &str) -> Self {
        let mut string = Self {
            bytes: stop.into(),
            borders: vec![0],
        };
        for at in 1..stop.len() {
            let border = string.advance(string.borders[at - 1], string.bytes[at]);
            string.borders.push(border);
        }
        string
    }

    /// How much of the string a text ends with that ended with so much of it, but not all, and goes on with
    /// this byte.
    fn advance(&self, mut begun: usize, byte: u8) -> usize {
        while begun > 0 && self.bytes[begun] != byte {
            begun = self.borders[begun - 1];
        }
        begun + usize::from(self.bytes[begun] == byte)
    }

    /// Takes text that ended with `begun` of the string on by more. Gives where in `more` the first match
    /// ends, if there is one.
    fn follow(&self, begun: &mut usize, more: &str) -> Option<usize> {
        for (at, byte) in more.bytes().enumerate() {
            *begun = self.advance(*begun, byte);
            if *begun == self.bytes.len() {
                return Some(at + 1);
            }
        }
        None
    }
}

impl<T> StopMatcher<T> {
    /// A matcher for these strings.
    #[must_use]
    pub fn new(stops: Arc<StopStrings>) -> Self {
        Self {
            begun: vec![0; stops.strings.len()],
            stops,
            held: VecDeque::new(),
            tail: String::new(),
        }
    }

    /// Whether there is nothing to watch for: every token is decided at once.
    pub(super) fn is_idle(&self) -> bool {
        self.begun.is_empty()
    }

    /// Takes the next token and hands to `release` each token that is decided, with its text. After a
    /// match these are the tokens that begin before it, the last cut where it begins; or where it ends,
    /// where matches are shown.
    pub fn push(&mut self, token: T, text: &str, mut release: impl FnMut(T, &str)) -> StopStatus {
        if self.is_idle() {
            release(token, text);
            return StopStatus::Open;
        }
        let looked_at = self.tail.len();
        self.tail.push_str(text);
        self.held.push_back((token, self.tail.len()));
        let stops = self.stops.strings.iter().zip(&mut self.begun);
        let matches = stops.filter_map(|(stop, begun)| {
            let end = looked_at + stop.follow(begun, text)?;
            Some((end - stop.bytes.len(), end))
        });
        if let Some((start, end)) = matches.min() {
            let cut = if self.stops.are_shown { end } else { start };
            self.tail.truncate(cut);
            self.release_begun_before(cut, release);
            self.begun.fill(0);
            return StopStatus::Matched;
        }
        let longest_begun = self.begun.iter().max().copied().unwrap_or(0);
        self.release_ended_by(self.tail.len() - longest_begun, release);
        StopStatus::Open
    }

    /// Hands out everything that is held: nothing follows that could complete a match.
    pub fn finish(&mut self, release: impl FnMut(T, &str)) {
        self.release_ended_by(self.tail.len(), release);
        self.begun.fill(0);
    }

    fn release_ended_by(&mut self, end: usize, mut release: impl FnMut(T, &str)) {
        let mut start = 0;
        while let Some((token, token_end)) = self.held.pop_front_if(|(_, at)| *at <= end) {
            release(token, &self.tail[start..token_end]);
            start = token_end;
        }
        self.tail.drain(..start);
        for (_, token_end) in &mut self.held {
            *token_end -= start;
        }
    }

    /// After a match: the tokens that begin before the cut, where `tail` ends by now.
    fn release_begun_before(&mut self, cut: usize, mut release: impl FnMut(T, &str)) {
        let mut start = 0;
        for (token, end) in self.held.drain(..) {
            if start >= cut {
                break;
            }
            release(token, &self.tail[start..end.min(cut)]);
            start = end;
        }
        self.tail.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds tokens and returns, for each, what was released by it; then what the end released.
    fn run(stops: &[&str], tokens: &[&str]) -> (Vec<Vec<(usize, String)>>, bool) {
        let stops: Vec<_> = stops.iter().map(ToString::to_string).collect();
        let mut matcher = StopMatcher::new(Arc::new(StopStrings::new(&stops)));
        let mut steps = Vec::new();
        for (index, text) in tokens.iter().enumerate() {
            let mut released = Vec::new();
            let watch = matcher.push(index, text, |token, text| {
                released.push((token, text.to_owned()));
            });
            steps.push(released);
            if watch == StopStatus::Matched {
                return (steps, true);
            }
        }
        let mut released = Vec::new();
        matcher.finish(|token, text| released.push((token, text.to_owned())));
        steps.push(released);
        (steps, false)
    }

    fn text(steps: &[Vec<(usize, String)>]) -> String {
        steps
            .iter()
            .flatten()
            .map(|(_, text)| text.as_str())
            .collect()
    }

    fn released(token: usize, text: &str) -> (usize, String) {
        (token, text.to_owned())
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        let (steps, matched) = run(&[], &["a", "b"]);
        assert_eq!(
            steps,
            [vec![released(0, "a")], vec![released(1, "b")], vec![]]
        );
        assert!(!matched);
    }

    #[test]
    fn a_token_that_may_start_a_match_is_held_until_decided() {
        let (steps, matched) = run(&["END"], &["xE", "N", "!"]);
        let all = vec![released(0, "xE"), released(1, "N"), released(2, "!")];
        assert_eq!(steps, [vec![], vec![], all, vec![]]);
        assert!(!matched);
    }

    #[test]
    fn a_match_across_tokens_is_removed_and_the_text_before_it_is_kept() {
        let (steps, matched) = run(&["END"], &["ab", "cE", "N", "Dz"]);
        assert!(matched);
        let last = vec![released(1, "c")];
        assert_eq!(steps, [vec![released(0, "ab")], vec![], vec![], last]);
    }

    #[test]
    fn the_earliest_match_wins() {
        assert_eq!(text(&run(&["two", "one"], &["zero one two"]).0), "zero ");
    }

    #[test]
    fn held_tokens_are_released_at_the_end() {
        let (steps, matched) = run(&["END"], &["a", "EN"]);
        assert_eq!(
            steps,
            [vec![released(0, "a")], vec![], vec![released(1, "EN")]]
        );
        assert!(!matched);
    }

    #[test]
    fn a_match_after_a_false_start_is_found() {
        let (steps, matched) = run(&["aab"], &["a", "a", "a", "b"]);
        assert!(matched);
        assert_eq!(text(&steps), "a");
    }

    #[test]
    fn a_stop_string_with_multibyte_characters_is_matched() {
        let (steps, matched) = run(&["é!"], &["caf", "é", "?", "é", "!"]);
        assert!(matched);
        assert_eq!(text(&steps), "café?");
    }

    #[test]
    fn an_empty_token_stays_in_order_after_a_held_one() {
        let (steps, _) = run(&["END"], &["E", "", "x"]);
        let all = vec![released(0, "E"), released(1, ""), released(2, "x")];
        assert_eq!(steps, [vec![], vec![], all, vec![]]);
    }

    #[test]
    fn matching_agrees_with_a_naive_search_for_all_short_texts() {
        let stops = ["aab", "abaab", "bb", "bab"];
        for pair in [[0, 1], [1, 2], [0, 3], [3, 1]] {
            let stops = pair.map(|at| stops[at]);
            for bits in 0..1_u32 << 10 {
                let text: String = (0..10)
                    .map(|at| if bits >> at & 1 == 0 { 'a' } else { 'b' })
                    .collect();
                let tokens: Vec<_> = text.split("").filter(|token| !token.is_empty()).collect();
                let (steps, matched) = run(&stops, &tokens);
                let mut shown = String::new();
                for (at, step) in steps.iter().take(tokens.len()).enumerate() {
                    shown.extend(step.iter().map(|(_, text)| text.as_str()));
                    let so_far = &text[..=at];
                    let found = stops.iter().filter_map(|stop| so_far.find(stop)).min();
                    let may_begin =
                        |from: &usize| stops.iter().any(|stop| stop.starts_with(&so_far[*from..]));
                    let expected = found
                        .or_else(|| (0..=at).find(may_begin))
                        .unwrap_or(so_far.len());
                    assert_eq!(shown, so_far[..expected], "{stops:?} in {so_far}");
                }
                let is_there = stops.iter().any(|stop| text.contains(stop));
                assert_eq!(matched, is_there, "{stops:?} in {text}");
            }
        }
    }

    #[test]
    fn an_included_match_is_the_end_of_the_text() {
        let stops = StopStrings::new(&["STOP".to_owned()]).shown(true);
        let mut matcher = StopMatcher::new(Arc::new(stops));
        let mut shown = String::new();
        for text in ["a S", "T", "OP and more"] {
            let watch = matcher.push((), text, |(), text| shown.push_str(text));
            assert_eq!(watch == StopStatus::Matched, text.starts_with("OP"));
        }
        assert_eq!(shown, "a STOP");
    }
}
