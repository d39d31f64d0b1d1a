//! The loads under which lanes are compared.

use std::time::Duration;

use tokenway::runner::llm_test::CONTEXT_LENGTH;

use super::lane::Lane;
use super::scale::Scale;
use crate::load::{Load, Sockets};
use crate::process::Usage;

/// The cadence of paced streams: 50 tokens a second.
pub(super) const PACED: Duration = Duration::from_millis(20);

/// A load of a known kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scenario {
    /// So many streams as fast as they are read.
    Full(u32),
    /// So many streams of 50 tokens a second, their beginnings spread over one interval.
    Paced(u32),
    /// Requests of 16 tokens, 32 at a time, as fast as they are answered. How long one takes says only
    /// how many are answered in a second.
    Short,
    /// Requests of 16 tokens, 1,000 a second, whether those before are answered or not: far less than
    /// any lane can answer, so that what one takes is its own time.
    OpenLoop,
    /// Thousands of streams at once.
    Scale(Scale),
}

/// Tokens of the longest request: with its prompt it fits into the device's context.
pub(super) const LONGEST: u32 = CONTEXT_LENGTH / 16 * 15;

/// Tokens of a short request.
const SHORT: u32 = 16;

/// How many short requests run at a time; and how many connections wait for those that come open loop.
const SHORT_STREAMS: u32 = 32;

impl Scenario {
    /// What reports call it.
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

    /// How many streams run at full speed, if that is it.
    pub(super) fn full_streams(self) -> Option<u32> {
        match self {
            Self::Full(streams) => Some(streams),
            Self::Paced(_) | Self::Short | Self::OpenLoop | Self::Scale(_) => None,
        }
    }

    /// How many paced streams run, if that is it.
    pub(super) fn paced_streams(self) -> Option<u32> {
        match self {
            Self::Paced(streams) | Self::Scale(Scale::Many(streams)) => Some(streams),
            Self::Full(_) | Self::Short | Self::OpenLoop | Self::Scale(_) => None,
        }
    }

    /// The time between two tokens that the servers keep which take turns under this load; `None` where
    /// each turn has servers of its own.
    pub(super) fn interval(self) -> Option<Duration> {
        match self {
            Self::Full(_) | Self::Short | Self::OpenLoop => Some(Duration::ZERO),
            Self::Paced(_) => Some(PACED),
            Self::Scale(_) => None,
        }
    }

    /// The processor time between two looks that counts under this load. A device that keeps a cadence spins
    /// before each token, the floors' as much as the product's, and what that takes says nothing of a
    /// door: so there its thread does not count.
    pub(super) fn cpu(self, before: Usage, after: Usage) -> Duration {
        let all = after.cpu - before.cpu;
        match self {
            Self::Paced(_) | Self::Scale(_) => {
                all.saturating_sub(after.device_cpu - before.device_cpu)
            }
            Self::Full(_) | Self::Short | Self::OpenLoop => all,
        }
    }

    /// What is asked of a lane in one round.
    pub(super) fn load(self, size: Size) -> Load {
        match self {
            Self::Full(streams) => Load {
                streams,
                requests: 1,
                tokens: (size.full_tokens / streams).min(LONGEST),
                timed: false,
                spread: Duration::ZERO,
            },
            Self::Paced(streams) => Load {
                streams,
                requests: 1,
                tokens: if streams == 1 {
                    size.single_tokens
                } else {
                    size.paced_tokens
                },
                timed: true,
                spread: PACED,
            },
            Self::Short => Load {
                streams: SHORT_STREAMS,
                requests: size.short_requests / SHORT_STREAMS,
                tokens: SHORT,
                timed: false,
                spread: Duration::ZERO,
            },
            Self::OpenLoop => Load {
                streams: size.open_loop_requests,
                requests: 1,
                tokens: SHORT,
                timed: false,
                spread: Duration::from_millis(size.open_loop_requests.into()),
            },
            Self::Scale(scale) => scale.load(size),
        }
    }

    /// What is asked before anything is counted: the same, for a moment.
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

    /// The lanes that its targets need.
    pub(super) fn quick_lanes(self) -> &'static [Lane] {
        use Lane::{BareAxum, BareTonic, Child, Grpc, Mpsc, Ndjson, TwoTcp};
        match self {
            Self::Paced(1) => &[Mpsc, BareAxum, Ndjson],
            Self::Paced(_) => &[BareTonic, BareAxum, Grpc, Ndjson, Child, TwoTcp],
            Self::Full(_) => &[BareTonic, BareAxum, Grpc, Ndjson, Child, TwoTcp],
            Self::Short | Self::OpenLoop => &[BareTonic, BareAxum, Grpc, Ndjson],
            Self::Scale(scale) => scale.lanes(),
        }
    }

    /// What is open before anything is asked.
    pub(super) fn sockets(self) -> Sockets {
        match self {
            Self::Full(streams) | Self::Paced(streams) => Sockets::of(streams),
            Self::Short | Self::OpenLoop => Sockets::of(SHORT_STREAMS),
            Self::Scale(scale) => scale.sockets(),
        }
    }
}

/// How much is asked in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Tokens of all streams at full speed.
    pub(super) full_tokens: u32,
    /// Tokens of each of several paced streams: enough for a 99th percentile.
    pub(super) paced_tokens: u32,
    /// Tokens of a single paced stream, of which the median is looked at, in turns that are as short.
    pub(super) single_tokens: u32,
    /// Short requests, as fast as they are answered.
    pub(super) short_requests: u32,
    /// Short requests, one each millisecond.
    pub(super) open_loop_requests: u32,
    /// How many streams of 20 tokens a second are many.
    pub(super) crowd: u32,
    /// How long many streams are looked at.
    pub(super) window: Duration,
}

impl Size {
    /// Five rounds in under a minute on two cores: half of it for 64 paced streams. Few streams are many
    /// here, for whoever only tries whether they can be measured.
    pub(super) const QUICK: Self = Self {
        full_tokens: 1_200_000,
        paced_tokens: 45,
        single_tokens: 15,
        short_requests: 4_000,
        open_loop_requests: 300,
        crowd: 50,
        window: Duration::from_millis(500),
    };
    /// Five rounds of all lanes, and three with thousands of streams, in under a quarter of an hour.
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
            let scale = Scale::all(size.crowd).map(Scenario::Scale);
            let streams = [1, 64, 512];
            let all = [Scenario::Short, Scenario::OpenLoop]
                .into_iter()
                .chain(scale);
            let all = all.chain(streams.map(Scenario::Full));
            for scenario in all.chain(streams.map(Scenario::Paced)) {
                let asked = scenario.load(size).tokens;
                assert!((1..=LONGEST).contains(&asked), "{scenario:?}: {asked}");
            }
        }
    }
}
