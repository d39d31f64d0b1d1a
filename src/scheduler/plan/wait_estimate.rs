//! Estimates how long a request waits for its first slot.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Number of slots over which the rate is measured: the last slots that became free while requests waited. With fewer,
/// there is no estimate.
const SAMPLES: usize = 32;

/// The times at which slots became free for waiting requests.
#[derive(Default)]
pub(super) struct WaitEstimate {
    freed: VecDeque<Instant>,
}

impl WaitEstimate {
    /// Records that a slot became free, and that requests still wait.
    pub(super) fn record_free_slot(&mut self, now: Instant) {
        if self.freed.len() == SAMPLES {
            self.freed.pop_front();
        }
        self.freed.push_back(now);
    }

    /// Forgets the measured rate, because the queue is empty or the model's slots have changed.
    pub(super) fn reset(&mut self) {
        self.freed.clear();
    }

    /// Returns the time until slots have become free for this many choices, at the measured rate. `None` if the rate is
    /// not known.
    pub(super) fn wait(&self, choices: usize) -> Option<Duration> {
        if self.freed.len() < SAMPLES {
            return None;
        }
        let span = self
            .freed
            .back()?
            .saturating_duration_since(*self.freed.front()?);
        let intervals = u32::try_from(SAMPLES - 1).ok()?;
        let choices = u32::try_from(choices).unwrap_or(u32::MAX);
        Some((span / intervals).saturating_mul(choices))
    }
}
