//! The time for which the server waits for a peer to send a request body or to take a response.
//!
//! Each wait lasts at most for a timeout. All waits together last at most for this timeout plus the time that the
//! transferred bytes take at a minimum rate, like `MinRate` of Apache's mod_reqtimeout. So a peer that transfers a byte
//! now and then cannot hold its request forever.

use std::time::Duration;

use tokio::time::Instant;

/// Limits of the waits for one peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitLimits {
    /// Maximum time of one wait, and of all waits before the first byte.
    pub(super) timeout: Duration,
    /// Minimum average rate; `None` for a peer that may be slow.
    pub(super) bytes_per_second: Option<u32>,
}

/// The waits for one peer so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitBudget {
    limits: WaitLimits,
    /// Total time of the waits that have ended.
    waited: Duration,
    /// Number of bytes transferred so far.
    bytes: u64,
    /// Start of the current wait.
    since: Option<Instant>,
}

impl WaitBudget {
    pub(super) fn new(limits: WaitLimits) -> Self {
        Self {
            limits,
            waited: Duration::ZERO,
            bytes: 0,
            since: None,
        }
    }

    /// Starts a wait, unless one has started.
    pub(super) fn start_waiting(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Ends the current wait, if there is one.
    pub(super) fn stop_waiting(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.waited += now.saturating_duration_since(since);
        }
    }

    /// Counts bytes that were transferred.
    pub(super) fn add_bytes(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Returns the time at which the current wait becomes too long; `None` if the server does not wait.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let WaitLimits {
            timeout,
            bytes_per_second,
        } = self.limits;
        let in_all = bytes_per_second.map_or(timeout, |rate| {
            let micros = self.bytes.saturating_mul(1_000_000) / u64::from(rate.max(1));
            let total = timeout.saturating_add(Duration::from_micros(micros));
            total.saturating_sub(self.waited)
        });
        self.since.map(|since| since + timeout.min(in_all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn budget(bytes_per_second: Option<u32>) -> WaitBudget {
        WaitBudget::new(WaitLimits {
            timeout: 30 * SECOND,
            bytes_per_second,
        })
    }

    /// Waits `times` times for a second, and gets this number of bytes after each wait. Returns the time that the next
    /// wait may last.
    fn next_wait(mut budget: WaitBudget, times: u32, bytes: usize) -> Duration {
        let start = Instant::now();
        for number in 0..times {
            budget.start_waiting(start + 2 * SECOND * number);
            budget.stop_waiting(start + 2 * SECOND * number + SECOND);
            budget.add_bytes(bytes);
        }
        assert_eq!(budget.deadline(), None);
        budget.start_waiting(start);
        budget.deadline().expect("it waits") - start
    }

    #[test]
    fn a_peer_below_the_minimum_rate_uses_up_the_timeout() {
        let budget = budget(Some(500));
        assert_eq!(next_wait(budget, 0, 0), 30 * SECOND);
        assert_eq!(next_wait(budget, 20, 0), 10 * SECOND);
        assert_eq!(next_wait(budget, 20, 50), 12 * SECOND);
        assert_eq!(next_wait(budget, 40, 100), Duration::ZERO);
    }

    #[test]
    fn a_peer_at_the_minimum_rate_gets_the_timeout_each_time() {
        assert_eq!(next_wait(budget(Some(500)), 1_000, 500), 30 * SECOND);
        assert_eq!(next_wait(budget(Some(500)), 1, 1_000_000), 30 * SECOND);
    }

    #[test]
    fn a_peer_without_a_minimum_rate_gets_the_timeout_each_time() {
        assert_eq!(next_wait(budget(None), 1_000, 1), 30 * SECOND);
    }
}
