//! Measures the time that each token of a request spends in the frontend stage and in the socket stage, and the time
//! between tokens.

use std::sync::Arc;

use super::{FlushHandle, TokenMeter};
use crate::runner::monotonic_ns;
use crate::telemetry::{Outcome, RequestRecord, Stage, StageSummary, StageTimes};

/// Measures the delivery of one request's tokens. It belongs to the frontend that received the request.
pub struct DeliveryTimer {
    frontend: StageTimes,
    socket: Arc<StageTimes>,
    /// Waits for flushes of the request's connection.
    flush: FlushHandle,
    meter: TokenMeter,
}

/// Summary of the stages that the frontend of a request measures.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeliverySummary {
    /// Times in the frontend stage.
    pub frontend: StageSummary,
    /// Times in the socket stage.
    pub socket: StageSummary,
}

/// The time at which a frontend started to write a batch of tokens, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub struct WriteStart(u64);

impl WriteStart {
    /// Starts a measurement now.
    #[must_use]
    pub fn now() -> Self {
        Self(monotonic_ns())
    }
}

impl DeliveryTimer {
    /// Creates the timer for the request with this record. The record must already have the response format.
    #[must_use]
    pub fn new(record: &Arc<RequestRecord>, flush: FlushHandle) -> Self {
        let times = |stage| record.telemetry().stage_times(record.format(), stage);
        Self {
            frontend: times(Stage::Frontend),
            socket: Arc::new(times(Stage::Socket)),
            flush,
            meter: TokenMeter::new(record),
        }
    }

    /// Records that `tokens` tokens of a choice have been written. `start` is when their frontend stage began.
    pub fn record_written(&mut self, start: WriteStart, choice: u32, tokens: u64) {
        if tokens == 0 {
            return;
        }
        let now_ns = monotonic_ns();
        self.frontend.record(tokens, now_ns.saturating_sub(start.0));
        self.flush.record_socket_time(&self.socket, tokens, now_ns);
        self.meter.record_written(choice, tokens, now_ns);
    }

    /// Reports the outcome of the request to its record.
    pub fn record_end(&mut self, outcome: Outcome) {
        self.meter.record_end(outcome);
    }

    /// Returns the summary so far.
    #[must_use]
    pub fn summary(&self) -> DeliverySummary {
        DeliverySummary {
            frontend: self.frontend.summary(),
            socket: self.socket.summary(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::FlushTracker;
    use crate::telemetry::{Api, Route, Telemetry};

    const SECOND_NS: u64 = 1_000_000_000;

    fn timer(flushes: &Arc<FlushTracker>, version: http::Version) -> DeliveryTimer {
        let record = RequestRecord::new(&Telemetry::new(), Api::Grpc, Route::UNMATCHED, 0);
        let flush = FlushHandle::new(Arc::clone(flushes), version);
        DeliveryTimer::new(&Arc::new(record), flush)
    }

    fn assert_summary(tokens: u64, at_least_ns: u64, summary: StageSummary) {
        assert_eq!(summary.tokens, tokens);
        assert!(summary.mean_ns >= at_least_ns, "{summary:?}");
    }

    #[test]
    fn the_frontend_stage_ends_at_the_write_and_the_socket_stage_at_the_flush() {
        let flushes = Arc::new(FlushTracker::default());
        let mut timer = timer(&flushes, http::Version::HTTP_11);
        flushes.record_flush();
        timer.record_written(WriteStart(monotonic_ns() - SECOND_NS), 0, 3);
        let DeliverySummary { frontend, socket } = timer.summary();
        assert_summary(3, SECOND_NS, frontend);
        assert_summary(0, 0, socket);
        flushes.record_flush();
        flushes.record_flush();
        assert_summary(3, 0, timer.summary().socket);
        assert!(timer.summary().socket.mean_ns < SECOND_NS);
    }

    #[test]
    fn the_number_of_writes_timed_until_a_flush_is_bounded() {
        let flushes = Arc::new(FlushTracker::default());
        let mut timer = timer(&flushes, http::Version::HTTP_2);
        for _ in 0..1_000 {
            timer.record_written(WriteStart::now(), 0, 1);
        }
        flushes.record_flush();
        let DeliverySummary { frontend, socket } = timer.summary();
        assert_eq!((frontend.tokens, socket.tokens), (1_000, 256));
    }
}
