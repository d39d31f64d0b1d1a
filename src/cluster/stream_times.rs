//! The timings of a completion. Its tokens may come from the streams of several engines, and each engine measures only
//! its own stream.

use tokio::time::Instant;

use crate::proto::v1;

/// The times that the gateway measures.
pub(super) struct StreamTimes {
    /// Time when the client's request arrived.
    arrived: Instant,
    /// Time when the last stream's request was sent.
    sent: Instant,
    /// Time when the client got the first token. `None` before that.
    first_token: Option<Instant>,
}

impl StreamTimes {
    pub(super) fn new(arrived: Instant, sent: Instant) -> Self {
        Self {
            arrived,
            sent,
            first_token: None,
        }
    }

    /// Records that the completion goes on with a stream whose request was sent at this time.
    pub(super) fn record_stream(&mut self, sent: Instant) {
        self.sent = sent;
    }

    /// Records that the client gets a token now. The clock is read only for the first one.
    pub(super) fn record_token(&mut self, now: impl FnOnce() -> Instant) {
        self.first_token.get_or_insert_with(now);
    }

    /// Returns the timings of the whole completion, which ends now. `engine` are those of the last stream, and
    /// `is_partial` is true if that stream did not have the whole completion, or if its engine reported none.
    pub(super) fn whole(&self, engine: v1::Timings, is_partial: bool, now: Instant) -> v1::Timings {
        let since_arrival = |then: Instant| nanoseconds(then - self.arrived);
        let before = since_arrival(self.sent);
        // An engine reports 0 for what it does not know, and for a completion without a token.
        let with_time_before = |engine: u64| match engine {
            0 => 0,
            time => time.saturating_add(before),
        };
        match is_partial {
            true => v1::Timings {
                // The first engine's stream broke before it reported this.
                queue_ns: 0,
                first_token_ns: self.first_token.map_or(0, since_arrival),
                total_ns: since_arrival(now),
                ..engine
            },
            false => v1::Timings {
                queue_ns: with_time_before(engine.queue_ns),
                first_token_ns: with_time_before(engine.first_token_ns),
                total_ns: with_time_before(engine.total_ns),
                ..engine
            },
        }
    }
}

fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ENGINE: v1::Timings = v1::Timings {
        queue_ns: 1,
        first_token_ns: 2,
        total_ns: 3,
        engine: None,
        frontend: None,
        socket: None,
        resumptions: 0,
        resumption_method: 0,
    };

    fn after(start: Instant, ns: u64) -> Instant {
        start + Duration::from_nanos(ns)
    }

    #[test]
    fn the_time_before_the_request_was_sent_to_an_engine_counts() {
        let start = Instant::now();
        let mut times = StreamTimes::new(start, after(start, 100));
        times.record_token(|| after(start, 102));
        let whole = times.whole(ENGINE, false, after(start, 110));
        assert_eq!(
            (whole.queue_ns, whole.first_token_ns, whole.total_ns),
            (101, 102, 103)
        );
        times.record_stream(after(start, 200));
        let engine = v1::Timings {
            queue_ns: 0,
            ..ENGINE
        };
        let whole = times.whole(engine, false, after(start, 210));
        assert_eq!((whole.queue_ns, whole.total_ns), (0, 203));
    }

    #[test]
    fn the_times_of_a_continued_completion_are_those_of_all_its_streams() {
        let start = Instant::now();
        let mut times = StreamTimes::new(start, after(start, 5));
        times.record_token(|| after(start, 20));
        times.record_stream(after(start, 50));
        times.record_token(|| after(start, 60));
        let whole = times.whole(ENGINE, true, after(start, 90));
        assert_eq!(
            (whole.queue_ns, whole.first_token_ns, whole.total_ns),
            (0, 20, 90)
        );
    }
}
