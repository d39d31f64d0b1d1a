//! Times one request's tokens from its door's turn to the socket.

use std::sync::Arc;

use super::Flush;
use crate::runner::monotonic_ns;
use crate::telemetry::{Lane, Stage, StageSummary, StageTimes, Telemetry};

/// The clock of one request at its door.
pub struct DoorClock {
    door: StageTimes,
    socket: Arc<StageTimes>,
    /// The request's connection; `None` where nothing was listening.
    flush: Option<Flush>,
}

/// When a door began to write, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub struct Turn(u64);

impl Turn {
    /// A turn that begins now.
    #[must_use]
    pub fn begin() -> Self {
        Self(monotonic_ns())
    }
}

impl DoorClock {
    /// The clock of a request whose tokens leave by this lane and this connection.
    #[must_use]
    pub fn new(telemetry: &Telemetry, lane: Lane, flush: Option<Flush>) -> Self {
        Self {
            door: telemetry.stage_times(lane, Stage::Door),
            socket: Arc::new(telemetry.stage_times(lane, Stage::Socket)),
            flush,
        }
    }

    /// Counts so many tokens as written now, in this turn.
    pub fn written(&self, turn: Turn, tokens: u64) {
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
    use crate::delivery::Flushes;

    const SECOND_NS: u64 = 1_000_000_000;

    fn summary(tokens: u64, at_least_ns: u64, summary: StageSummary) {
        assert_eq!(summary.tokens, tokens);
        assert!(summary.mean_ns >= at_least_ns, "{summary:?}");
    }

    #[test]
    fn a_token_is_in_the_doors_stage_until_it_is_written_and_then_in_the_sockets_until_the_flush() {
        let flushes = Arc::new(Flushes::default());
        let flush = Flush::new(Arc::clone(&flushes), http::Version::HTTP_11);
        let clock = DoorClock::new(&Telemetry::new(), Lane::HttpNdjson, Some(flush));
        flushes.flushed();
        clock.written(Turn(monotonic_ns() - SECOND_NS), 3);
        let (door, socket) = clock.summaries();
        summary(3, SECOND_NS, door);
        summary(0, 0, socket);
        flushes.flushed();
        flushes.flushed();
        summary(3, 0, clock.summaries().1);
        assert!(clock.summaries().1.mean_ns < SECOND_NS);
    }

    #[test]
    fn what_waits_for_a_flush_that_does_not_come_is_bounded() {
        let flushes = Arc::new(Flushes::default());
        let flush = Flush::new(Arc::clone(&flushes), http::Version::HTTP_2);
        let clock = DoorClock::new(&Telemetry::new(), Lane::Grpc, Some(flush));
        for _ in 0..1_000 {
            clock.written(Turn::begin(), 1);
        }
        flushes.flushed();
        let (door, socket) = clock.summaries();
        assert_eq!((door.tokens, socket.tokens), (1_000, 256));
    }
}
