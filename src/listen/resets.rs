//! Rate limit on requests that an HTTP/2 client cancels (the rapid reset attack, CVE-2023-44487).
//!
//! h2 only limits the cancelled requests that it still holds. This module counts the frames that start and cancel
//! requests. It has two limits: a client that floods the connection with cancellations is disconnected, and a client
//! that cancels almost all of its requests for a long time is slowed down.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::frames::{FrameHeader, HEADERS, RST_STREAM};

/// Maximum number of cancellations at once. It exceeds the number of users that share one connection.
pub(super) const RESET_BURST: u32 = 5_000;

/// Time after which the budget grows by one cancellation.
const REFILL_INTERVAL: Duration = Duration::from_millis(1);

/// Time that each cancellation adds to the debt of a connection. The debt decreases as time passes, by one second per
/// second.
const RESET_COST: Duration = Duration::from_millis(10);

/// Time by which each new request reduces the debt. A client that cancels at most half of its requests has no lasting
/// debt; a client that cancels all of its requests may start and cancel 200 requests per second.
const REQUEST_CREDIT: Duration = Duration::from_millis(5);

/// Debt above which the connection is read more slowly: that of [`RESET_BURST`] cancellations of older requests, or of
/// twice as many requests that are started and cancelled.
const MAX_DEBT: Duration = Duration::from_secs(50);

/// Maximum number of cancelled streams to remember, so that each counts once. It is an upper bound on the cancelled
/// streams that may still have frames in flight.
const MAX_REMEMBERED_STREAMS: usize = 10_000;

/// GOAWAY frame with the error ENHANCE_YOUR_CALM. Its last stream id is the largest possible id, because this module
/// does not know which requests have started. A client therefore cannot assume that a request was not processed.
pub(super) const GO_AWAY_FRAME: &[u8; 17] =
    b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x0b";

/// The cancellations of one connection.
#[derive(Debug)]
pub(super) struct ResetLimit {
    /// The streams that were cancelled most recently. Some peers send another RST_STREAM for each late frame of a
    /// cancelled stream; these must not count again.
    cancelled: BTreeSet<u32>,
    /// The latest stream that the client has opened.
    last_opened: u32,
    /// Time at which the budget of cancellations at once is full again.
    full_at: Instant,
    /// Time at which the connection has paid off its debt.
    paid_at: Instant,
}

