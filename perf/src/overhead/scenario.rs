//! The loads under which paths are compared.

use std::time::Duration;

use tokenway::runner::llm_test::CONTEXT_LENGTH;

use super::scale::{Scale, Shape};
use crate::load::{Load, Sockets};
use crate::process::Usage;

/// Interval of paced streams: 50 tokens a second.
pub(super) const PACED: Duration = Duration::from_millis(20);

/// Tokens of the longest request, which fits into the device's context together with its prompt.
pub(super) const LONGEST: u32 = CONTEXT_LENGTH / 16 * 15;

/// Tokens of a short request.
const SHORT: u32 = 16;

/// Short requests at once, and connections that wait for open-loop requests.
const SHORT_STREAMS: u32 = 32;

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scenario {
    /// Streams as fast as they are read.
    Full(u32),
    /// Streams of 50 tokens a second, whose starts are spread over one interval.
    Paced(u32),
    /// Requests of 16 tokens, 32 at a time, as fast as they are answered. The time of one says only how
    /// many are answered in a second.
    Short,
    /// Requests of 16 tokens, 1,000 a second, independent of the answers. Every path can answer many times
    /// more, so the time of a request is its own.
    OpenLoop,
    /// Thousands of streams at once.
    Scale(Scale),
}

impl Scenario {
    /// Loads of thousands of streams.
    pub(super) fn scales(size: Size) -> [Self; 4] {
        Scale::all(size.crowd).map(Self::Scale)
    }

    /// Name in reports.
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

    /// Number of streams at full speed.
    pub(super) fn full_streams(self) -> Option<u32> {
        match self {
            Self::Full(streams) => Some(streams),
            Self::Paced(_) | Self::Short | Self::OpenLoop | Self::Scale(_) => None,
        }
    }

    /// Number of paced streams.
    pub(super) fn paced_streams(self) -> Option<u32> {
        match self {
            Self::Paced(streams) => Some(streams),
            Self::Scale(scale) => (scale.shape == Shape::Many).then_some(scale.size),
            Self::Full(_) | Self::Short | Self::OpenLoop => None,
        }
    }

    /// Interval of the tokens of servers that take turns under this load; `None` if each turn has servers
    /// of its own.
    pub(super) fn interval(self) -> Option<Duration> {
        match self {
            Self::Full(_) | Self::Short | Self::OpenLoop => Some(Duration::ZERO),
            Self::Paced(_) => Some(PACED),
            Self::Scale(_) => None,
        }
    }

    /// Processor time that counts under this load. A paced device spins before each token, in the floors as
    /// much as in the product, which says nothing about an API: so its thread does not count.
    pub(super) fn cpu(self, before: Usage, after: Usage) -> Duration {
        let all = after.cpu - before.cpu;
        match self {
            Self::Paced(_) | Self::Scale(_) => {
                all.saturating_sub(after.device_cpu - before.device_cpu)
            }
            Self::Full(_) | Self::Short | Self::OpenLoop => all,
        }
    }

    /// Work of one round.
    pub(super) fn load(self, size: Size) -> Load {
        let at_once = Load::of_test_runner(SHORT_STREAMS, SHORT);
        match self {
            Self::Full(streams) => Load {
                streams,
                tokens: (size.full_tokens / streams).min(LONGEST),
                ..at_once
            },
            Self::Paced(streams) => Load {
                streams,
                tokens: if streams == 1 {
                    size.single_tokens
                } else {
                    size.paced_tokens
                },
                timed: true,
                spread: PACED,
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

    /// Work before the first measurement: the same load for a short time.
    pub(super) fn warm_up(self, size: Size) -> Load {
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

    /// Connections that are open before the first request.
    pub(super) fn sockets(self) -> Sockets {
        match self {
            Self::Full(streams) | Self::Paced(streams) => Sockets::of(streams),
            Self::Short | Self::OpenLoop => Sockets::of(SHORT_STREAMS),
            Self::Scale(scale) => scale.sockets(),
        }
    }
}

/// Amount of work in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Tokens of all streams at full speed.
    pub(super) full_tokens: u32,
    /// Tokens of each of several paced streams: enough for a 99th percentile.
    pub(super) paced_tokens: u32,
    /// Tokens of a single paced stream, of which only the median is judged.
    pub(super) single_tokens: u32,
    /// Short requests, as fast as they are answered.
    pub(super) short_requests: u32,
    /// Short requests, one each millisecond.
    pub(super) open_loop_requests: u32,
    /// Number of streams of 20 tokens a second.
    pub(super) crowd: u32,
    /// Length of the window in which they are measured.
    pub(super) window: Duration,
}

impl Size {
    /// Five rounds in under a minute on two cores: half of it for 64 paced streams. The crowd is small, for
    /// a test that loads of many streams work.
    pub(super) const QUICK: Self = Self {
        full_tokens: 1_200_000,
        paced_tokens: 45,
        single_tokens: 15,
        short_requests: 4_000,
        open_loop_requests: 300,
        crowd: 50,
        window: Duration::from_millis(500),
    };
    /// Five rounds of all paths, and three with thousands of streams, in under a quarter of an hour.
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
        for size in [Size::QUICK, Size::WHOLE] {
            let streams = [1, 64, 512];
            let all = [Scenario::Short, Scenario::OpenLoop]
                .into_iter()
                .chain(Scenario::scales(size))
                .chain(streams.map(Scenario::Full))
                .chain(streams.map(Scenario::Paced));
            for scenario in all {
                let tokens = scenario.load(size).tokens;
                assert!((1..=LONGEST).contains(&tokens), "{scenario:?}: {tokens}");
            }
        }
    }
}
