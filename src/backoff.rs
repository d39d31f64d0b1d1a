//! Exponential back-off with jitter, for the delays between repeated attempts.
//!
//! Jitter spreads the attempts of clients that failed at the same moment, for example all workers of an engine that
//! went down. It only shortens delays, so the maximum of a policy really is the longest delay.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Parameters of a back-off: first delay, maximum and jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BackoffPolicy {
    /// Delay after the first failure. Each further failure in a row doubles the delay.
    pub(crate) first: Duration,
    /// Maximum delay.
    pub(crate) max: Duration,
    /// Maximum fraction of a delay that jitter removes, from 0 (no jitter) to 1.
    pub(crate) jitter: f64,
}

impl BackoffPolicy {
    /// Returns the delay after this many failures in a row, without jitter. It is zero before the first failure.
    pub(crate) fn delay(&self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else {
            return Duration::ZERO;
        };
        let factor = 2_u32.saturating_pow(doublings);
        self.first.saturating_mul(factor).min(self.max)
    }
}

/// A back-off in progress. It counts failures, and draws the jitter of each delay.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: BackoffPolicy,
    failures: u32,
    random: SmallRng,
}

impl Backoff {
    /// Creates a back-off with no failure yet.
    pub(crate) fn new(policy: BackoffPolicy) -> Self {
        Self::seeded(policy, rand::random())
    }

    /// Creates a back-off whose jitter is determined by the seed.
    pub(crate) fn seeded(policy: BackoffPolicy, seed: u64) -> Self {
        Self {
            policy,
            failures: 0,
            random: SmallRng::seed_from_u64(seed),
        }
    }

    /// Records a failure, and returns the delay before the next attempt.
    pub(crate) fn next_delay(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let jitter = self.policy.jitter * self.random.random::<f64>();
        self.policy.delay(self.failures).mul_f64(1.0 - jitter)
    }

    /// Resets the number of failures to zero, after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: BackoffPolicy = BackoffPolicy {
        first: Duration::from_millis(100),
        max: Duration::from_secs(10),
        jitter: 0.5,
    };

    #[test]
    fn each_failure_doubles_the_delay_up_to_the_maximum() {
        let milliseconds = |failures| POLICY.delay(failures).as_millis();
        let delays: Vec<_> = (0..10).map(milliseconds).collect();
        let doubled = [0, 100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000];
        assert_eq!(delays, doubled);
        assert_eq!(POLICY.delay(u32::MAX), POLICY.max);
    }

    #[test]
    fn jitter_shortens_a_delay_by_at_most_its_fraction() {
        let mut backoff = Backoff::seeded(POLICY, 1);
        let delays: Vec<_> = (0..1_000).map(|_| backoff.next_delay()).skip(7).collect();
        let (shortest, longest) = (delays.iter().min(), delays.iter().max());
        let (shortest, longest) = (shortest.unwrap(), longest.unwrap());
        let half = POLICY.max / 2;
        assert!((half..half * 11 / 10).contains(shortest), "{shortest:?}");
        assert!(
            (half * 19 / 10..=POLICY.max).contains(longest),
            "{longest:?}"
        );
    }

    #[test]
    fn two_back_offs_differ_unless_they_have_the_same_seed() {
        let first = |seed| Backoff::seeded(POLICY, seed).next_delay();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        assert_ne!(
            Backoff::new(POLICY).next_delay(),
            Backoff::new(POLICY).next_delay()
        );
    }

    #[test]
    fn a_success_resets_the_delay() {
        let policy = BackoffPolicy {
            jitter: 0.0,
            ..POLICY
        };
        let mut backoff = Backoff::new(policy);
        assert_eq!(backoff.next_delay(), POLICY.first);
        assert_eq!(backoff.next_delay(), POLICY.first * 2);
        backoff.reset();
        assert_eq!(backoff.next_delay(), POLICY.first);
    }
}
