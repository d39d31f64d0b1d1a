//! Scenarios: the loads under which paths are compared.

use std::time::Duration;

use tokenway::runner::llm_test::CONTEXT_LENGTH;

use super::scale::{Scale, Shape};
use crate::load::{ConnectionPlan, Load};
use crate::process::ResourceUsage;

/// Time between two tokens of a paced stream: 50 tokens/s.
pub(super) const PACED_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum number of tokens that a request asks for. With the prompt, they fit into the device's context.
pub(super) const MAX_REQUEST_TOKENS: u32 = CONTEXT_LENGTH / 16 * 15;
/// Number of tokens of a short request.
const SHORT_TOKENS: u32 = 16;
/// Number of concurrent short requests, and of connections that are opened for open-loop requests.
const SHORT_STREAMS: u32 = 32;

/// A load under which paths are measured. The number is the number of streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scenario {
    /// Streams whose tokens are generated as fast as the client reads them.
    Full(u32),
    /// Streams of 50 tokens/s, whose starts are spread over one interval.
    Paced(u32),
    /// Requests of 16 tokens, 32 at a time, each sent as soon as the previous one is answered. This load measures the
    /// rate of requests, not their latency.
    Short,
    /// Requests of 16 tokens, sent at a rate of 1,000 per second, whether or not the previous requests were answered.
    /// Every path can answer many more, so this load measures the latency of a request.
    OpenLoop,
    /// Thousands of concurrent streams or queued requests.
    Scale(Scale),
}

impl Scenario {
    pub(super) fn scales(size: RunSize) -> [Self; 4] {
        Scale::all(size.crowd).map(Self::Scale)
    }

    pub(crate) fn title(self) -> String {
        match self {
            Self::Full(1) => "1 stream, full speed".to_owned(),
            Self::Full(streams) => format!("{streams} streams, full speed"),
            Self::Paced(1) => "1 stream × 50 tokens/s".to_owned(),
            Self::Paced(streams) => format!("{streams} streams × 50 tokens/s"),
            Self::Short => "requests of 16 tokens, 32 at a time".to_owned(),
            Self::OpenLoop => "requests of 16 tokens, 1,000 a second".to_owned(),
            Self::Scale(scale) => scale.title(),
        }
    }

    /// Returns the number of streams at full speed, or `None` for another load.
    pub(super) fn full_streams(self) -> Option<u32> {
        match self {
            Self::Full(streams) => Some(streams),
            Self::Paced(_) | Self::Short | Self::OpenLoop | Self::Scale(_) => None,
        }
    }

    /// Returns the number of paced streams, or `None` for another load.
    pub(super) fn paced_streams(self) -> Option<u32> {
        match self {
            Self::Paced(streams) => Some(streams),
            Self::Scale(scale) => (scale.shape == Shape::Many).then_some(scale.size),
            Self::Full(_) | Self::Short | Self::OpenLoop => None,
        }
    }

    /// Returns the time between two tokens of a stream. `None` if each turn starts its own servers.
    pub(super) fn token_interval(self) -> Option<Duration> {
        match self {
            Self::Full(_) | Self::Short | Self::OpenLoop => Some(Duration::ZERO),
            Self::Paced(_) => Some(PACED_INTERVAL),
            Self::Scale(_) => None,
        }
    }

    /// Returns the processor time that counts as cost under this load. A paced device spins before each token, which
    /// is no cost of an API, so the device's thread is left out then.
    pub(super) fn counted_cpu(self, before: ResourceUsage, after: ResourceUsage) -> Duration {
        let all = after.cpu - before.cpu;
        match self {
            Self::Paced(_) | Self::Scale(_) => {
                all.saturating_sub(after.device_cpu - before.device_cpu)
            }
            Self::Full(_) | Self::Short | Self::OpenLoop => all,
        }
    }

