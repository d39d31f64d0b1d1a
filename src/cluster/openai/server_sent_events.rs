//! Splits the body of a response into server-sent events.
//!
//! An event that lies within one frame of the body is not copied. This module must not know what the events contain.

use bytes::{Buf, Bytes, BytesMut};
use memchr::{memchr, memchr2};

/// Maximum size of an event, in bytes. An engine that sends more is broken.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;

/// UTF-8's byte order mark, with which a body may start.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The events of one body.
#[derive(Default)]
pub(super) struct EventSplitter {
    /// The part of the latest frame that has not been read yet.
    frame: Bytes,
    /// The start of a line whose end has not arrived.
    partial_line: BytesMut,
    /// The first `data` line of the event that has not ended yet.
    data: Option<Bytes>,
    /// All its `data` lines, if it has several.
    joined: BytesMut,
    is_error: bool,
    /// True if the last line ended with a carriage return. A line feed after it belongs to the same line end.
    skips_line_feed: bool,
    /// True once the first line has been read. It may start with a byte order mark.
    has_first_line: bool,
}

/// One event.
#[derive(Debug, PartialEq)]
pub(super) struct SentEvent {
    /// The lines of `data`, joined by line feeds.
    pub(super) data: Bytes,
    /// True if the name of the event is `error`.
    pub(super) is_error: bool,
}

/// An event exceeds [`MAX_EVENT_BYTES`].
#[derive(Debug, PartialEq)]
pub(super) struct EventTooLarge;

impl EventSplitter {
    /// Adds the next frame of the body. All events of the previous frame must have been taken.
    pub(super) fn push(&mut self, frame: Bytes) {
        debug_assert!(self.frame.is_empty(), "the previous frame was read");
        self.frame = frame;
    }

    /// Returns the next whole event, or `None` if more of the body is needed. An event that the end of the body cuts
    /// off is never returned.
    pub(super) fn next_event(&mut self) -> Result<Option<SentEvent>, EventTooLarge> {
        while let Some(line) = self.next_line()? {
            if line.is_empty() {
                let is_error = std::mem::take(&mut self.is_error);
                if let Some(first) = self.data.take() {
                    let data = match self.joined.is_empty() {
                        true => first,
                        false => self.joined.split().freeze(),
                    };
                    return Ok(Some(SentEvent { data, is_error }));
                }
            } else {
                self.read_field(line)?;
            }
        }
        Ok(None)
    }

    /// Returns the next whole line, without its end.
    fn next_line(&mut self) -> Result<Option<Bytes>, EventTooLarge> {
        if self.skips_line_feed && !self.frame.is_empty() {
            self.skips_line_feed = false;
            self.frame.advance(usize::from(self.frame[0] == b'\n'));
        }
        let Some(end) = memchr2(b'\n', b'\r', &self.frame) else {
            check_size(self.partial_line.len() + self.frame.len())?;
            self.partial_line.extend_from_slice(&self.frame);
            self.frame.clear();
            return Ok(None);
        };
        let mut line = self.frame.split_to(end);
        self.skips_line_feed = self.frame[0] == b'\r';
        self.frame.advance(1);
        if !self.partial_line.is_empty() {
            check_size(self.partial_line.len() + line.len())?;
            self.partial_line.extend_from_slice(&line);
            line = self.partial_line.split().freeze();
        }
        let is_first = !std::mem::replace(&mut self.has_first_line, true);
        if is_first && line.starts_with(BYTE_ORDER_MARK) {
            line.advance(BYTE_ORDER_MARK.len());
        }
        Ok(Some(line))
    }

    /// Reads a line such as `data: …`. Ignores comments, which start with a colon, and unknown fields.
    fn read_field(&mut self, mut line: Bytes) -> Result<(), EventTooLarge> {
        let name_end = memchr(b':', &line).unwrap_or(line.len());
        let name = line.split_to(name_end);
        line.advance(usize::from(!line.is_empty()));
        line.advance(usize::from(line.first() == Some(&b' ')));
        match &name[..] {
            b"data" => match &self.data {
                None => self.data = Some(line),
                Some(first) => {
                    if self.joined.is_empty() {
                        self.joined.extend_from_slice(first);
                    }
                    check_size(self.joined.len() + line.len())?;
                    self.joined.extend_from_slice(b"\n");
                    self.joined.extend_from_slice(&line);
                }
            },
            b"event" => self.is_error = &line[..] == b"error",
            _ => {}
        }
        Ok(())
    }
}

