//! Rate limit on requests that an HTTP/2 client cancels (the rapid reset attack, CVE-2023-44487).
//!
//! h2 only limits the cancelled requests that it still holds. This module counts the RST_STREAM frames in the bytes
//! that are read from the socket.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

/// Maximum number of cancellations at once. It exceeds the number of users that share one connection.
pub(super) const RESET_BURST: u32 = 5_000;

/// Time after which the budget grows by one cancellation. 1,000 cancellations per second cost about 1% of a core.
const REFILL_INTERVAL: Duration = Duration::from_millis(1);

/// Maximum number of cancelled streams to remember, so that each counts once. It is an upper bound on the cancelled
/// streams that may still have frames in flight.
const MAX_REMEMBERED_STREAMS: usize = 10_000;

/// Client connection preface (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length of a frame header, in bytes (RFC 9113, section 4.1).
const FRAME_HEADER_BYTES: usize = 9;

/// Type of the frame that cancels a stream (RFC 9113, section 6.4).
const RST_STREAM: u8 = 3;

/// GOAWAY frame with the error ENHANCE_YOUR_CALM. Its last stream id is the largest possible id, because this module
/// does not know which requests have started. A client therefore cannot assume that a request was not processed.
pub(super) const GO_AWAY_FRAME: &[u8; 17] =
    b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x0b";

/// Number of cancellations that one connection may still make. The number grows over time, like a token bucket.
#[derive(Debug)]
pub(super) struct ResetLimit {
    parser: FrameParser,
    /// The streams that were cancelled most recently. Some peers send another RST_STREAM for each late frame of a
    /// cancelled stream; these must not count again.
    cancelled: BTreeSet<u32>,
    /// Time at which the budget is full again.
    full_at: Instant,
}

/// State of the parser: the position of the next byte within the connection's HTTP/2 frames.
#[derive(Debug)]
enum FrameParser {
    /// Within the preface; the number of bytes read so far.
    Preface(usize),
    /// Within a frame header; its bytes, and how many have been read so far.
    Header([u8; FRAME_HEADER_BYTES], usize),
    /// Within a frame payload; the number of bytes that remain.
    Payload(usize),
    /// The connection is HTTP/1.1, or its frames are encrypted. Nothing is counted.
    Opaque,
}

impl ResetLimit {
    pub(super) fn new() -> Self {
        Self {
            parser: FrameParser::Preface(0),
            cancelled: BTreeSet::new(),
            full_at: Instant::now(),
        }
    }

    /// Returns true once the peer has sent the HTTP/2 preface.
    pub(super) fn is_http2(&self) -> bool {
        matches!(
            self.parser,
            FrameParser::Header(..) | FrameParser::Payload(_)
        )
    }

    /// Counts the cancellations in newly read bytes. Returns false once the budget is exceeded.
    pub(super) fn count_resets(&mut self, bytes: &[u8]) -> bool {
        let (parser, cancelled) = (&mut self.parser, &mut self.cancelled);
        let mut count = 0;
        parser.parse(bytes, |stream| {
            count += u32::from(cancelled.insert(stream));
            if cancelled.len() > MAX_REMEMBERED_STREAMS {
                cancelled.pop_first();
            }
        });
        if count == 0 {
            return true;
        }
        let now = Instant::now();
        self.full_at = self.full_at.max(now) + REFILL_INTERVAL * count;
        self.full_at - now <= REFILL_INTERVAL * RESET_BURST
    }
}

impl FrameParser {
    /// Parses newly read bytes. Calls `on_reset` with the stream id of each RST_STREAM frame whose header is
    /// complete.
    fn parse(&mut self, mut bytes: &[u8], mut on_reset: impl FnMut(u32)) {
        while let Some((&first, rest)) = bytes.split_first() {
            match self {
                Self::Opaque => return,
                Self::Preface(seen) => {
                    bytes = rest;
                    *self = match (HTTP2_PREFACE.get(*seen) == Some(&first), *seen + 1) {
                        (false, _) => Self::Opaque,
                        (true, seen) if seen == HTTP2_PREFACE.len() => Self::start_header(),
                        (true, seen) => Self::Preface(seen),
                    };
                }
                Self::Header(header, seen) => {
                    bytes = rest;
                    header[*seen] = first;
                    *seen += 1;
                    if *seen == FRAME_HEADER_BYTES {
                        let [high, middle, low, kind, _flags, stream @ ..] = *header;
                        if kind == RST_STREAM {
                            on_reset(u32::from_be_bytes(stream));
                        }
                        let length = u32::from_be_bytes([0, high, middle, low]);
                        *self = Self::skip_payload(usize::try_from(length).unwrap_or(usize::MAX));
                    }
                }
                Self::Payload(left) => {
                    let skipped = bytes.len().min(*left);
                    bytes = &bytes[skipped..];
                    *self = Self::skip_payload(*left - skipped);
                }
            }
        }
    }

    fn start_header() -> Self {
        Self::Header([0; FRAME_HEADER_BYTES], 0)
    }

    fn skip_payload(left: usize) -> Self {
        if left == 0 {
            Self::start_header()
        } else {
            Self::Payload(left)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn http2_connection() -> ResetLimit {
        let mut limit = ResetLimit::new();
        assert!(limit.count_resets(HTTP2_PREFACE));
        assert!(limit.count_resets(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"));
        assert!(limit.is_http2());
        limit
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_allowed_again_after_the_budget_refills() {
        let mut limit = http2_connection();
        assert!(limit.count_resets(&cancellations(0..5_000)));
        assert!(!limit.count_resets(&cancellations(5_000..5_001)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(limit.count_resets(&cancellations(6_000..7_999)));
        assert!(!limit.count_resets(&cancellations(8_000..8_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_resets_of_one_stream_count_once() {
        let mut limit = http2_connection();
        for _ in 0..100 {
            assert!(limit.count_resets(&cancellations(0..5_000)));
        }
        assert!(!limit.count_resets(&cancellations(5_000..5_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_set_of_remembered_streams_is_bounded() {
        let mut limit = http2_connection();
        limit.count_resets(&cancellations(0..30_000));
        assert_eq!(limit.cancelled.len(), MAX_REMEMBERED_STREAMS);
        assert!(!limit.cancelled.contains(&0) && limit.cancelled.contains(&29_999));
    }

    #[tokio::test(start_paused = true)]
    async fn resets_are_counted_across_read_boundaries() {
        let mut limit = http2_connection();
        let bytes = cancellations(0..5_001);
        // The last RST_STREAM counts when its header ends, before its payload of four bytes.
        let (frames, last_payload) = bytes.split_at(bytes.len() - 4);
        let mut rejected = frames.chunks(7).filter(|piece| !limit.count_resets(piece));
        assert!(rejected.next().is_some() && rejected.next().is_none());
        limit.parser.parse(last_payload, |stream| {
            panic!("stream {stream} was counted as reset")
        });
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_of_a_connection_that_is_not_http2_are_not_counted() {
        let mut limit = ResetLimit::new();
        assert!(limit.count_resets(b"PRINT / HTTP/1.1\r\n\r\n"));
        assert!(!limit.is_http2());
        assert!(limit.count_resets(&cancellations(0..10_000)));
    }
}
