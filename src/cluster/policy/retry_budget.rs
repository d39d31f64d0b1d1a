//! Limits retries to a share of the recent requests, so that the retries of an outage do not multiply its load.

use tokio::time::Instant;

use super::recent_count::RecentCount;

/// Retries that are allowed within ten seconds even without requests.
const FLOOR: u32 = 10;
/// One retry is allowed for this many requests.
const REQUESTS_PER_RETRY: u32 = 5;

/// The retry budget of a gateway.
///
/// Only a retry on a target that has failed the same request takes from the budget. The first try on another target only
/// moves the work, and an engine that could not be reached has done no work. The resumption of a stream also takes
/// nothing, and counts as a request.
#[derive(Debug)]
pub(in crate::cluster) struct RetryBudget {
    requests: RecentCount,
    retries: RecentCount,
}

impl RetryBudget {
    pub(in crate::cluster) fn new(now: Instant) -> Self {
        Self {
            requests: RecentCount::new(now),
            retries: RecentCount::new(now),
        }
    }

    /// Counts a request of a client, or the resumption of a stream.
    pub(in crate::cluster) fn add_request(&mut self, now: Instant) {
        self.requests.add(now);
    }

    /// Takes a retry from the budget. Returns false if the budget is used up.
    pub(in crate::cluster) fn take_retry(&mut self, now: Instant) -> bool {
        let allowed = FLOOR + self.requests.get(now) / REQUESTS_PER_RETRY;
        let is_allowed = self.retries.get(now) < allowed;
        if is_allowed {
            self.retries.add(now);
        }
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_fifth_of_the_recent_requests_and_ten_more_may_be_retried() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        for _ in 0..100 {
            budget.add_request(now);
        }
        let granted = (0..100).filter(|_| budget.take_retry(now)).count();
        assert_eq!(granted, 30);
        let later = now + Duration::from_secs(11);
        let granted = (0..100).filter(|_| budget.take_retry(later)).count();
        assert_eq!(granted, 10, "the window has passed");
    }
}
