//! Reconnect penalties: after a protocol violation, a worker must wait before it may reconnect. Otherwise it would
//! reconnect at once and, as the least loaded worker, get the next requests and lose them too.
//!
//! A penalty applies to the name that the worker gives itself.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::BackoffPolicy;

/// Penalties for repeated violations. They have no jitter, because `worker.proto` promises them to workers.
const PENALTY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_secs(1),
    max: Duration::from_secs(60),
    jitter: 0.0,
};

/// A worker name without violations for this long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Maximum number of worker names to remember.
const MAX_NAMES: usize = 1_024;

/// The penalties by worker name.
#[derive(Default)]
pub(super) struct ReconnectPenalties(Mutex<HashMap<String, Penalty>>);

#[derive(Clone, Copy)]
struct Penalty {
    /// Time of the latest violation.
    since: Instant,
    /// Number of violations so far.
    violations: u32,
}

impl ReconnectPenalties {
    /// Returns the remaining penalty of a worker name, if it has one.
    pub(super) fn remaining(&self, name: &str) -> Option<Duration> {
        let penalties = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let penalty = penalties.get(name)?;
        let left = PENALTY
            .delay(penalty.violations)
            .checked_sub(penalty.since.elapsed())?;
        Some(left).filter(|left| !left.is_zero())
    }

    /// Records a violation by the worker with this name. A new name is not recorded once `MAX_NAMES` are remembered.
    pub(super) fn record_violation(&self, name: String) {
        let mut penalties = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        penalties.retain(|_, penalty| penalty.since.elapsed() < FORGET_AFTER);
        if penalties.len() >= MAX_NAMES && !penalties.contains_key(&name) {
            return;
        }
        let since = Instant::now();
        let new = Penalty {
            since,
            violations: 0,
        };
        let penalty = penalties.entry(name).or_insert(new);
        penalty.since = since;
        penalty.violations = penalty.violations.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_violation_doubles_the_penalty_until_it_is_forgotten() {
        let penalties = ReconnectPenalties::default();
        assert_eq!(penalties.remaining("a"), None);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            penalties.record_violation("a".to_owned());
            let wait = Duration::from_secs(seconds);
            assert_eq!(penalties.remaining("a"), Some(wait));
            assert_eq!(penalties.remaining("b"), None);
            advance(wait).await;
            assert_eq!(penalties.remaining("a"), None);
        }
        advance(FORGET_AFTER).await;
        penalties.record_violation("a".to_owned());
        assert_eq!(penalties.remaining("a"), Some(PENALTY.first));
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_max_names_are_remembered() {
        let penalties = ReconnectPenalties::default();
        for name in 0..=MAX_NAMES {
            penalties.record_violation(name.to_string());
        }
        assert_eq!(penalties.remaining("0"), Some(PENALTY.first));
        assert_eq!(penalties.remaining(&MAX_NAMES.to_string()), None);
    }
}
