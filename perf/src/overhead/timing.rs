//! Measures the cost of timing a token's stages, which a server does for every token. It makes the same calls that the
//! HTTP API makes for a token, and nothing else.

use std::hint::black_box;
use std::sync::Arc;

use http::Version;
use tokenway::delivery::{DeliveryTimer, FlushHandle, FlushTracker, WriteStart};
use tokenway::runner::{Token, TokenBytes, monotonic_ns};
use tokenway::telemetry::{
    Api, RequestRecord, ResponseFormat, Route, Stage, StageTimes, Telemetry,
};
use tokenway::text::completion::record_engine_latency;
use tokenway::worker::token_channel::Output;

use crate::statistics::count_to_f64;

/// Number of tokens that are timed in a round.
const TIMED_TOKENS: u32 = 32 * 1_024;
/// Number of tokens that are read together at full speed.
const BATCH: u32 = 256;
/// Typical time between the emissions of two tokens of a batch, in nanoseconds.
const EMISSION_GAP_NS: u64 = 5_000;

/// Cost of timing the stages of one token, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimingCost {
    /// Cost of a token that is read, written and flushed alone.
    pub(super) lone_ns: f64,
    /// Cost per token if 256 tokens are read, written and flushed together.
    pub(super) batched_ns: f64,
}

impl TimingCost {
    pub(super) fn measure() -> Self {
        Self {
            lone_ns: cost_per_token(1),
            batched_ns: cost_per_token(BATCH),
        }
    }
}

fn cost_per_token(batch: u32) -> f64 {
    let mut timed = TimedStream::open();
    let outputs = make_outputs(batch);
    let times = TIMED_TOKENS / batch;
    let start_ns = monotonic_ns();
    for _ in 0..times {
        timed.pass_outputs(black_box(&outputs));
    }
    let took_ns = monotonic_ns() - start_ns;
    count_to_f64(took_ns) / f64::from(times * batch)
}

/// Timers of the stages of one stream.
struct TimedStream {
    engine: StageTimes,
    api: DeliveryTimer,
    flushes: Arc<FlushTracker>,
}

impl TimedStream {
    fn open() -> Self {
        let telemetry = Telemetry::new();
        let flushes = Arc::new(FlushTracker::default());
        let record = RequestRecord::new(&telemetry, Api::Http, Route::UNMATCHED, monotonic_ns());
        record.set_format(ResponseFormat::HttpNdjson);
        let flush = FlushHandle::new(Arc::clone(&flushes), Version::HTTP_11);
        Self {
            engine: telemetry.stage_times(ResponseFormat::HttpNdjson, Stage::Engine),
            api: DeliveryTimer::new(&Arc::new(record), flush),
            flushes,
        }
    }

    /// Passes tokens that are ready at the same time through all stages.
    fn pass_outputs(&mut self, outputs: &[Output]) {
        let turn = WriteStart::now();
        record_engine_latency(outputs, &self.engine);
        self.api
            .record_written(turn, 0, u64::try_from(outputs.len()).unwrap_or(0));
        // The connection polls once more, without a result, before it flushes.
        black_box(WriteStart::now());
        self.flushes.record_flush();
    }
}

fn make_outputs(batch: u32) -> Vec<Output> {
    let now_ns = monotonic_ns();
    let token = |id: u32| Token {
        id,
        bytes: TokenBytes::from_slice(b" token"),
        due_ns: now_ns,
        emitted_ns: now_ns - u64::from(batch - id) * EMISSION_GAP_NS,
        logprobs: None,
    };
    (0..batch).map(token).map(Output::Token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_timed() {
        let mut timed = TimedStream::open();
        timed.pass_outputs(&make_outputs(3));
        let delivery = timed.api.summary();
        let tokens =
            [timed.engine.summary(), delivery.frontend, delivery.socket].map(|stage| stage.tokens);
        assert_eq!(tokens, [3, 3, 3]);
    }
}
