//! The records of a stream's body, cut anywhere by its pieces: the lines of NDJSON, or the data of
//! server-sent events as the HTML standard reads them. It knows nothing of what a record means.

use memchr::memchr2;

use crate::load::Fault;

/// More than any record of a stream has.
const LONGEST: usize = 16 * 1024 * 1024;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A record of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// A line of NDJSON, or the data of an event.
    Object(&'a [u8]),
    /// The data of an event of the type `error`.
    Error(&'a [u8]),
    /// The event that ends a stream of them.
    Done,
}

/// The form of a body, by its first line: an object is none of an event's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyForm {
    Ndjson,
    Events,
}

/// The records of one body.
#[derive(Default)]
pub(super) struct Records {
    form: Option<BodyForm>,
    /// The beginning of a line whose end has not come.
    unfinished: Vec<u8>,
    /// Whether the last line ended with a carriage return, to which a line feed would belong.
    after_return: bool,
    event: Event,
}

/// An event whose blank line has not come: no client has it before.
#[derive(Default)]
struct Event {
    data: Vec<u8>,
    has_data: bool,
    is_error: bool,
}

impl Records {
    /// Takes the next piece, and hands over the records that are whole.
    ///
    /// # Errors
    /// What `take` returns, and where a record is longer than any is.
    pub(super) fn read(
        &mut self,
        mut piece: &[u8],
        mut take: impl FnMut(Record<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        loop {
            if self.after_return && !piece.is_empty() {
                piece = piece.strip_prefix(b"\n").unwrap_or(piece);
                self.after_return = false;
            }
            let Some(end) = memchr2(b'\n', b'\r', piece) else {
                break;
            };
            self.after_return = piece[end] == b'\r';
            if self.unfinished.is_empty() {
                self.line(&piece[..end], &mut take)?;
            } else {
                let mut line = std::mem::take(&mut self.unfinished);
                line.extend_from_slice(&piece[..end]);
                self.line(&line, &mut take)?;
                line.clear();
                self.unfinished = line;
            }
            piece = &piece[end + 1..];
        }
        self.unfinished.extend_from_slice(piece);
        if self.unfinished.len().max(self.event.data.len()) > LONGEST {
            return Err(Fault::Malformed("a record without an end".to_owned()));
        }
        Ok(())
    }

    /// Whether the body has come in the form of events, which need an end of their own.
    pub(super) fn are_events(&self) -> bool {
        self.form == Some(BodyForm::Events)
    }

    /// Whether a record has begun whose end has not come.
    pub(super) fn is_within_one(&self) -> bool {
        self.event.has_data || !self.unfinished.is_empty()
    }

    fn line(
        &mut self,
        mut line: &[u8],
        take: &mut impl FnMut(Record<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let form = match self.form {
            Some(form) => form,
            None => {
                line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
                let form = match line.first() {
                    None => return Ok(()),
                    Some(b'{') => BodyForm::Ndjson,
                    Some(_) => BodyForm::Events,
                };
                *self.form.insert(form)
            }
        };
        match form {
            BodyForm::Ndjson if line.is_empty() => Ok(()),
            BodyForm::Ndjson => take(Record::Object(line)),
            BodyForm::Events if line.is_empty() => self.event.end(take),
            BodyForm::Events => {
                self.event.field(line);
                Ok(())
            }
        }
    }
}

impl Event {
    fn field(&mut self, line: &[u8]) {
        let (name, value) = match memchr::memchr(b':', line) {
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
            // A comment, an id, a time to reconnect after: nothing of a completion's.
            _ => {}
        }
    }

    /// Hands over what has come, unless it is only comments.
    fn end(&mut self, take: &mut impl FnMut(Record<'_>) -> Result<(), Fault>) -> Result<(), Fault> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> (Vec<String>, Records) {
        let (mut records, mut read) = (Records::default(), Vec::new());
        for piece in pieces {
            let taken = records.read(piece.as_bytes(), |record| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                read.push(match record {
                    Record::Object(bytes) => text(bytes),
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
                assert!(!records.is_within_one(), "{body:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn lines_of_objects_are_records_wherever_they_are_cut() {
        assert_read("{\"a\":1}\n{\"b\":2}\n", &["{\"a\":1}", "{\"b\":2}"]);
        assert_read("\n{}\r\n\n{}\r\n", &["{}", "{}"]);
    }

    #[test]
    fn events_have_any_line_end_and_comments_between_them() {
        for end in ["\n", "\r\n", "\r"] {
            let lines = [
                ": hello",
                "",
                "data: {}",
                "",
                "id: 1",
                "data:{",
                "data: }",
                ": alive",
                "",
                "event: error",
                "data: no",
                "",
                "event: ping",
                "",
                "data: [DONE]",
                "",
                "",
            ];
            let expected = ["{}", "{\n}", "error no", "done"];
            assert_read(&lines.join(end), &expected);
            assert_read(&format!("\u{feff}{}", lines.join(end)), &expected);
        }
    }

    #[test]
    fn the_type_of_an_event_is_only_its_own() {
        assert_read("event: error\ndata: x\n\ndata: y\n\n", &["error x", "y"]);
    }

    #[test]
    fn what_has_no_end_is_no_record() {
        for body in ["{\"a\":1}", "data: {}\n", "data: {}", "data: [DONE]\n"] {
            let (read, records) = read(&[body]);
            assert!(read.is_empty() && records.is_within_one(), "{body:?}");
        }
    }
}
