//! A count over the last ten seconds.

use std::time::Duration;

use tokio::time::Instant;

/// Number of buckets of the window.
const BUCKETS: usize = 10;
/// Time that one bucket covers.
const BUCKET: Duration = Duration::from_secs(1);

/// Number of events within the last ten seconds, in steps of one second.
#[derive(Debug)]
pub(super) struct RecentCount {
    buckets: [u32; BUCKETS],
    /// Bucket of the current second.
    current: usize,
    /// Start of the current second.
    since: Instant,
}

impl RecentCount {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            buckets: [0; BUCKETS],
            current: 0,
            since: now,
        }
    }

    /// Counts an event.
    pub(super) fn add(&mut self, now: Instant) {
        self.advance(now);
        let bucket = &mut self.buckets[self.current];
        *bucket = bucket.saturating_add(1);
    }

    /// Returns the number of events within the window.
    pub(super) fn get(&mut self, now: Instant) -> u32 {
        self.advance(now);
        self.buckets
            .iter()
            .fold(0, |sum, bucket| sum.saturating_add(*bucket))
    }

    /// Empties the buckets of the seconds that have passed.
    fn advance(&mut self, now: Instant) {
        for _ in 0..BUCKETS {
            if now.saturating_duration_since(self.since) < BUCKET {
                return;
            }
            self.since += BUCKET;
            self.current = (self.current + 1) % BUCKETS;
            self.buckets[self.current] = 0;
        }
        // The whole window has passed.
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_leaves_the_window_after_ten_seconds() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut count = RecentCount::new(start);
        count.add(start);
        assert_eq!(count.get(at(9_900)), 1);
        count.add(at(9_900));
        assert_eq!(count.get(at(10_100)), 1, "only the later event is left");
        assert_eq!(count.get(at(60_000)), 0);
        count.add(at(60_000));
        assert_eq!(count.get(at(60_500)), 1);
    }
}