fn check_size(bytes: usize) -> Result<(), EventTooLarge> {
    if bytes > MAX_EVENT_BYTES {
        return Err(EventTooLarge);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    /// Returns the data of all whole events of a body that arrives in frames of this size.
    fn events(body: &str, frame_size: usize) -> Vec<String> {
        let mut splitter = EventSplitter::default();
        let mut events = Vec::new();
        for frame in body.as_bytes().chunks(frame_size) {
            splitter.push(Bytes::copy_from_slice(frame));
            while let Some(event) = splitter.next_event().expect("the events are small") {
                let data = String::from_utf8(event.data.to_vec()).expect("the data is UTF-8");
                events.push(if event.is_error {
                    format!("error:{data}")
                } else {
                    data
                });
            }
        }
        events
    }

    #[test]
    fn a_body_has_the_same_events_however_it_is_cut_into_frames() {
        let body = ": hello\n\ndata: {\"a\":1}\n\nid: 7\r\ndata:b\r\n\r\nevent: error\ndata: x\n\n\
                    event: ping\n\ndata: one\ndata: two\n\ndata\n\ndata: [DONE]\n\n";
        for size in 1..=body.len() {
            let expected = ["{\"a\":1}", "b", "error:x", "one\ntwo", "", "[DONE]"];
            assert_eq!(events(body, size), expected, "{size}");
        }
    }

    #[test]
    fn a_carriage_return_alone_ends_a_line() {
        for size in 1..12 {
            assert_eq!(
                events("data: a\r\rdata: b\rdata: c\r\n\r", size),
                ["a", "b\nc"]
            );
        }
    }

    #[test]
    fn a_byte_order_mark_before_the_first_event_is_skipped() {
        for size in 1..10 {
            assert_eq!(events("\u{feff}data: a\n\ndata: b\n\n", size), ["a", "b"]);
        }
    }

    #[test]
    fn an_event_without_its_blank_line_is_not_returned() {
        assert_eq!(events("data: a\n\ndata: b\n", 100), ["a"]);
        assert_eq!(events("data: a\n\ndata: b", 100), ["a"]);
    }

    #[test]
    fn an_endless_line_is_an_error() {
        let mut splitter = EventSplitter::default();
        let frame = Bytes::from(vec![b'a'; MAX_EVENT_BYTES]);
        splitter.push(frame.clone());
        assert_eq!(splitter.next_event(), Ok(None));
        splitter.push(frame);
        assert_eq!(splitter.next_event(), Err(EventTooLarge));
    }

    #[test]
    fn an_event_with_endless_data_is_an_error() {
        let mut splitter = EventSplitter::default();
        let line = [b"data: ", &[b'a'; MAX_EVENT_BYTES / 2][..], b"\n"].concat();
        splitter.push(line.repeat(3).into());
        assert_eq!(splitter.next_event(), Err(EventTooLarge));
    }

    /// The rules of the HTML standard (section 9.2.6), applied to a whole body.
    fn expected_events(body: &str) -> Vec<String> {
        let body = body.strip_prefix('\u{feff}').unwrap_or(body);
        let body = body.replace("\r\n", "\n").replace('\r', "\n");
        let (mut events, mut data, mut is_error) = (Vec::new(), Vec::new(), false);
        let lines = body.split('\n').collect::<Vec<_>>();
        // The text after the last line end is not a line.
        for line in &lines[..lines.len() - 1] {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match name {
                "" if line.is_empty() => {
                    let prefix = if std::mem::take(&mut is_error) {
                        "error:"
                    } else {
                        ""
                    };
                    if !data.is_empty() {
                        events.push(format!("{prefix}{}", std::mem::take(&mut data).join("\n")));
                    }
                }
                "data" => data.push(value),
                "event" => is_error = value == "error",
                _ => {}
            }
        }
        events
    }

    proptest! {
        #[test]
        fn any_body_has_the_events_of_the_standard_in_frames_of_any_size(
            parts in vec(
                select(vec![
                    "data", "event", "id", ":", ": ", "error", "x", "é", "\u{feff}", "\0", " ", "\n", "\r",
                    "\r\n", "data: b\r\n", "data: a\n\n", "data:\n\n", "\n\n",
                ]),
                0..30,
            ),
            frame_size in 1..12_usize,
        ) {
            let body = parts.concat();
            prop_assert_eq!(events(&body, frame_size), expected_events(&body));
        }
    }
}
