//! Estimates how long a request waits for its first slot.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Number of slots that must have become free, one after the other while requests waited, before there is an estimate.
/// Only the last ones count.
const SAMPLES: usize = 32;

/// The times at which slots became free for waiting requests.
#[derive(Default)]
pub(super) struct WaitEstimate {
    freed: VecDeque<Instant>,
}

impl WaitEstimate {
    /// Records that a slot became free while requests waited, and more of them wait now.
    pub(super) fn record_free_slot(&mut self, now: Instant) {
        if self.freed.len() == SAMPLES {
            self.freed.pop_front();
        }
        self.freed.push_back(now);
    }

    /// Forgets the past, because the queue is empty or the model has other slots now.
    pub(super) fn reset(&mut self) {
        self.freed.clear();
    }

    /// Returns the time in which slots become free for this many choices, at the rate of the recent past. `None` if
    /// that rate is not known.
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
