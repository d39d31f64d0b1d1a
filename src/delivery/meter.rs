//! Measures the times between the tokens of one request, where its frontend writes them.

use std::sync::Arc;

use crate::runner::monotonic_ns;
use crate::telemetry::{Outcome, RequestRecord, TokenGaps};

/// Meter of one request. It adds its counts to the request's record when the request ends, or when it is dropped.
pub struct TokenMeter {
    record: Arc<RequestRecord>,
    gaps: TokenGaps,
}

impl TokenMeter {
    /// Creates the meter of the request with this record.
    #[must_use]
    pub fn new(record: &Arc<RequestRecord>) -> Self {
        Self {
            record: Arc::clone(record),
            gaps: TokenGaps::default(),
        }
    }

    /// Records that `tokens` tokens of a choice were written at `now_ns`, in nanoseconds of CLOCK_MONOTONIC.
    pub fn written(&mut self, choice: u32, tokens: u64, now_ns: u64) {
        self.gaps.record(choice, tokens, now_ns);
    }

    /// Counts the end of the request.
    pub fn ended(&mut self, outcome: Outcome) {
        self.record.add_gaps(&mut self.gaps);
        self.record.ended(outcome, monotonic_ns());
    }
}

impl Drop for TokenMeter {
    fn drop(&mut self) {
        self.record.add_gaps(&mut self.gaps);
    }
}
