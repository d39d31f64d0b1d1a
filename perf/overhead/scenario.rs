//! The loads under which lanes are compared.

use std::time::Duration;

use crate::load::Load;

/// The cadence of paced streams: 50 tokens a second.
pub(super) const PACED: Duration = Duration::from_millis(20);

/// A load of a known kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scenario {
    /// So many streams as fast as they are read.
    Full(u32),
    /// So many streams of 50 tokens a second, their beginnings spread over one interval.
    Paced(u32),
    /// Requests of 16 tokens, 32 at a time, as fast as they are answered.
    Short,
}

impl Scenario {
    /// What reports call it.
    pub(crate) fn title(self) -> String {
        match self {
            Self::Full(1) => "1 stream, full speed".to_owned(),
            Self::Full(streams) => format!("{streams} streams, full speed"),
            Self::Paced(1) => "1 stream × 50 tokens/s".to_owned(),
            Self::Paced(streams) => format!("{streams} streams × 50 tokens/s"),
            Self::Short => "requests of 16 tokens, 32 at a time".to_owned(),
        }
    }

    /// How many streams run at full speed, if that is it.
    pub(super) fn full_streams(self) -> Option<u32> {
        match self {
            Self::Full(streams) => Some(streams),
            Self::Paced(_) | Self::Short => None,
        }
    }

    /// How many paced streams run, if that is it.
    pub(super) fn paced_streams(self) -> Option<u32> {
        match self {
            Self::Paced(streams) => Some(streams),
            Self::Full(_) | Self::Short => None,
        }
    }

    /// The time between two tokens that the device keeps.
    pub(super) fn interval(self) -> Duration {
        match self {
            Self::Full(_) | Self::Short => Duration::ZERO,
            Self::Paced(_) => PACED,
        }
    }

    /// What is asked of a lane in one round.
    pub(super) fn load(self, size: Size) -> Load {
        match self {
            Self::Full(streams) => Load {
                streams,
                requests: 1,
                tokens: size.full_tokens / streams,
                timed: false,
                spread: Duration::ZERO,
            },
            Self::Paced(streams) => Load {
                streams,
                requests: 1,
                tokens: size.paced_tokens,
                timed: true,
                spread: PACED,
            },
            Self::Short => Load {
                streams: 32,
                requests: size.short_requests / 32,
                tokens: 16,
                timed: false,
                spread: Duration::ZERO,
            },
        }
    }
}

/// How much is asked in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Tokens of all streams at full speed.
    pub(super) full_tokens: u32,
    /// Tokens of each paced stream.
    pub(super) paced_tokens: u32,
    /// Short requests.
    pub(super) short_requests: u32,
}

impl Size {
    pub(super) const QUICK: Self = Self {
        full_tokens: 1_000_000,
        paced_tokens: 50,
        short_requests: 3_200,
    };
    pub(super) const WHOLE: Self = Self {
        full_tokens: 4_000_000,
        paced_tokens: 250,
        short_requests: 16_000,
    };
}
