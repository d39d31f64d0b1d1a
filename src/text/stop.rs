//! Incremental matching of stop strings. A token that may be part of a match is held back until the match is decided,
//! so that the client never receives part of a stop string.
//!
//! Each stop string is matched with the Knuth-Morris-Pratt algorithm (1977). Its state is the length of the longest
//! prefix of the stop string that the text ends with. The amortized cost of a byte is constant.

use std::collections::VecDeque;
use std::sync::Arc;

/// The stop strings of a request, prepared for matching.
#[derive(Debug, Default)]
pub struct StopStrings {
    strings: Vec<StopString>,
    /// True if the text ends after a match instead of before it.
    include_match: bool,
}

#[derive(Debug)]
struct StopString {
    bytes: Vec<u8>,
    /// The KMP failure function. For the prefix that ends at each byte: the length of the longest shorter prefix that
    /// is also its suffix.
    failure: Vec<usize>,
}

/// Matches the text of one choice against its stop strings. Each token `T` is released, with its text, as soon as it
/// can no longer be part of a match.
#[derive(Debug)]
pub struct StopMatcher<T> {
    stops: Arc<StopStrings>,
    /// State of each stop string: the length of its longest prefix that the text ends with.
    matched: Vec<usize>,
    /// The tokens that may be part of a match, in order. Each has the end of its text as an offset in `tail`.
    held: VecDeque<(T, usize)>,
    /// The text of the held tokens.
    tail: String,
}

/// The result of matching a token.
#[derive(Debug, PartialEq, Eq)]
pub enum StopStatus {
    /// No stop string has matched.
    Open,
    /// A stop string has matched. Any further token is not part of the completion.
    Matched,
}

impl StopStrings {
    /// Prepares stop strings for matching. None may be empty. The text will end before a match.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self {
            strings: stops.iter().map(|stop| StopString::new(stop)).collect(),
            include_match: false,
        }
    }

    /// If `include_match` is true, ends the text after a match instead of before it.
    #[must_use]
    pub(crate) fn with_included_match(self, include_match: bool) -> Self {
        Self {
            include_match,
            ..self
        }
    }
}

impl StopString {
    fn new(stop: &str) -> Self {
        let mut string = Self {
            bytes: stop.into(),
            failure: vec![0],
        };
        for at in 1..stop.len() {
            let prefix = string.advance(string.failure[at - 1], string.bytes[at]);
            string.failure.push(prefix);
        }
        string
    }

    /// KMP step: returns the length of the longest prefix that still matches after `byte`. `matched`, the length before
    /// `byte`, must be shorter than the string.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        while matched > 0 && self.bytes[matched] != byte {
            matched = self.failure[matched - 1];
        }
        matched + usize::from(self.bytes[matched] == byte)
    }

    /// Advances `matched` over `text`. Returns the offset in `text` after the first match.
    fn find_end(&self, matched: &mut usize, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            *matched = self.advance(*matched, byte);
            if *matched == self.bytes.len() {
                return Some(at + 1);
            }
        }
        None
    }
}

impl<T> StopMatcher<T> {
    /// Creates a matcher for `stops`.
    #[must_use]
    pub fn new(stops: Arc<StopStrings>) -> Self {
        Self {
            matched: vec![0; stops.strings.len()],
            stops,
            held: VecDeque::new(),
            tail: String::new(),
        }
    }

    /// Returns true if there are no stop strings.
    pub(super) fn has_no_stop_strings(&self) -> bool {
        self.matched.is_empty()
    }

