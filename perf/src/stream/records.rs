//! Splits a stream's body, which arrives in pieces of any size, into records: NDJSON lines, the data of server-sent
//! events, or gRPC messages. Lines end with LF or CRLF.

use memchr::memchr;

use super::Format;
use crate::fault::Fault;

/// Maximum length of a record in bytes, which no correct stream reaches.
const MAX_RECORD_BYTES: usize = 16 * 1024 * 1024;
/// Length of a gRPC message's head, in bytes: a flag and the length of the message.
const MESSAGE_HEAD: usize = 5;

/// One record of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// An NDJSON line, or the data of a server-sent event.
    Object(&'a [u8]),
    /// The data of a server-sent event of type `error`.
    Error(&'a [u8]),
    /// The event `[DONE]`, which ends a stream of server-sent events.
    Done,
    /// A gRPC message.
    Message(&'a [u8]),
}

/// Callback that consumes records.
pub(super) trait TakeRecord: FnMut(Record<'_>) -> Result<(), Fault> {}
impl<F: FnMut(Record<'_>) -> Result<(), Fault>> TakeRecord for F {}

/// Splits one body into records.
#[derive(Default)]
pub(super) struct RecordSplitter {
    /// Format of the body. `None` until the first line shows whether it is NDJSON or server-sent events.
    format: Option<Format>,
    /// Bytes of a line or message whose end has not arrived.
    unfinished: Vec<u8>,
    event: SseEvent,
}

/// A server-sent event whose blank line has not arrived. A client must not use the event before.
#[derive(Default)]
struct SseEvent {
    data: Vec<u8>,
    has_data: bool,
    is_error: bool,
}

impl RecordSplitter {
    pub(super) fn in_format(format: Format) -> Self {
        Self {
            format: Some(format),
            ..Self::default()
        }
    }

    pub(super) fn format(&self) -> Option<Format> {
        self.format
    }

    /// Reads the next piece, and passes every complete record to `take`.
    /// Returns the errors of `take`, and an error if a record is too long.
    pub(super) fn read(&mut self, piece: &[u8], take: &mut impl TakeRecord) -> Result<(), Fault> {
        if self.format == Some(Format::Grpc) {
            self.read_messages(piece, take)?;
        } else {
            self.read_lines(piece, take)?;
        }
        if self.unfinished.len().max(self.event.data.len()) > MAX_RECORD_BYTES {
            return Err(Fault::Malformed("a record without an end".to_owned()));
        }
        Ok(())
    }

    pub(super) fn is_within_record(&self) -> bool {
        self.event.has_data || !self.unfinished.is_empty()
    }

    fn read_messages(&mut self, piece: &[u8], take: &mut impl TakeRecord) -> Result<(), Fault> {
        let mut all = std::mem::take(&mut self.unfinished);
        let mut rest = piece;
        if !all.is_empty() {
            all.extend_from_slice(piece);
            rest = &all;
        }
        while let Some((message, after)) = split_message(rest) {
            take(Record::Message(message))?;
            rest = after;
        }
        self.unfinished = rest.to_vec();
        Ok(())
    }

    fn read_lines(&mut self, mut piece: &[u8], take: &mut impl TakeRecord) -> Result<(), Fault> {
        while let Some(end) = memchr(b'\n', piece) {
            if self.unfinished.is_empty() {
                self.process_line(&piece[..end], take)?;
            } else {
                let mut line = std::mem::take(&mut self.unfinished);
                line.extend_from_slice(&piece[..end]);
                self.process_line(&line, take)?;
                line.clear();
                self.unfinished = line;
            }
            piece = &piece[end + 1..];
        }
        self.unfinished.extend_from_slice(piece);
        Ok(())
    }

    fn process_line(&mut self, line: &[u8], take: &mut impl TakeRecord) -> Result<(), Fault> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if self.format.is_none() {
            // No field of an event starts with a brace.
            self.format = line.first().map(|first| match first {
                b'{' => Format::Ndjson,
                _ => Format::Sse,
            });
        }
        match self.format {
            Some(Format::Sse) if line.is_empty() => self.event.end(take),
            Some(Format::Sse) => {
                self.event.field(line);
                Ok(())
            }
            _ if line.is_empty() => Ok(()),
            _ => take(Record::Object(line)),
        }
    }
}

impl SseEvent {
    fn field(&mut self, line: &[u8]) {
        let (name, value) = match memchr(b':', line) {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => {
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
                self.has_data = true;
            }
            b"event" => self.is_error = value == b"error",
            // Comments, ids and reconnection times are not part of a completion.
            _ => {}
        }
    }

    /// Passes the event to `take`, unless it has only comments.
    fn end(&mut self, take: &mut impl TakeRecord) -> Result<(), Fault> {
        let record = match (self.is_error, self.data.as_slice()) {
            (true, data) => Record::Error(data),
            (false, b"[DONE]") => Record::Done,
            (false, data) => Record::Object(data),
        };
        let taken = if self.has_data { take(record) } else { Ok(()) };
        self.data.clear();
        (self.has_data, self.is_error) = (false, false);
        taken
    }
}

/// Splits the bytes after the first message, if the message is complete.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<MESSAGE_HEAD>()?;
    let [_, length @ ..] = *head;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(length)).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> (Vec<String>, RecordSplitter) {
        let (mut records, mut read) = (RecordSplitter::default(), Vec::new());
        for piece in pieces {
            let taken = records.read(piece.as_bytes(), &mut |record| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                read.push(match record {
                    Record::Object(bytes) | Record::Message(bytes) => text(bytes),
                    Record::Error(bytes) => format!("error {}", text(bytes)),
                    Record::Done => "done".to_owned(),
                });
                Ok(())
            });
            taken.unwrap();
        }
        (read, records)
    }

    fn assert_read(body: &str, expected: &[&str]) {
        for cut in 0..body.len() {
            if body.is_char_boundary(cut) {
                let (read, records) = read(&[&body[..cut], &body[cut..]]);
                assert_eq!(read, expected, "{body:?} cut at {cut}");
                assert!(!records.is_within_record(), "{body:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn lines_with_objects_are_records_wherever_they_are_cut() {
        assert_read("{\"a\":1}\n{\"b\":2}\n", &["{\"a\":1}", "{\"b\":2}"]);
        assert_read("\n{}\r\n\n{}\r\n", &["{}", "{}"]);
    }

    #[test]
    fn events_may_have_either_line_end_and_comments_between_them() {
        let lines = ": hello||data: {}||id: 1|data:{|data: }|: alive||event: error|data: no||\
                     event: ping||data: [DONE]||";
        for end in ["\n", "\r\n"] {
            let expected = ["{}", "{\n}", "error no", "done"];
            assert_read(&lines.replace('|', end), &expected);
        }
    }

    #[test]
    fn the_type_of_an_event_does_not_apply_to_the_next_one() {
        assert_read("event: error\ndata: x\n\ndata: y\n\n", &["error x", "y"]);
    }

    #[test]
    fn a_record_without_its_end_is_not_passed_on() {
        for body in ["{\"a\":1}", "data: {}\n", "data: {}", "data: [DONE]\n"] {
            let (read, records) = read(&[body]);
            assert!(read.is_empty() && records.is_within_record(), "{body:?}");
        }
    }
}
