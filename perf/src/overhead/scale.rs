//! Loads of thousands of streams, and of thousands of requests that wait, with the servers that they need.

use std::time::Duration;

use super::path::MeasuredPath;
use super::scenario::{LONGEST, Size};
use crate::load::{Load, Sockets};
use crate::serve::{self, Role};

mod turn;

pub(super) use turn::turn;

/// Many streams or requests at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Scale {
    pub(super) shape: Shape,
    /// Number of streams, or of queued requests.
    pub(super) size: u32,
}

/// Shape of a load of many streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Shape {
    /// Streams of 20 tokens a second.
    Many,
    /// Streams of 200 tokens a second. A tenth of [`Shape::Many`]'s make as many tokens a second, so the
    /// difference in cost is due to the number of streams alone: with fewer tokens a second each would cost
    /// more, because fewer are processed at once.
    Few,
    /// Streams of one token in two seconds.
    Slow,
    /// gRPC requests that wait for the only slot.
    Queued,
}

/// Time between two starts. A client that connects and sends requests faster than a server on two cores can
/// answer measures the storm, not the streams.
const START_INTERVAL: Duration = Duration::from_micros(400);

/// Time for which all streams run before the window, and after it.
const SETTLE: Duration = Duration::from_millis(300);

/// More tokens than a stream makes in any run.
const ENDLESS: u32 = LONGEST;

impl Scale {
    /// Loads that are measured, for a number of streams of 20 tokens a second.
    pub(super) fn all(crowd: u32) -> [Self; 4] {
        let of = |shape, size| Self { shape, size };
        [
            of(Shape::Many, crowd),
            of(Shape::Few, crowd / 10),
            of(Shape::Slow, crowd * 2),
            of(Shape::Queued, crowd / 5 * 4),
        ]
    }

    /// Name in reports.
    pub(super) fn title(self) -> String {
        let size = self.size;
        match self.shape {
            Shape::Many => format!("{size} streams × 20 tokens/s"),
            Shape::Few => format!("{size} streams × 200 tokens/s"),
            Shape::Slow => format!("{size} streams × 1 token in 2 s"),
            Shape::Queued => format!("{size} queued requests"),
        }
    }

    /// Paths that are measured. The floors have no queue, and would show only the machine's limits again.
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

    /// Streams that are open at once: those that wait, and the one that runs.
    fn streams(self) -> u32 {
        self.size + u32::from(self.is_queue())
    }

    fn interval(self) -> Duration {
        Duration::from_millis(match self.shape {
            Shape::Many => 50,
            Shape::Few => 5,
            Shape::Slow => 2_000,
            Shape::Queued => 100,
        })
    }

    pub(super) fn sockets(self) -> Sockets {
        let sockets = Sockets::of(self.streams());
        if !self.is_queue() {
            return sockets;
        }
        // So few connections that the waiting requests are most of the server's memory.
        Sockets {
            sharing: 1_000,
            ..sockets
        }
    }

    /// Configuration of its servers.
    fn servers(self) -> serve::Options {
        let streams = usize::try_from(self.streams()).unwrap_or(usize::MAX);
        let slots = if self.is_queue() { 1 } else { streams };
        serve::Options::new(Role::Product, self.interval(), slots, streams)
    }

    /// Time that the starts of all streams take.
    fn ramp(self) -> Duration {
        START_INTERVAL * self.streams()
    }

    /// Time from the first start until every stream has had its first token.
    fn settled_after(self) -> Duration {
        self.ramp() + self.interval() + SETTLE
    }

    /// Length of the window in which all streams are open and measured.
    fn window(self, size: Size) -> Duration {
        match self.shape {
            Shape::Many | Shape::Few | Shape::Queued => size.window,
            // These start slowly, and a longer window would not change their memory.
            Shape::Slow => size.window / 2,
        }
    }

    /// Load under which all streams are open from the time at which they have settled to the window's end.
    pub(super) fn load(self, size: Size) -> Load {
        let lasts = self.settled_after() + self.window(size) + SETTLE;
        let tokens = lasts.as_nanos().div_ceil(self.interval().as_nanos());
        let tokens = if self.is_queue() {
            ENDLESS
        } else {
            u32::try_from(tokens).expect("a run lasts minutes")
        };
        Load {
            timed: true,
            spread: self.ramp(),
            ..Load::of_test_runner(self.streams(), tokens)
        }
    }

    /// A few streams of one token, so that the server's first allocations are not counted as the streams'.
    pub(super) fn warm_up(self) -> Load {
        Load::of_test_runner(8, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_ends_before_the_windows_end() {
        for size in [Size::QUICK, Size::WHOLE] {
            for scale in Scale::all(size.crowd) {
                let load = scale.load(size);
                // The last stream starts at the ramp's end, and the first ends after its tokens.
                let first_ends = scale.interval() * load.tokens;
                let window_ends = scale.settled_after() + scale.window(size);
                assert!(first_ends > window_ends, "{scale:?}");
                assert!(scale.settled_after() > load.spread + scale.interval());
            }
        }
    }

    #[test]
    fn few_streams_make_as_many_tokens_a_second_as_many() {
        let [many, few, ..] = Scale::all(Size::WHOLE.crowd);
        let rate = |scale: Scale| f64::from(scale.streams()) / scale.interval().as_secs_f64();
        assert_eq!(rate(many), rate(few));
    }
}
