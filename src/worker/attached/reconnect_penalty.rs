//! Workers that broke the contract, by the names that they give themselves. Each has to wait before it may dial in
//! again: one that is new has nothing to do, so it would be given the next requests at once, and lose them, too.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a worker waits after it broke the contract once; doubled each time, up to the last.
const WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A worker that has broken nothing for so long is one like any other.
const FORGIVEN: Duration = Duration::from_secs(600);

/// How many names are kept.
const NAMES: usize = 1_024;

/// Who has broken the contract.
#[derive(Default)]
pub(super) struct ReconnectPenalties(Mutex<HashMap<String, Penalty>>);

#[derive(Clone, Copy)]
struct Penalty {
    at: Instant,
    wait: Duration,
}

impl ReconnectPenalties {
    /// How long the worker of this name has still to wait.
    pub(super) fn wait_of(&self, name: &str) -> Option<Duration> {
        let offences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let offence = offences.get(name)?;
        let left = offence.wait.checked_sub(offence.at.elapsed())?;
        Some(left).filter(|left| !left.is_zero())
    }

    /// The worker of this name has broken the contract.
    pub(super) fn add(&self, name: String) {
        let mut offences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        offences.retain(|_, offence| offence.at.elapsed() < FORGIVEN);
        let before = offences.get(&name).copied();
        if before.is_none() && offences.len() >= NAMES {
            return;
        }
        let wait = before.map_or(WAIT, |offence| (offence.wait * 2).min(LONGEST_WAIT));
        let at = Instant::now();
        offences.insert(name, Penalty { at, wait });
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_violation_doubles_the_penalty_until_it_is_forgotten() {
        let offenders = ReconnectPenalties::default();
        assert_eq!(offenders.wait_of("a"), None);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            offenders.add("a".to_owned());
            let wait = Duration::from_secs(seconds);
            assert_eq!(offenders.wait_of("a"), Some(wait));
            assert_eq!(offenders.wait_of("b"), None);
            advance(wait).await;
            assert_eq!(offenders.wait_of("a"), None);
        }
        advance(FORGIVEN).await;
        offenders.add("a".to_owned());
        assert_eq!(offenders.wait_of("a"), Some(WAIT));
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_max_names_are_remembered() {
        let offenders = ReconnectPenalties::default();
        for name in 0..=NAMES {
            offenders.add(name.to_string());
        }
        assert_eq!(offenders.wait_of("0"), Some(WAIT));
        assert_eq!(offenders.wait_of(&NAMES.to_string()), None);
    }
}
