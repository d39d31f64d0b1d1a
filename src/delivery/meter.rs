//! Measures the time between the tokens of one request, at the point where its frontend writes them.

use std::sync::Arc;

use crate::runner::monotonic_ns;
use crate::telemetry::{InterTokenTimes, Outcome, RequestRecord};

/// Measures the time between the tokens of one request. The measurements are added to the request's record when the
/// request ends, or when the meter is dropped.
pub(crate) struct TokenMeter {
    record: Arc<RequestRecord>,
    gaps: InterTokenTimes,
}

impl TokenMeter {
    /// Creates the meter for the request with this record.
    #[must_use]
    pub(crate) fn new(record: &Arc<RequestRecord>) -> Self {
        Self {
            record: Arc::clone(record),
            gaps: InterTokenTimes::default(),
        }
    }

    /// Records that `tokens` tokens of a choice were written at `now_ns`, in nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn record_written(&mut self, choice: u32, tokens: u64, now_ns: u64) {
        self.gaps.record(choice, tokens, now_ns);
    }

    /// Reports the outcome of the request to its record.
    pub(crate) fn record_end(&mut self, outcome: Outcome) {
        self.record.add_gaps(&mut self.gaps);
        self.record.record_end(outcome, monotonic_ns());
    }
}

impl Drop for TokenMeter {
    fn drop(&mut self) {
        self.record.add_gaps(&mut self.gaps);
    }
}