impl ResetLimit {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            cancelled: BTreeSet::new(),
            last_opened: 0,
            full_at: now,
            paid_at: now,
        }
    }

    /// Counts a frame. Returns false once the client has cancelled too many requests at once.
    pub(super) fn count(&mut self, frame: FrameHeader) -> bool {
        match frame.kind {
            // Later HEADERS frames of a stream are trailers.
            HEADERS if frame.stream > self.last_opened => {
                self.last_opened = frame.stream;
                let credited = self.paid_at.checked_sub(REQUEST_CREDIT);
                self.paid_at = credited.unwrap_or(self.paid_at);
                true
            }
            RST_STREAM if self.cancelled.insert(frame.stream) => {
                if self.cancelled.len() > MAX_REMEMBERED_STREAMS {
                    self.cancelled.pop_first();
                }
                let now = Instant::now();
                self.paid_at = self.paid_at.max(now) + RESET_COST;
                self.full_at = self.full_at.max(now) + REFILL_INTERVAL;
                self.full_at - now <= REFILL_INTERVAL * RESET_BURST
            }
            _ => true,
        }
    }

    /// Returns the time until which the connection must not be read, if its debt is too large.
    pub(super) fn pause_until(&self) -> Option<Instant> {
        let until = self.paid_at.checked_sub(MAX_DEBT)?;
        (until > Instant::now()).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::{FrameParser, HTTP2_PREFACE};
    use super::*;

    /// A connection's limit, and the parser of its frames.
    struct Connection {
        parser: FrameParser,
        limit: ResetLimit,
    }

    impl Connection {
        fn new(preface: &[u8]) -> Self {
            let mut connection = Self {
                parser: FrameParser::new(),
                limit: ResetLimit::new(),
            };
            assert!(connection.count(preface));
            connection
        }

        fn http2() -> Self {
            let connection =
                Self::new(&[&HTTP2_PREFACE[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat());
            assert!(connection.parser.is_http2());
            connection
        }

        /// Counts the cancellations in these bytes. Returns false if there were too many.
        fn count(&mut self, bytes: &[u8]) -> bool {
            let (mut is_allowed, limit) = (true, &mut self.limit);
            self.parser
                .parse(bytes, |frame| is_allowed &= limit.count(frame));
            is_allowed
        }
    }

    /// Makes two frames per stream: DATA, whose payload looks like a frame header, and RST_STREAM.
    fn cancellations(streams: std::ops::Range<u32>) -> Vec<u8> {
        let frames = |stream: u32| {
            let stream = stream.to_be_bytes();
            let data = [
                b"\x00\x00\x05\x00\x01",
                &stream[..],
                b"\x00\x00\x04\x03\x00",
            ]
            .concat();
            let reset = [b"\x00\x00\x04\x03\x00", &stream[..], b"\x00\x00\x00\x08"].concat();
            [data, reset].concat()
        };
        streams.flat_map(frames).collect()
    }

    /// Makes HEADERS frames that start these streams.
    fn requests(streams: std::ops::Range<u32>) -> Vec<u8> {
        let frame = |stream: u32| {
            let stream = stream.to_be_bytes();
            [b"\x00\x00\x01\x01\x05", &stream[..], b"\x82"].concat()
        };
        streams.flat_map(frame).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_allowed_again_after_the_budget_refills() {
        let mut connection = Connection::http2();
        assert!(connection.count(&cancellations(0..5_000)));
        assert!(!connection.count(&cancellations(5_000..5_001)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(connection.count(&cancellations(6_000..7_999)));
        assert!(!connection.count(&cancellations(8_000..8_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_resets_of_one_stream_count_once() {
        let mut connection = Connection::http2();
        for _ in 0..100 {
            assert!(connection.count(&cancellations(0..5_000)));
        }
        assert!(!connection.count(&cancellations(5_000..5_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_set_of_remembered_streams_is_bounded() {
        let mut connection = Connection::http2();
        connection.count(&cancellations(0..30_000));
        let cancelled = &connection.limit.cancelled;
        assert_eq!(cancelled.len(), MAX_REMEMBERED_STREAMS);
        assert!(!cancelled.contains(&0) && cancelled.contains(&29_999));
    }

    #[tokio::test(start_paused = true)]
    async fn resets_are_counted_across_read_boundaries() {
        let mut connection = Connection::http2();
        let bytes = cancellations(0..5_001);
        // The last RST_STREAM counts when its header ends, before its payload of four bytes.
        let (frames, last_payload) = bytes.split_at(bytes.len() - 4);
        let mut rejected = frames.chunks(7).filter(|piece| !connection.count(piece));
        assert!(rejected.next().is_some() && rejected.next().is_none());
        connection
            .parser
            .parse(last_payload, |frame| panic!("{frame:?}"));
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_of_a_connection_that_is_not_http2_are_not_counted() {
        let mut connection = Connection::new(b"PRINT / HTTP/1.1\r\n\r\n");
        assert!(!connection.parser.is_http2());
        assert!(connection.count(&cancellations(0..10_000)));
    }

    /// Cancels this number of requests per second for a minute, and starts `started` requests per second. Returns the
    /// number of seconds after which the connection was read more slowly, if it was.
    async fn slowed_after(started: u32, cancelled: u32) -> Option<u32> {
        let mut connection = Connection::http2();
        for second in 0..60 {
            let first = second * started;
            connection.count(&requests(first + 1..first + started + 1));
            let cancelled = cancellations(first + 1..first + cancelled + 1);
            assert!(connection.count(&cancelled), "the connection is closed");
            if connection.limit.pause_until().is_some() {
                return Some(second);
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_cancels_all_of_its_many_requests_is_slowed_down() {
        assert_eq!(slowed_after(1_000, 1_000).await, Some(11));
        assert_eq!(slowed_after(200, 200).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_completes_half_of_its_requests_is_not_slowed_down() {
        assert_eq!(slowed_after(2_000, 1_000).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slowed_connection_is_read_again_once_it_has_paid() {
        let mut connection = Connection::http2();
        assert!(connection.count(&cancellations(0..4_999)));
        assert_eq!(connection.limit.pause_until(), None);
        tokio::time::advance(Duration::from_millis(20)).await;
        assert!(connection.count(&cancellations(5_000..5_004)));
        let pause = connection.limit.pause_until().expect("a pause");
        assert_eq!(pause - Instant::now(), Duration::from_millis(10));
        tokio::time::advance(Duration::from_millis(10)).await;
        assert_eq!(connection.limit.pause_until(), None);
    }
}
