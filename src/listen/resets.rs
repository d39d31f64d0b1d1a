//! Bounds how many requests an HTTP/2 peer may cancel. h2 bounds only the cancelled requests that it
//! still holds, so the frames are counted here, as they come from the socket.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

/// The most requests that a peer may cancel at once: more than the users of one connection that several
/// services share.
pub(super) const RESET_BURST: u32 = 5_000;

/// The time after which a peer may cancel one more request: 1,000 a second, about 1% of a core.
const INTERVAL: Duration = Duration::from_millis(1);

/// The most cancelled streams that are remembered, so that none is counted twice: an upper bound of the cancelled
/// streams that may still have frames in flight.
const MAX_REMEMBERED_STREAMS: usize = 10_000;

/// The bytes that open every HTTP/2 connection.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The length of a frame's header, in bytes, and the type of the frame that cancels a stream.
const FRAME_HEADER: usize = 9;
const RST_STREAM: u8 = 3;

/// A GOAWAY frame with ENHANCE_YOUR_CALM. Its last stream is the largest of all: which requests were
/// begun is not known here, so a client must not take any of them for untouched.
pub(super) const GO_AWAY: &[u8; 17] =
    b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x0b";

/// The budget of a peer's cancelled requests, which is filled up again as time passes.
#[derive(Debug)]
pub(super) struct ResetLimit {
    frames: Frames,
    /// The streams that were cancelled last. A peer may send another RST_STREAM for each late frame of a stream that it
    /// has cancelled, and some do: a burst of cancellations would count many times over.
    cancelled: BTreeSet<u32>,
    /// The time at which the budget is full again.
    full_at: Instant,
}

/// The position of the next byte on the connection.
#[derive(Debug)]
enum Frames {
    /// So many bytes of the preface have come.
    Preface(usize),
    /// Within a frame's header, of which so many bytes have come.
    Header([u8; FRAME_HEADER], usize),
    /// So many bytes of a frame's payload are still to come.
    Payload(usize),
    /// The connection is HTTP/1.1 or encrypted.
    None,
}

impl ResetLimit {
    pub(super) fn new() -> Self {
        Self {
            frames: Frames::Preface(0),
            cancelled: BTreeSet::new(),
            full_at: Instant::now(),
        }
    }

    /// Whether the peer has opened the connection with HTTP/2's preface.
    pub(super) fn is_http2(&self) -> bool {
        matches!(self.frames, Frames::Header(..) | Frames::Payload(_))
    }

    /// Counts the requests that are cancelled in the next bytes of the connection; false once there are
    /// too many.
    pub(super) fn allows(&mut self, bytes: &[u8]) -> bool {
        let (frames, cancelled) = (&mut self.frames, &mut self.cancelled);
        let mut count = 0;
        frames.resets(bytes, |stream| {
            count += u32::from(cancelled.insert(stream));
            if cancelled.len() > MAX_REMEMBERED_STREAMS {
                cancelled.pop_first();
            }
        });
        if count == 0 {
            return true;
        }
        let now = Instant::now();
        self.full_at = self.full_at.max(now) + INTERVAL * count;
        self.full_at - now <= INTERVAL * RESET_BURST
    }
}

impl Frames {
    /// Passes on the stream of each RST_STREAM frame whose header ends in these bytes.
    fn resets(&mut self, mut bytes: &[u8], mut reset: impl FnMut(u32)) {
        while let Some((&first, rest)) = bytes.split_first() {
            match self {
                Self::None => return,
                Self::Preface(seen) => {
                    bytes = rest;
                    *self = match (PREFACE.get(*seen) == Some(&first), *seen + 1) {
                        (false, _) => Self::None,
                        (true, seen) if seen == PREFACE.len() => Self::header(),
                        (true, seen) => Self::Preface(seen),
                    };
                }
                Self::Header(header, seen) => {
                    bytes = rest;
                    header[*seen] = first;
                    *seen += 1;
                    if *seen == FRAME_HEADER {
                        let [high, middle, low, kind, _flags, stream @ ..] = *header;
                        if kind == RST_STREAM {
                            reset(u32::from_be_bytes(stream));
                        }
                        let length = u32::from_be_bytes([0, high, middle, low]);
                        *self = Self::payload(usize::try_from(length).unwrap_or(usize::MAX));
                    }
                }
                Self::Payload(left) => {
                    let passed = bytes.len().min(*left);
                    bytes = &bytes[passed..];
                    *self = Self::payload(*left - passed);
                }
            }
        }
    }

    fn header() -> Self {
        Self::Header([0; FRAME_HEADER], 0)
    }

    fn payload(left: usize) -> Self {
        if left == 0 {
            Self::header()
        } else {
            Self::Payload(left)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each of these streams a DATA frame, whose payload looks like a frame's header, and its cancellation.
    fn cancelled(streams: std::ops::Range<u32>) -> Vec<u8> {
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

    fn opened() -> ResetLimit {
        let mut limit = ResetLimit::new();
        assert!(limit.allows(PREFACE));
        assert!(limit.allows(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"));
        assert!(limit.is_http2());
        limit
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_allowed_again_after_the_budget_refills() {
        let mut limit = opened();
        assert!(limit.allows(&cancelled(0..5_000)));
        assert!(!limit.allows(&cancelled(5_000..5_001)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(limit.allows(&cancelled(6_000..7_999)));
        assert!(!limit.allows(&cancelled(8_000..8_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_resets_of_one_stream_count_once() {
        let mut limit = opened();
        for _ in 0..100 {
            assert!(limit.allows(&cancelled(0..5_000)));
        }
        assert!(!limit.allows(&cancelled(5_000..5_001)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_set_of_remembered_streams_is_bounded() {
        let mut limit = opened();
        limit.allows(&cancelled(0..30_000));
        assert_eq!(limit.cancelled.len(), MAX_REMEMBERED_STREAMS);
        assert!(!limit.cancelled.contains(&0) && limit.cancelled.contains(&29_999));
    }

    #[tokio::test(start_paused = true)]
    async fn resets_are_counted_across_read_boundaries() {
        let mut limit = opened();
        let bytes = cancelled(0..5_001);
        // The last frame counts from its header on, which ends before its payload of four bytes.
        let (whole, payload) = bytes.split_at(bytes.len() - 4);
        let mut refused = whole.chunks(7).filter(|piece| !limit.allows(piece));
        assert!(refused.next().is_some() && refused.next().is_none());
        limit
            .frames
            .resets(payload, |stream| panic!("a reset of {stream}"));
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_of_a_connection_that_is_not_http2_are_not_counted() {
        let mut limit = ResetLimit::new();
        assert!(limit.allows(b"PRINT / HTTP/1.1\r\n\r\n"));
        assert!(!limit.is_http2());
        assert!(limit.allows(&cancelled(0..10_000)));
    }
}
