//! Thousands of streams at once, and thousands of requests that wait: what is asked, and of servers of
//! which kind.

use std::time::Duration;

use super::fleet::Setup;
use super::lane::Lane;
use super::scenario::{LONGEST, Size};
use crate::load::{Load, Sockets};

mod turn;

pub(super) use turn::turn;

/// Many streams or requests at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scale {
    /// So many streams of 20 tokens a second.
    Many(u32),
    /// So many of 200 a second. A tenth of [`Scale::Many`]'s make as many tokens a second, so that what a
    /// token costs more there is due to the number of streams: with fewer tokens a second each would cost
    /// more, because less is done in one go.
    Few(u32),
    /// So many streams of one token in two seconds.
    Slow(u32),
    /// So many gRPC requests that wait for the only slot.
    Queued(u32),
}

/// From one beginning to the next. A client that connects and asks faster than a server on two cores can
/// answer measures the storm, not the streams.
const BEGINNINGS: Duration = Duration::from_micros(400);

/// How long streams run, once all have begun, before anything is measured; and how long they go on after it.
const SETTLE: Duration = Duration::from_millis(300);

/// More tokens than a stream makes in any run.
const ENDLESS: u32 = LONGEST;

impl Scale {
    /// What is measured with so many streams of 20 tokens a second.
    pub(super) fn all(crowd: u32) -> [Self; 4] {
        [
            Self::Many(crowd),
            Self::Few(crowd / 10),
            Self::Slow(crowd * 2),
            Self::Queued(crowd / 5 * 4),
        ]
    }

    /// What reports call it.
    pub(super) fn title(self) -> String {
        match self {
            Self::Many(streams) => format!("{streams} streams × 20 tokens/s"),
            Self::Few(streams) => format!("{streams} streams × 200 tokens/s"),
            Self::Slow(streams) => format!("{streams} streams × 1 token in 2 s"),
            Self::Queued(requests) => format!("{requests} queued requests"),
        }
    }

    /// The lanes that are measured. The floors have no queue, and would show no more of a machine's limits.
    pub(super) fn lanes(self) -> &'static [Lane] {
        match self {
            Self::Many(_) | Self::Few(_) | Self::Slow(_) => &[Lane::Grpc, Lane::Ndjson],
            Self::Queued(_) => &[Lane::Grpc],
        }
    }

    /// How many streams are open at once: those that wait, and before them the one that runs.
    fn streams(self) -> u32 {
        match self {
            Self::Many(streams) | Self::Few(streams) | Self::Slow(streams) => streams,
            Self::Queued(requests) => requests + 1,
        }
    }

    fn interval(self) -> Duration {
        match self {
            Self::Many(_) => Duration::from_millis(50),
            Self::Few(_) => Duration::from_millis(5),
            Self::Slow(_) => Duration::from_secs(2),
            Self::Queued(_) => Duration::from_millis(100),
        }
    }

    pub(super) fn sockets(self) -> Sockets {
        let sockets = Sockets::of(self.streams());
        match self {
            Self::Many(_) | Self::Few(_) | Self::Slow(_) => sockets,
            // So few that what waits is most of what the server holds.
            Self::Queued(_) => Sockets {
                sharing: 1_000,
                ..sockets
            },
        }
    }

    fn setup(self) -> Setup {
        let streams = usize::try_from(self.streams()).unwrap_or(usize::MAX);
        Setup {
            interval: self.interval(),
            slots: match self {
                Self::Many(_) | Self::Few(_) | Self::Slow(_) => streams,
                Self::Queued(_) => 1,
            },
            queue: streams,
        }
    }

    /// How long the streams' beginnings take.
    fn ramp(self) -> Duration {
        BEGINNINGS * self.streams()
    }

    /// How long after the first beginning every stream has had its first token.
    fn settled_after(self) -> Duration {
        self.ramp() + self.interval() + SETTLE
    }

    /// How long it is looked at, while all streams are open.
    fn window(self, size: Size) -> Duration {
        match self {
            Self::Many(_) | Self::Few(_) | Self::Queued(_) => size.window,
            // They are slow to begin, and their memory is no other after longer.
            Self::Slow(_) => size.window / 2,
        }
    }

    /// What is asked, so that all streams are open from when they have settled until they have been looked at.
    pub(super) fn load(self, size: Size) -> Load {
        let lasts = self.settled_after() + self.window(size) + SETTLE;
        let tokens = lasts.as_nanos().div_ceil(self.interval().as_nanos());
        Load {
            streams: self.streams(),
            requests: 1,
            tokens: match self {
                Self::Many(_) | Self::Few(_) | Self::Slow(_) => {
                    u32::try_from(tokens).expect("a run lasts minutes")
                }
                Self::Queued(_) => ENDLESS,
            },
            timed: true,
            spread: self.ramp(),
        }
    }

    /// A few streams of one token, so that a server's first steps are not taken for the streams' memory.
    pub(super) fn warm_up(self) -> Load {
        Load {
            streams: 8,
            requests: 1,
            tokens: 1,
            timed: true,
            spread: Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_ends_before_all_of_them_have_been_looked_at() {
        for size in [Size::QUICK, Size::WHOLE] {
            for scale in Scale::all(size.crowd) {
                let load = scale.load(size);
                // The last begins at the ramp's end, and the first ends after its tokens.
                let first_ends = scale.interval() * load.tokens;
                let looked_at = scale.settled_after() + scale.window(size);
                assert!(first_ends > looked_at, "{scale:?}");
                assert!(scale.settled_after() > load.spread + scale.interval());
            }
        }
    }

    #[test]
    fn few_streams_make_as_many_tokens_a_second_as_many_do() {
        let [many, few, ..] = Scale::all(Size::WHOLE.crowd);
        let rate = |scale: Scale| f64::from(scale.streams()) / scale.interval().as_secs_f64();
        assert_eq!(rate(many), rate(few));
    }
}
