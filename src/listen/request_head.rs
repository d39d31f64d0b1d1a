//! Checks the heads of HTTP/1.1 requests for two faults that hyper accepts.
//!
//! hyper accepts a bare LF as the end of a line, and ignores `Content-Length` beside `Transfer-Encoding`. A proxy in
//! front may interpret such a head differently, so that proxy and server disagree about where the request ends (request
//! smuggling). hyper has no setting for either fault, and does not expose the bytes of a head, so this module scans the
//! bytes as they are read from the socket.

use memchr::memchr;

/// Names of the headers that say where a body ends, in lower case.
const CONTENT_LENGTH: &[u8] = b"content-length:";
const TRANSFER_ENCODING: &[u8] = b"transfer-encoding:";

/// Number of bytes to keep of each line: the longer of the names.
const PREFIX_BYTES: usize = TRANSFER_ENCODING.len();

/// A fault in the head of an HTTP/1.1 request. The connection adds it to the request as an extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MalformedHead {
    /// A line ends with LF instead of CR LF.
    BareLineFeed,
    /// The head has `Content-Length` and `Transfer-Encoding`.
    LengthAndEncoding,
}

/// Scans one head at a time, from bytes that may arrive in pieces of any size.
#[derive(Debug, Default)]
pub(super) struct HeadScanner(Option<Head>);

/// The head that is being scanned.
#[derive(Debug, Default)]
struct Head {
    line: Line,
    has_request_line: bool,
    has_length: bool,
    has_encoding: bool,
    has_bare_line_feed: bool,
}

/// The line that is being scanned.
#[derive(Debug, Default)]
struct Line {
    /// First bytes of the line, in lower case.
    prefix: [u8; PREFIX_BYTES],
    length: usize,
    last: u8,
}

impl HeadScanner {
    /// Returns true if the bytes so far end within a head.
    pub(super) fn is_in_head(&self) -> bool {
        self.0.is_some()
    }

    /// Scans newly read bytes. They continue the current head, or start a new one. Returns the result once the head is
    /// complete; ignores the bytes after it.
    pub(super) fn scan(&mut self, mut bytes: &[u8]) -> Option<Result<(), MalformedHead>> {
        let head = self.0.get_or_insert_default();
        while let Some(end) = memchr(b'\n', bytes) {
            head.line.add(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if head.end_line() {
                let result = head.result();
                self.0 = None;
                return Some(result);
            }
        }
        head.line.add(bytes);
        None
    }
}

impl Head {
    /// Ends the line. Returns true if the head is complete.
    fn end_line(&mut self) -> bool {
        let line = std::mem::take(&mut self.line);
        let is_bare = line.last != b'\r';
        let is_empty = line.length == usize::from(!is_bare);
        // A client may send empty lines before a request (RFC 9112, section 2.2).
        if is_empty && !self.has_request_line {
            return false;
        }
        self.has_request_line = true;
        self.has_bare_line_feed |= is_bare;
        self.has_length |= line.prefix.starts_with(CONTENT_LENGTH);
        self.has_encoding |= line.prefix.starts_with(TRANSFER_ENCODING);
        is_empty
    }

    fn result(&self) -> Result<(), MalformedHead> {
        if self.has_bare_line_feed {
            return Err(MalformedHead::BareLineFeed);
        }
        if self.has_length && self.has_encoding {
            return Err(MalformedHead::LengthAndEncoding);
        }
        Ok(())
    }
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        if let Some(free) = self.prefix.get_mut(self.length..) {
            for (free, byte) in free.iter_mut().zip(bytes) {
                *free = byte.to_ascii_lowercase();
            }
        }
        self.length += bytes.len();
        self.last = bytes.last().copied().unwrap_or(self.last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans a head in pieces of each size. The result must not depend on the size.
    fn scan(head: &str) -> Option<Result<(), MalformedHead>> {
        let results = (1..=head.len()).map(|size| {
            let mut scanner = HeadScanner::default();
            let mut pieces = head.as_bytes().chunks(size);
            let result = pieces.find_map(|piece| scanner.scan(piece));
            assert_eq!(scanner.is_in_head(), result.is_none());
            result
        });
        let mut results: Vec<_> = results.collect();
        results.dedup();
        assert_eq!(results.len(), 1, "{head:?}");
        results[0]
    }

    #[test]
    fn a_head_with_correct_line_ends_and_one_framing_is_accepted() {
        for head in [
            "GET / HTTP/1.1\r\n\r\n",
            "\r\n\nPOST / HTTP/1.1\r\nhost: a\r\nContent-Length: 3\r\n\r\na\nb",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nx: content-length: 3\r\n\r\n",
        ] {
            assert_eq!(scan(head), Some(Ok(())), "{head:?}");
        }
    }

    #[test]
    fn a_bare_line_feed_in_any_line_is_found() {
        for head in [
            "GET / HTTP/1.1\nhost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\r\n\n",
        ] {
            assert_eq!(
                scan(head),
                Some(Err(MalformedHead::BareLineFeed)),
                "{head:?}"
            );
        }
    }

    #[test]
    fn a_length_beside_a_transfer_encoding_is_found_in_any_case_and_order() {
        for head in [
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nTRANSFER-ENCODING: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding:chunked\r\nx: y\r\nCONTENT-LENGTH:3\r\n\r\n",
        ] {
            let expected = Some(Err(MalformedHead::LengthAndEncoding));
            assert_eq!(scan(head), expected, "{head:?}");
        }
    }

    #[test]
    fn an_incomplete_head_has_no_result() {
        assert_eq!(scan("GET / HTTP/1.1\r\nhost: a\r\n\r"), None);
    }
}
