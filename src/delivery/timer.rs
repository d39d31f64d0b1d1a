//! Times one request's tokens from its door's turn to the socket.

use std::sync::Arc;

use super::FlushHandle;
use crate::runner::monotonic_ns;
use crate::telemetry::{ResponseFormat, Stage, StageSummary, StageTimes, Telemetry};

/// The clock of one request at its door.
pub struct DeliveryTimer {
    door: StageTimes,
    socket: Arc<StageTimes>,
    /// The request's connection; `None` where nothing was listening.
    flush: Option<FlushHandle>,
}

/// When a door began to write, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub struct WriteStart(u64);

impl WriteStart {
    /// A turn that begins now.
    #[must_use]
    pub fn begin() -> Self {
        Self(monotonic_ns())
    }
}

impl DeliveryTimer {
    /// The clock of a request whose tokens leave by this format and this connection.
    #[must_use]
    pub fn new(telemetry: &Telemetry, format: ResponseFormat, flush: Option<FlushHandle>) -> Self {
        Self {
            door: telemetry.stage_times(format, Stage::Frontend),
            socket: Arc::new(telemetry.stage_times(format, Stage::Socket)),
            flush,
        }
    }

    /// Counts so many tokens as written now, in this turn.
    pub fn written(&self, turn: WriteStart, tokens: u64) {
        if tokens == 0 {
            return;
        }
        let now_ns = monotonic_ns();
        self.door.record(tokens, now_ns.saturating_sub(turn.0));
        if let Some(flush) = &self.flush {
            flush.time(&self.socket, tokens, now_ns);
        }
    }

    /// What the request's tokens have taken so far, in the door's stage and in the socket's.
    #[must_use]
    pub fn summaries(&self) -> (StageSummary, StageSummary) {
        (self.door.summary(), self.socket.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::FlushTracker;

    const SECOND_NS: u64 = 1_000_000_000;

    fn summary(tokens: u64, at_least_ns: u64, summary: StageSummary) {
        assert_eq!(summary.tokens, tokens);
        assert!(summary.mean_ns >= at_least_ns, "{summary:?}");
    }

    #[test]
    fn the_frontend_stage_ends_at_the_write_and_the_socket_stage_at_the_flush() {
        let flushes = Arc::new(FlushTracker::default());
        let flush = FlushHandle::new(Arc::clone(&flushes), http::Version::HTTP_11);
        let clock = DeliveryTimer::new(&Telemetry::new(), ResponseFormat::HttpNdjson, Some(flush));
        flushes.flushed();
        clock.written(WriteStart(monotonic_ns() - SECOND_NS), 3);
        let (door, socket) = clock.summaries();
        summary(3, SECOND_NS, door);
        summary(0, 0, socket);
        flushes.flushed();
        flushes.flushed();
        summary(3, 0, clock.summaries().1);
        assert!(clock.summaries().1.mean_ns < SECOND_NS);
    }

    #[test]
    fn the_number_of_writes_timed_until_a_flush_is_bounded() {
        let flushes = Arc::new(FlushTracker::default());
        let flush = FlushHandle::new(Arc::clone(&flushes), http::Version::HTTP_2);
        let clock = DeliveryTimer::new(&Telemetry::new(), ResponseFormat::Grpc, Some(flush));
        for _ in 0..1_000 {
            clock.written(WriteStart::begin(), 1);
        }
        flushes.flushed();
        let (door, socket) = clock.summaries();
        assert_eq!((door.tokens, socket.tokens), (1_000, 256));
    }
}
