//! Stop strings: a token that may begin a match is held until that is decided, so that a match never
//! leaks.

use std::collections::VecDeque;

/// Watches one choice's text for any of its stop strings. Tokens pass through as `T`s with their
/// text.
#[derive(Debug)]
pub struct StopMatcher<T> {
    stops: Vec<String>,
    /// The tokens that may belong to a match, in order, each with where its text ends in `tail`.
    held: VecDeque<(T, usize)>,
    /// The text of the held tokens.
    tail: String,
}

/// What came of a token.
#[derive(Debug, PartialEq, Eq)]
pub enum Watch {
    /// No stop string has matched.
    Open,
    /// One has; what follows is not part of the completion.
    Matched,
}

impl<T> StopMatcher<T> {
    /// A matcher for these strings, none of which is empty.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: VecDeque::new(),
            tail: String::new(),
        }
    }

    /// Whether there is nothing to watch for: every token is decided at once.
    pub(super) fn is_idle(&self) -> bool {
        self.stops.is_empty()
    }

    /// Takes the next token and hands to `release` each token that is decided, with its text. After a
    /// match these are the tokens that begin before it, the last cut where it begins.
    pub fn push(&mut self, token: T, text: &str, mut release: impl FnMut(T, &str)) -> Watch {
        if self.stops.is_empty() {
            release(token, text);
            return Watch::Open;
        }
        self.tail.push_str(text);
        self.held.push_back((token, self.tail.len()));
        let first_match = self
            .stops
            .iter()
            // Setting a search up costs as much as the stop string is long, also where it cannot fit.
            .filter(|stop| stop.len() <= self.tail.len())
            .filter_map(|stop| self.tail.find(stop.as_str()))
            .min();
        if let Some(start) = first_match {
            self.tail.truncate(start);
            self.release_begun_before(start, release);
            return Watch::Matched;
        }
        let held_from = self.possible_match_start();
        self.release_ended_by(held_from, release);
        Watch::Open
    }

    /// Hands out everything that is held: nothing follows that could complete a match.
    pub fn finish(&mut self, release: impl FnMut(T, &str)) {
        self.release_ended_by(self.tail.len(), release);
    }

    /// Where the earliest beginning of a stop string stands that reaches the end of the tail.
    fn possible_match_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.tail.len().saturating_sub(longest.saturating_sub(1));
        let starts = (from..self.tail.len()).filter(|at| self.tail.is_char_boundary(*at));
        let mut begun = starts.filter(|at| {
            self.stops
                .iter()
                .any(|stop| stop.starts_with(&self.tail[*at..]))
        });
        begun.next().unwrap_or(self.tail.len())
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

    /// After a match: the tokens that begin before it. `tail` is cut where it begins.
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
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut steps = Vec::new();
        for (index, text) in tokens.iter().enumerate() {
            let mut released = Vec::new();
            let watch = matcher.push(index, text, |token, text| {
                released.push((token, text.to_owned()));
            });
            steps.push(released);
            if watch == Watch::Matched {
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
    fn a_token_that_may_begin_a_match_is_held_whole_until_that_is_decided() {
        let (steps, matched) = run(&["END"], &["xE", "N", "!"]);
        let all = vec![released(0, "xE"), released(1, "N"), released(2, "!")];
        assert_eq!(steps, [vec![], vec![], all, vec![]]);
        assert!(!matched);
    }

    #[test]
    fn a_match_across_tokens_never_leaks_and_what_stands_before_it_is_kept() {
        let (steps, matched) = run(&["END"], &["ab", "cE", "N", "Dz"]);
        assert!(matched);
        let last = vec![released(1, "c")];
        assert_eq!(steps, [vec![released(0, "ab")], vec![], vec![], last]);
    }

    #[test]
    fn the_earliest_match_counts() {
        assert_eq!(text(&run(&["two", "one"], &["zero one two"]).0), "zero ");
    }

    #[test]
    fn what_is_held_at_the_end_is_released() {
        let (steps, matched) = run(&["END"], &["a", "EN"]);
        assert_eq!(
            steps,
            [vec![released(0, "a")], vec![], vec![released(1, "EN")]]
        );
        assert!(!matched);
    }

    #[test]
    fn a_false_start_within_a_repeating_stop_string_is_found() {
        let (steps, matched) = run(&["aab"], &["a", "a", "a", "b"]);
        assert!(matched);
        assert_eq!(text(&steps), "a");
    }

    #[test]
    fn a_stop_string_of_several_bytes_a_character_is_matched_at_characters() {
        let (steps, matched) = run(&["é!"], &["caf", "é", "?", "é", "!"]);
        assert!(matched);
        assert_eq!(text(&steps), "café?");
    }

    #[test]
    fn an_empty_token_keeps_its_place_behind_a_held_one() {
        let (steps, _) = run(&["END"], &["E", "", "x"]);
        let all = vec![released(0, "E"), released(1, ""), released(2, "x")];
        assert_eq!(steps, [vec![], vec![], all, vec![]]);
    }
}
