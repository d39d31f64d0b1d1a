//! The times between the tokens of one request.
//!
//! They are counted in plain integers that belong to the request, and added to the shared metrics when the request
//! ends. A token therefore costs a search among a few bounds and two additions, without atomic operations.

use super::histogram::{Buckets, TOKEN_GAP_BOUNDS};

/// The times between the tokens of one request, by choice.
pub(crate) struct InterTokenTimes {
    buckets: Buckets,
    first_ns: Option<u64>,
    tokens: u64,
    /// Time of the latest token of each choice; 0 if the choice has no token yet.
    latest_ns: Vec<u64>,
}

impl Default for InterTokenTimes {
    fn default() -> Self {
        Self {
            buckets: Buckets::new(&TOKEN_GAP_BOUNDS),
            first_ns: None,
            tokens: 0,
            latest_ns: Vec::new(),
        }
    }
}

impl InterTokenTimes {
    /// Records that `count` tokens of a choice were written together at `now_ns`. The time since the choice's
    /// previous token is divided equally among them.
    pub(crate) fn record(&mut self, choice: u32, count: u64, now_ns: u64) {
        if count == 0 {
            return;
        }
        let choice = usize::try_from(choice).unwrap_or(usize::MAX);
        if choice >= self.latest_ns.len() {
            // The list stays small: a request has at most 128 prompts with 128 choices each.
            self.latest_ns.resize(choice.saturating_add(1), 0);
        }
        self.tokens += count;
        let latest_ns = std::mem::replace(&mut self.latest_ns[choice], now_ns);
        if latest_ns == 0 {
            self.first_ns.get_or_insert(now_ns);
            // The other tokens of the first batch follow the first token without a gap.
            self.buckets.add(0, count - 1);
        } else {
            let gap_ns = now_ns.saturating_sub(latest_ns) / count;
            self.buckets.add(gap_ns, count);
        }
    }

    /// Number of tokens.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Time at which the first token was written.
    pub(super) fn first_ns(&self) -> Option<u64> {
        self.first_ns
    }

    pub(super) fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// Moves the counts of `other` into this one. `other` keeps the times of its latest tokens and continues to
    /// count.
    pub(super) fn take_from(&mut self, other: &mut Self) {
        self.buckets.merge(&other.buckets);
        other.buckets.clear();
        self.tokens += std::mem::take(&mut other.tokens);
        self.first_ns = self.first_ns.or(other.first_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn tokens_written_together_share_the_time_since_the_previous_token() {
        let mut gaps = InterTokenTimes::default();
        gaps.record(0, 1, 10 * MS);
        gaps.record(0, 4, 18 * MS);
        assert_eq!(gaps.first_ns(), Some(10 * MS));
        assert_eq!(gaps.tokens(), 5);
        assert_eq!(gaps.buckets().count(), 4, "the first token has no gap");
        assert_eq!(gaps.buckets().sum_ns(), 8 * MS);
    }

    #[test]
    fn the_gaps_of_a_choice_do_not_depend_on_the_other_choices() {
        let mut gaps = InterTokenTimes::default();
        for (choice, now_ns) in [(0, 10), (1, 11), (0, 30), (1, 31)] {
            gaps.record(choice, 1, now_ns * MS);
        }
        assert_eq!(gaps.buckets().count(), 2);
        assert_eq!(gaps.buckets().sum_ns(), 40 * MS);
    }
}
