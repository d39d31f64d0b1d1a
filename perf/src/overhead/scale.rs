//! Loads of thousands of concurrent streams or queued requests, and the configuration of the servers for them.

use std::time::Duration;

use super::path::MeasuredPath;
use super::scenario::{MAX_REQUEST_TOKENS, RunSize};
use crate::load::{ConnectionPlan, Load};
use crate::serve::{self, Role};

mod turn;

pub(super) use turn::run_turn;

/// A load of many concurrent streams or queued requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Scale {
    pub(super) shape: Shape,
    /// Number of streams or queued requests.
    pub(super) size: u32,
}

/// Shape of a load of many streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Shape {
    /// Streams of 20 tokens/s.
    Many,
    /// A tenth as many streams as [`Shape::Many`], each of 200 tokens/s. The total token rate is the same, so a
    /// difference in the cost per token is due to the number of streams alone.
    Few,
    /// Streams of one token every two seconds.
    Slow,
    /// gRPC requests that wait for the only slot.
    Queued,
}

/// Time between the starts of two streams. If a client connects faster than a server on two cores can accept, it
/// measures the connection storm instead of the streams.
const START_INTERVAL: Duration = Duration::from_micros(400);
/// Time for which all streams run before the measured window, and again after it.
const SETTLE_TIME: Duration = Duration::from_millis(300);
/// Number of tokens that no stream reaches in a run.
const ENDLESS_TOKENS: u32 = MAX_REQUEST_TOKENS;

impl Scale {
    /// Returns the loads to measure. `crowd` is the number of streams of 20 tokens/s.
    pub(super) fn all(crowd: u32) -> [Self; 4] {
        let of = |shape, size| Self { shape, size };
        [
            of(Shape::Many, crowd),
            of(Shape::Few, crowd / 10),
            of(Shape::Slow, crowd * 2),
            of(Shape::Queued, crowd / 5 * 4),
        ]
    }

    pub(super) fn title(self) -> String {
        let size = self.size;
        match self.shape {
            Shape::Many => format!("{size} streams × 20 tokens/s"),
            Shape::Few => format!("{size} streams × 200 tokens/s"),
            Shape::Slow => format!("{size} streams × 1 token in 2 s"),
            Shape::Queued => format!("{size} queued requests"),
        }
    }

    pub(super) fn paths(self) -> &'static [MeasuredPath] {
        if self.is_queue() {
            &[MeasuredPath::Grpc]
        } else {
            &[MeasuredPath::Grpc, MeasuredPath::Ndjson]
        }
    }

    fn is_queue(self) -> bool {
        self.shape == Shape::Queued
    }

    /// Returns the number of concurrently open streams: the queued requests plus the one that runs.
    fn streams(self) -> u32 {
        self.size + u32::from(self.is_queue())
    }

    fn token_interval(self) -> Duration {
        Duration::from_millis(match self.shape {
            Shape::Many => 50,
            Shape::Few => 5,
            Shape::Slow => 2_000,
            Shape::Queued => 100,
        })
    }

    pub(super) fn connection_plan(self) -> ConnectionPlan {
        let connection_plan = ConnectionPlan::for_streams(self.streams());
        if !self.is_queue() {
            return connection_plan;
        }
        // With few connections, the queued requests account for most of the server's memory.
        ConnectionPlan {
            streams_per_connection: 1_000,
            ..connection_plan
        }
    }

    fn server_options(self) -> serve::Options {
        let streams = usize::try_from(self.streams()).unwrap_or(usize::MAX);
        let slots = if self.is_queue() { 1 } else { streams };
        serve::Options::new(Role::Product, self.token_interval(), slots, streams)
    }

    fn ramp_time(self) -> Duration {
        START_INTERVAL * self.streams()
    }

    /// Returns the time from the first start until every stream has its first token.
    fn settled_after(self) -> Duration {
        self.ramp_time() + self.token_interval() + SETTLE_TIME
    }

    /// Returns the length of the measured window, in which all streams are open.
    fn window_length(self, size: RunSize) -> Duration {
        match self.shape {
            Shape::Many | Shape::Few | Shape::Queued => size.window,
            // These streams take long to start, and a longer window would not change their memory.
            Shape::Slow => size.window / 2,
        }
    }

    /// Returns a load whose streams, once settled, all stay open until the window ends.
    pub(super) fn load(self, size: RunSize) -> Load {
        let lasts = self.settled_after() + self.window_length(size) + SETTLE_TIME;
        let tokens = lasts.as_nanos().div_ceil(self.token_interval().as_nanos());
        let tokens = if self.is_queue() {
            ENDLESS_TOKENS
        } else {
            u32::try_from(tokens).expect("a run lasts minutes")
        };
        Load {
            request_timestamps: true,
            spread: self.ramp_time(),
            ..Load::of_test_runner(self.streams(), tokens)
        }
    }

    /// Returns a load of a few streams of one token. It makes the server's first allocations, so that they are not
    /// counted as memory of the measured streams.
    pub(super) fn warm_up(self) -> Load {
        Load::of_test_runner(8, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_ends_before_the_windows_end() {
        for size in [RunSize::QUICK, RunSize::WHOLE] {
            for scale in Scale::all(size.crowd) {
                let load = scale.load(size);
                // The last stream starts at the ramp's end, and the first ends after its tokens.
                let first_ends = scale.token_interval() * load.tokens;
                let window_ends = scale.settled_after() + scale.window_length(size);
                assert!(first_ends > window_ends, "{scale:?}");
                assert!(scale.settled_after() > load.spread + scale.token_interval());
            }
        }
    }

    #[test]
    fn few_streams_make_as_many_tokens_a_second_as_many() {
        let [many, few, ..] = Scale::all(RunSize::WHOLE.crowd);
        let rate = |scale: Scale| f64::from(scale.streams()) / scale.token_interval().as_secs_f64();
        assert_eq!(rate(many), rate(few));
    }
}
