//! Parses the frame headers of an HTTP/2 connection from the bytes that are read from its socket, because h2 does not
//! expose the frames that it reads. The parser skips the payloads.

/// Client connection preface (RFC 9113, section 3.4).
pub(super) const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length of a frame header, in bytes (RFC 9113, section 4.1).
const FRAME_HEADER_BYTES: usize = 9;

/// Types of frames (RFC 9113, section 6).
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;

/// Flag of the last HEADERS or CONTINUATION frame of a header block.
const END_HEADERS: u8 = 4;

/// A frame header without its length.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameHeader {
    pub(super) kind: u8,
    flags: u8,
    pub(super) stream: u32,
}

/// Parser of one connection's frames.
#[derive(Debug)]
pub(super) struct FrameParser {
    position: Position,
    /// Number of header blocks that have started.
    header_blocks: u64,
    is_in_header_block: bool,
}

/// The position of the next byte within the connection's HTTP/2 frames.
#[derive(Debug)]
enum Position {
    /// Within the preface; the number of bytes read so far.
    Preface(usize),
    /// Within a frame header; its bytes, and how many have been read so far.
    Header([u8; FRAME_HEADER_BYTES], usize),
    /// Within a frame payload; the frame, and the number of bytes that remain.
    Payload(FrameHeader, usize),
    /// The connection is HTTP/1.1, or its frames are encrypted. Nothing is parsed.
    Opaque,
}

impl FrameParser {
    pub(super) fn new() -> Self {
        Self {
            position: Position::Preface(0),
            header_blocks: 0,
            is_in_header_block: false,
        }
    }

    /// Returns true once the peer has sent the HTTP/2 preface.
    pub(super) fn is_http2(&self) -> bool {
        matches!(self.position, Position::Header(..) | Position::Payload(..))
    }

    /// Returns true if a request's headers have started and are incomplete.
    pub(super) fn is_in_header_block(&self) -> bool {
        self.is_in_header_block
    }

    /// Returns the number of header blocks that have started.
    pub(super) fn header_blocks(&self) -> u64 {
        self.header_blocks
    }

    /// Parses newly read bytes. Calls `on_frame` for each frame whose header is complete.
    pub(super) fn parse(&mut self, mut bytes: &[u8], mut on_frame: impl FnMut(FrameHeader)) {
        while let Some((&first, rest)) = bytes.split_first() {
            match &mut self.position {
                Position::Opaque => return,
                Position::Preface(seen) => {
                    bytes = rest;
                    self.position = match (HTTP2_PREFACE.get(*seen) == Some(&first), *seen + 1) {
                        (false, _) => Position::Opaque,
                        (true, seen) if seen == HTTP2_PREFACE.len() => Position::start_header(),
                        (true, seen) => Position::Preface(seen),
                    };
                }
                Position::Header(header, seen) => {
                    bytes = rest;
                    header[*seen] = first;
                    *seen += 1;
                    if *seen == FRAME_HEADER_BYTES {
                        let [high, middle, low, kind, flags, stream @ ..] = *header;
                        let length = u32::from_be_bytes([0, high, middle, low]);
                        let length = usize::try_from(length).unwrap_or(usize::MAX);
                        let stream = u32::from_be_bytes(stream);
                        let frame = FrameHeader {
                            kind,
                            flags,
                            stream,
                        };
                        self.start_frame(frame);
                        on_frame(frame);
                        self.skip_payload(frame, length);
                    }
                }
                Position::Payload(frame, left) => {
                    let skipped = bytes.len().min(*left);
                    bytes = &bytes[skipped..];
                    let (frame, left) = (*frame, *left - skipped);
                    self.skip_payload(frame, left);
                }
            }
        }
    }

    fn start_frame(&mut self, frame: FrameHeader) {
        if frame.kind == HEADERS {
            self.header_blocks += 1;
            self.is_in_header_block = true;
        }
    }

    fn skip_payload(&mut self, frame: FrameHeader, left: usize) {
        if left > 0 {
            self.position = Position::Payload(frame, left);
            return;
        }
        self.position = Position::start_header();
        if matches!(frame.kind, HEADERS | CONTINUATION) && frame.flags & END_HEADERS != 0 {
            self.is_in_header_block = false;
        }
    }
}

impl Position {
    fn start_header() -> Self {
        Self::Header([0; FRAME_HEADER_BYTES], 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_block_lasts_until_its_last_frame_is_complete() {
        let mut parser = FrameParser::new();
        let mut feed = |bytes: &[u8]| {
            parser.parse(bytes, |_| {});
            parser.is_in_header_block()
        };
        assert!(!feed(HTTP2_PREFACE));
        assert!(!feed(b"\0\0\0\x04\0\0\0\0\0"), "SETTINGS");
        assert!(feed(b"\0\0\x02\x01\0\0\0\0\x01"), "HEADERS");
        assert!(feed(b"\x82\x84"), "the payload, without END_HEADERS");
        assert!(feed(b"\0\0\x02\x09\x04\0\0\0\x01\x86"), "CONTINUATION");
        assert!(!feed(b"\x87"), "the rest of its payload");
        assert!(!feed(b"\0\0\x01\x01\x04\0\0\0\x03\x82"), "HEADERS alone");
        assert_eq!(parser.header_blocks(), 2);
    }
}
