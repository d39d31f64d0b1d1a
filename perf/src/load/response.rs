//! Parses an HTTP/1.1 response that arrives in pieces of any size: its head, and its body in any framing of RFC 9112,
//! section 6. Bodies are passed on without being interpreted.

use std::mem::take;

use httparse::{EMPTY_HEADER, Status, parse_chunk_size, parse_headers};

use crate::fault::Fault;

/// Limits of a response head: its size in bytes, and its number of headers.
const LONGEST_HEAD: usize = 64 * 1024;
const MOST_HEADERS: usize = 128;
/// Maximum number of body bytes that the error for a refusal shows.
const LONGEST_REFUSAL: usize = 1024;

/// Parser of one response.
pub(crate) struct ResponseParser {
    framing: ParseState,
    /// Bytes of a head, a chunk size or a trailer that has not arrived completely.
    unparsed: Vec<u8>,
    refusal: Option<Refusal>,
    closes: bool,
}

/// The part of a response that the next bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParseState {
    Head,
    ChunkSize,
    /// A chunk, with the number of its bytes that are still to come.
    Chunk(usize),
    ChunkEnd,
    Trailer,
    /// The body, with the number of its bytes that are still to come.
    Length(usize),
    /// A body that ends when the connection closes.
    UntilClose,
    Ended,
}

/// A response whose status is not 200.
struct Refusal {
    status: String,
    /// First bytes of the response body.
    body: Vec<u8>,
}

/// Length of a complete part, in bytes, and the part that follows it. `None` if the part is not complete.
type ParsedPart = Option<(usize, ParseState)>;

impl ResponseParser {
    pub(crate) fn new() -> Self {
        Self {
            framing: ParseState::Head,
            unparsed: Vec::new(),
            refusal: None,
            closes: false,
        }
    }