    /// Matches the next token. Passes to `release` every token that can no longer be part of a match.
    ///
    /// If a stop string matches, releases the tokens before the match (or before its end if matches are included),
    /// and cuts the text of the last one there. Of several matches, the match that ends first counts; of matches with
    /// the same end, the one that starts first. So the text does not depend on its division into tokens.
    pub fn push(&mut self, token: T, text: &str, mut release: impl FnMut(T, &str)) -> StopStatus {
        if self.has_no_stop_strings() {
            release(token, text);
            return StopStatus::Open;
        }
        let text_start = self.tail.len();
        self.tail.push_str(text);
        self.held.push_back((token, self.tail.len()));
        let stops = self.stops.strings.iter().zip(&mut self.matched);
        let matches = stops.filter_map(|(stop, matched)| {
            let end = text_start + stop.find_end(matched, text)?;
            Some((end - stop.bytes.len(), end))
        });
        if let Some((start, end)) = matches.min_by_key(|(start, end)| (*end, *start)) {
            let cut = if self.stops.include_match { end } else { start };
            self.tail.truncate(cut);
            self.release_up_to_cut(cut, release);
            self.matched.fill(0);
            return StopStatus::Matched;
        }
        let longest_prefix = self.matched.iter().max().copied().unwrap_or(0);
        self.release_ended_by(self.tail.len() - longest_prefix, release);
        StopStatus::Open
    }

    /// Releases all held tokens at the end of the choice.
    pub fn finish(&mut self, release: impl FnMut(T, &str)) {
        self.release_ended_by(self.tail.len(), release);
        self.matched.fill(0);
    }

    /// Releases the tokens whose text ends at or before the offset `end`.
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

    /// Releases the tokens that start before `cut` and drops the others. `tail` was truncated at `cut` after a match.
    fn release_up_to_cut(&mut self, cut: usize, mut release: impl FnMut(T, &str)) {
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
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Runs a matcher over `tokens`. Returns the tokens released at each step (the last step is the end), and whether
    /// a stop string matched.
    fn run(stops: &[&str], tokens: &[&str]) -> (Vec<Vec<(usize, String)>>, bool) {
        let stops: Vec<_> = stops.iter().map(ToString::to_string).collect();
        let mut matcher = StopMatcher::new(Arc::new(StopStrings::new(&stops)));
        let mut steps = Vec::new();
        for (index, text) in tokens.iter().enumerate() {
            let mut released = Vec::new();
            let status = matcher.push(index, text, |token, text| {
                released.push((token, text.to_owned()));
            });
            steps.push(released);
            if status == StopStatus::Matched {
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
                    let may_start =
                        |from: &usize| stops.iter().any(|stop| stop.starts_with(&so_far[*from..]));
                    let expected = found
                        .or_else(|| (0..=at).find(may_start))
                        .unwrap_or(so_far.len());
                    assert_eq!(shown, so_far[..expected], "{stops:?} in {so_far}");
                }
                let is_present = stops.iter().any(|stop| text.contains(stop));
                assert_eq!(matched, is_present, "{stops:?} in {text}");
            }
        }
    }

    #[test]
    fn an_included_match_is_the_end_of_the_text() {
        let stops = StopStrings::new(&["STOP".to_owned()]).with_included_match(true);
        let mut matcher = StopMatcher::new(Arc::new(stops));
        let mut shown = String::new();
        for text in ["a S", "T", "OP and more"] {
            let status = matcher.push((), text, |(), text| shown.push_str(text));
            assert_eq!(status == StopStatus::Matched, text.starts_with("OP"));
        }
        assert_eq!(shown, "a STOP");
    }

    proptest! {
        #[test]
        fn the_text_ends_at_the_first_match_however_it_is_divided_into_tokens(
            stops in vec("[abé]{1,4}", 1..4),
            tokens in vec("[abé]{0,4}", 0..12),
            include_match: bool,
        ) {
            let whole = tokens.concat();
            let found = stops.iter().filter_map(|stop| {
                let start = whole.find(stop)?;
                Some((start, start + stop.len()))
            });
            let expected = match found.min_by_key(|(start, end)| (*end, *start)) {
                Some((_, end)) if include_match => &whole[..end],
                Some((start, _)) => &whole[..start],
                None => &whole,
            };
            let stops = StopStrings::new(&stops).with_included_match(include_match);
            let mut matcher = StopMatcher::new(Arc::new(stops));
            let mut shown = String::new();
            let has_matched = tokens.iter().any(|token| {
                let status = matcher.push((), token, |(), text| shown.push_str(text));
                // The client gets no part of a stop string, at any time.
                assert!(expected.starts_with(&shown), "{shown} is not in {expected}");
                status == StopStatus::Matched
            });
            if !has_matched {
                matcher.finish(|(), text| shown.push_str(text));
            }
            prop_assert_eq!(shown, expected);
        }
    }
}