    pub(super) fn load(self, size: RunSize) -> Load {
        let at_once = Load::of_test_runner(SHORT_STREAMS, SHORT_TOKENS);
        match self {
            Self::Full(streams) => Load {
                streams,
                tokens: (size.full_tokens / streams).min(MAX_REQUEST_TOKENS),
                ..at_once
            },
            Self::Paced(streams) => Load {
                streams,
                tokens: if streams == 1 {
                    size.single_tokens
                } else {
                    size.paced_tokens
                },
                request_timestamps: true,
                spread: PACED_INTERVAL,
                ..at_once
            },
            Self::Short => Load {
                requests: size.short_requests / SHORT_STREAMS,
                ..at_once
            },
            Self::OpenLoop => Load {
                streams: size.open_loop_requests,
                spread: Duration::from_millis(size.open_loop_requests.into()),
                ..at_once
            },
            Self::Scale(scale) => scale.load(size),
        }
    }

    /// Returns the load that warms up a path before its first measurement: the same load for a short time.
    pub(super) fn warm_up(self, size: RunSize) -> Load {
        let load = self.load(size);
        match self {
            Self::Full(_) => Load {
                tokens: load.tokens.div_ceil(20),
                ..load
            },
            Self::Paced(_) => Load { tokens: 3, ..load },
            Self::Short => Load {
                requests: load.requests.div_ceil(20),
                ..load
            },
            Self::OpenLoop => Load {
                streams: load.streams.div_ceil(10),
                spread: load.spread / 10,
                ..load
            },
            Self::Scale(scale) => scale.warm_up(),
        }
    }

    pub(super) fn connection_plan(self) -> ConnectionPlan {
        match self {
            Self::Full(streams) | Self::Paced(streams) => ConnectionPlan::for_streams(streams),
            Self::Short | Self::OpenLoop => ConnectionPlan::for_streams(SHORT_STREAMS),
            Self::Scale(scale) => scale.connection_plan(),
        }
    }
}

/// Amount of work in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunSize {
    /// Total number of tokens of all streams at full speed.
    pub(super) full_tokens: u32,
    /// Number of tokens of each paced stream, if there are several: enough for a 99th percentile.
    pub(super) paced_tokens: u32,
    /// Number of tokens of a single paced stream, for which only the median latency is judged.
    pub(super) single_tokens: u32,
    /// Total number of short requests under [`Scenario::Short`].
    pub(super) short_requests: u32,
    /// Total number of short requests under [`Scenario::OpenLoop`].
    pub(super) open_loop_requests: u32,
    /// Number of streams of 20 tokens/s under [`Scenario::Scale`].
    pub(super) crowd: u32,
    /// Length of the window in which these streams are measured.
    pub(super) window: Duration,
}

impl RunSize {
    /// Size for five rounds in under a minute on two cores, half of which the 64 paced streams take. `crowd` is small:
    /// it only tests that loads of many streams work.
    pub(super) const QUICK: Self = Self {
        full_tokens: 1_200_000,
        paced_tokens: 45,
        single_tokens: 15,
        short_requests: 4_000,
        open_loop_requests: 300,
        crowd: 50,
        window: Duration::from_millis(500),
    };
    /// Size for five rounds of all paths, three of them with thousands of streams, in about 20 minutes.
    pub(super) const WHOLE: Self = Self {
        full_tokens: 4_000_000,
        paced_tokens: 80,
        single_tokens: 30,
        short_requests: 16_000,
        open_loop_requests: 1_000,
        crowd: 5_000,
        window: Duration::from_secs(10),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_fits_into_the_devices_context() {
        for size in [RunSize::QUICK, RunSize::WHOLE] {
            let streams = [1, 64, 512];
            let all = [Scenario::Short, Scenario::OpenLoop]
                .into_iter()
                .chain(Scenario::scales(size))
                .chain(streams.map(Scenario::Full))
                .chain(streams.map(Scenario::Paced));
            for scenario in all {
                let tokens = scenario.load(size).tokens;
                assert!(
                    (1..=MAX_REQUEST_TOKENS).contains(&tokens),
                    "{scenario:?}: {tokens}"
                );
            }
        }
    }
}