    /// Creates the parser of a response over a raw socket, which has no head. Only the consumer knows its end.
    pub(crate) fn without_head() -> Self {
        Self {
            framing: ParseState::UntilClose,
            ..Self::new()
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.framing == ParseState::Ended
    }

    /// Returns true if the server accepts another request on the connection.
    pub(crate) fn keeps_connection(&self) -> bool {
        !self.closes
    }

    /// Reads the next piece, and passes the parts of the body to `consume`.
    /// Returns the errors of `consume`, an error if the response is not HTTP/1.1, and one at the end of a refusal.
    pub(crate) fn parse_piece(
        &mut self,
        mut piece: &[u8],
        mut consume: impl FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        while !piece.is_empty() {
            match self.framing {
                ParseState::Chunk(left) | ParseState::Length(left) => {
                    let (data, rest) = piece.split_at(left.min(piece.len()));
                    self.data(data, &mut consume)?;
                    piece = rest;
                    self.framing = match (self.framing, left - data.len()) {
                        (ParseState::Chunk(_), 0) => ParseState::ChunkEnd,
                        (ParseState::Chunk(_), left) => ParseState::Chunk(left),
                        (_, left) => framing_of_length(left),
                    };
                }
                ParseState::UntilClose => {
                    self.data(piece, &mut consume)?;
                    piece = &[];
                }
                ParseState::Head => piece = self.parse(piece, Self::parse_head)?,
                ParseState::ChunkSize => piece = self.parse(piece, Self::parse_chunk_size)?,
                ParseState::ChunkEnd => piece = self.parse(piece, Self::parse_chunk_end)?,
                ParseState::Trailer => piece = self.parse(piece, Self::skip_trailer)?,
                ParseState::Ended => {
                    return Err(Fault::malformed("data after the response's end", piece));
                }
            }
        }
        if self.has_ended() {
            self.check_refusal()
        } else {
            Ok(())
        }
    }

    /// Handles the end of the connection, which also ends a response without a declared length.
    /// Returns an error if the response is a refusal.
    pub(crate) fn handle_close(&mut self) -> Result<(), Fault> {
        if self.framing == ParseState::UntilClose {
            self.framing = ParseState::Ended;
        }
        self.check_refusal()
    }

    fn data(
        &mut self,
        data: &[u8],
        consume: &mut impl FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        match &mut self.refusal {
            None => consume(data),
            Some(Refusal { body, .. }) => {
                let room = LONGEST_REFUSAL.saturating_sub(body.len());
                body.extend_from_slice(&data[..room.min(data.len())]);
                Ok(())
            }
        }
    }

    fn check_refusal(&mut self) -> Result<(), Fault> {
        let Some(Refusal { status, body }) = self.refusal.take() else {
            return Ok(());
        };
        let body = String::from_utf8_lossy(&body);
        Err(Fault::Refused(match body.trim() {
            "" => status,
            body => format!("{status}: {body}"),
        }))
    }

    /// Parses a part that may have started in an earlier piece. Returns the rest of this piece.
    fn parse<'a>(
        &mut self,
        piece: &'a [u8],
        part: fn(&mut Self, &[u8]) -> Result<ParsedPart, Fault>,
    ) -> Result<&'a [u8], Fault> {
        let mut unparsed = take(&mut self.unparsed);
        let before = unparsed.len();
        let parsed = if before == 0 {
            part(self, piece)?
        } else {
            unparsed.extend_from_slice(piece);
            part(self, &unparsed)?
        };
        if let Some((length, framing)) = parsed {
            self.framing = framing;
            return Ok(&piece[length - before..]);
        }
        if before == 0 {
            unparsed.extend_from_slice(piece);
        }
        if unparsed.len() > LONGEST_HEAD {
            let start = &unparsed[..LONGEST_REFUSAL];
            return Err(Fault::malformed("a head without an end", start));
        }
        self.unparsed = unparsed;
        Ok(&[])
    }

    fn parse_head(&mut self, bytes: &[u8]) -> Result<ParsedPart, Fault> {
        let mut headers = [EMPTY_HEADER; MOST_HEADERS];
        let mut head = httparse::Response::new(&mut headers);
        let parsed = head.parse(bytes);
        let parsed = parsed.map_err(|error| Fault::malformed(&error.to_string(), bytes))?;
        let (Status::Complete(end), Some(code)) = (parsed, head.code) else {
            return Ok(None);
        };
        if code / 100 == 1 {
            return Ok(Some((end, ParseState::Head)));
        }
        self.closes = head.version != Some(1);
        if code != 200 {
            self.refusal = Some(Refusal {
                status: format!("{code} {}", head.reason.unwrap_or_default()),
                body: Vec::new(),
            });
        }
        let (mut is_chunked, mut length) = (false, None);
        for header in head.headers.iter() {
            let value = String::from_utf8_lossy(header.value).to_ascii_lowercase();
            match header.name.to_ascii_lowercase().as_str() {
                "transfer-encoding" if value == "chunked" => is_chunked = true,
                "content-length" if length.as_ref().is_none_or(|known| *known == value) => {
                    length = Some(value);
                }
                "transfer-encoding" | "content-length" | "content-encoding"
                    if value != "identity" =>
                {
                    return Err(Fault::malformed("an unknown coding of the body", bytes));
                }
                "connection" => self.closes |= value.split(',').any(|of| of.trim() == "close"),
                _ => {}
            }
        }
        let framing = match length {
            _ if code == 204 || code == 304 => ParseState::Ended,
            _ if is_chunked => ParseState::ChunkSize,
            Some(length) => framing_of_length(parse_content_length(&length)?),
            None => {
                self.closes = true;
                ParseState::UntilClose
            }
        };
        Ok(Some((end, framing)))
    }

    fn parse_chunk_size(&mut self, bytes: &[u8]) -> Result<ParsedPart, Fault> {
        match parse_chunk_size(bytes) {
            Ok(Status::Partial) => Ok(None),
            Ok(Status::Complete((end, 0))) => Ok(Some((end, ParseState::Trailer))),
            Ok(Status::Complete((end, size))) => {
                let size = usize::try_from(size);
                let size = size.map_err(|_| Fault::malformed("a chunk is too large", bytes))?;
                Ok(Some((end, ParseState::Chunk(size))))
            }
            Err(error) => Err(Fault::malformed(&error.to_string(), bytes)),
        }
    }

    fn parse_chunk_end(&mut self, bytes: &[u8]) -> Result<ParsedPart, Fault> {
        match bytes {
            [b'\r', b'\n', ..] => Ok(Some((2, ParseState::ChunkSize))),
            [b'\r'] => Ok(None),
            _ => Err(Fault::malformed("a chunk longer than its size", bytes)),
        }
    }

    /// Skips the fields after the last chunk, up to and including the empty line.
    fn skip_trailer(&mut self, bytes: &[u8]) -> Result<ParsedPart, Fault> {
        match parse_headers(bytes, &mut [EMPTY_HEADER; MOST_HEADERS]) {
            Ok(Status::Partial) => Ok(None),
            Ok(Status::Complete((end, _))) => Ok(Some((end, ParseState::Ended))),
            Err(error) => Err(Fault::malformed(&error.to_string(), bytes)),
        }
    }
}

