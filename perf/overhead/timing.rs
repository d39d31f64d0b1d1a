//! What it takes to time a token's stages, which a running server does for all its tokens: the same calls
//! as on a token's way through the HTTP door, and nothing else, timed on this machine in this run.

use std::hint::black_box;
use std::sync::Arc;

use http::Version;
use tokenway::delivery::{DeliveryTimer, FlushHandle, FlushTracker, WriteStart};
use tokenway::runner::{Token, TokenBytes, monotonic_ns};
use tokenway::telemetry::{ResponseFormat, Stage, StageTimes, Telemetry};
use tokenway::text::completion::record_engine_latency;
use tokenway::worker::token_channel::Output;

use super::statistics::count;

/// How many tokens are timed for a round.
const TOKENS: u32 = 32 * 1_024;

/// As many tokens as are read at once at full speed.
const BATCH: u32 = 256;

/// How far apart the tokens of a batch were emitted, about, in nanoseconds.
const APART_NS: u64 = 5_000;

/// What it takes for each token, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimingCost {
    /// Where each is read, written and flushed alone.
    pub(super) lone_ns: f64,
    /// Where 256 are read, written and flushed together.
    pub(super) batched_ns: f64,
}

impl TimingCost {
    /// What it takes now.
    pub(super) fn now() -> Self {
        Self {
            lone_ns: for_each_token(1),
            batched_ns: for_each_token(BATCH),
        }
    }
}

fn for_each_token(batch: u32) -> f64 {
    let stream = Stream::open();
    let outputs = outputs(batch);
    let times = TOKENS / batch;
    let began_ns = monotonic_ns();
    for _ in 0..times {
        stream.pass(black_box(&outputs));
    }
    let took_ns = monotonic_ns() - began_ns;
    count(took_ns) / f64::from(times * batch)
}

/// What a stream times its tokens with.
struct Stream {
    engine: StageTimes,
    clock: DeliveryTimer,
    flushes: Arc<FlushTracker>,
}

impl Stream {
    fn open() -> Self {
        let telemetry = Telemetry::new();
        let flushes = Arc::new(FlushTracker::default());
        let flush = FlushHandle::new(Arc::clone(&flushes), Version::HTTP_11);
        Self {
            engine: telemetry.stage_times(ResponseFormat::HttpNdjson, Stage::Engine),
            clock: DeliveryTimer::new(&telemetry, ResponseFormat::HttpNdjson, Some(flush)),
            flushes,
        }
    }

    /// Tokens pass that are ready together.
    fn pass(&self, outputs: &[Output]) {
        let turn = WriteStart::begin();
        record_engine_latency(outputs, &self.engine);
        self.clock
            .written(turn, u64::try_from(outputs.len()).unwrap_or(0));
        // The connection asks for more, in vain, before it flushes.
        black_box(WriteStart::begin());
        self.flushes.flushed();
    }
}

fn outputs(batch: u32) -> Vec<Output> {
    let now_ns = monotonic_ns();
    let token = |id: u32| Token {
        id,
        bytes: TokenBytes::from_slice(b" token"),
        due_ns: now_ns,
        emitted_ns: now_ns - u64::from(batch - id) * APART_NS,
        logprobs: None,
    };
    (0..batch).map(token).map(Output::Token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_timed() {
        let stream = Stream::open();
        stream.pass(&outputs(3));
        let delivery = stream.clock.summary();
        let stages = [stream.engine.summary(), delivery.frontend, delivery.socket];
        let tokens = stages.map(|stage| stage.tokens);
        assert_eq!(tokens, [3, 3, 3]);
    }
}