fn framing_of_length(left: usize) -> ParseState {
    match left {
        0 => ParseState::Ended,
        left => ParseState::Length(left),
    }
}

fn parse_content_length(value: &str) -> Result<usize, Fault> {
    // `parse` also accepts a sign.
    let is_number = value.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = value.parse().ok().filter(|_| is_number);
    parsed.ok_or_else(|| Fault::malformed("content-length", value.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a response that arrives in these pieces, after which the connection closes. Returns its body.
    fn parse_piece(pieces: &[&str]) -> Result<(String, ResponseParser), Fault> {
        let (mut response, mut body) = (ResponseParser::new(), Vec::new());
        for piece in pieces {
            response.parse_piece(piece.as_bytes(), |data| {
                body.extend_from_slice(data);
                Ok(())
            })?;
        }
        response.handle_close()?;
        Ok((String::from_utf8(body).unwrap(), response))
    }

    fn fault_of(response: &str) -> String {
        let read = parse_piece(&[response]).map(|(body, _)| body);
        read.expect_err("the response is wrong").to_string()
    }

    #[test]
    fn a_body_of_any_framing_is_read_wherever_its_pieces_are_cut() {
        let chunks = "3;name=\"x\"\r\nhel\r\n02 \r\nlo\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n";
        let both = "content-length: 7\r\ntransfer-encoding: chunked";
        for (head, body) in [
            ("content-length: 5", "hello"),
            ("Transfer-Encoding: Chunked", chunks),
            (both, "5\r\nhello\r\n0\r\n\r\n"),
            ("content-type: text/plain", "hello"),
        ] {
            let response =
                format!("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}");
            for cut in 1..response.len() {
                let (read, response) = parse_piece(&[&response[..cut], &response[cut..]])
                    .unwrap_or_else(|fault| panic!("{head} cut at {cut}: {fault}"));
                assert_eq!(read, "hello", "{head} cut at {cut}");
                assert!(response.has_ended(), "{head} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_connection_is_kept_unless_the_response_closes_it() {
        for (head, is_kept) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 0", true),
            ("HTTP/1.1 200 OK\r\nConnection: TE, Close", false),
            ("HTTP/1.1 200 OK", false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 0", false),
        ] {
            let (_, response) = parse_piece(&[&format!("{head}\r\n\r\n")]).unwrap();
            assert_eq!(response.keeps_connection(), is_kept, "{head}");
        }
    }

    #[test]
    fn a_malformed_response_is_a_fault() {
        let ok = "HTTP/1.1 200 OK\r\n";
        let chunked = format!("{ok}transfer-encoding: chunked\r\n\r\n");
        for wrong in [
            "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
            format!("{ok}content-length: +5\r\n\r\nhello"),
            format!("{ok}content-length: 5\r\ncontent-length: 6\r\n\r\nhello"),
            format!("{ok}content-length: 5\r\n\r\nhello!"),
            format!("{ok}content-encoding: gzip\r\n\r\nhello"),
            format!("{chunked}-5\r\nhello\r\n"),
            format!("{chunked}5\r\nhello!\r\n"),
            format!("{chunked}fffffffffffffffff\r\n"),
        ] {
            let found = fault_of(&wrong);
            assert!(found.starts_with("unexpected data"), "{wrong:?}: {found}");
        }
    }
}
