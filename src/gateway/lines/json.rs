//! The parts of a line that are written for every token.

use bytes::{BufMut, BytesMut};

use crate::gateway::json::{FIRST_OF_THREE, FIRST_OF_TWO, line_break};
use crate::tokens::Timestamps;

pub(super) fn put_number(out: &mut BytesMut, number: impl itoa::Integer) {
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

pub(super) fn put_timestamp(out: &mut BytesMut, stamp: Timestamps) {
    out.put_slice(b",\"stamp\":{\"due_ns\":");
    put_time(out, stamp.due_ns);
    out.put_slice(b",\"emitted_ns\":");
    put_time(out, stamp.emitted_ns);
    out.put_slice(b"}");
}

/// A time that may be unknown.
fn put_time(out: &mut BytesMut, time_ns: u64) {
    match time_ns {
        0 => out.put_slice(b"null"),
        time_ns => put_number(out, time_ns),
    }
}

/// A JSON string. Most tokens need no escape, and are copied at once.
pub(super) fn put_json_string(out: &mut BytesMut, text: &str) {
    out.put_u8(b'"');
    let bytes = text.as_bytes();
    let (mut from, mut at) = (0, 0);
    while let Some(next) = bytes[at..].iter().position(|byte| may_need_escape(*byte)) {
        at += next;
        let length = match bytes[at] {
            FIRST_OF_TWO | FIRST_OF_THREE => match line_break(&bytes[at..]) {
                Some(found) => {
                    out.put_slice(&bytes[from..at]);
                    out.put_slice(found.escape);
                    found.length
                }
                None => {
                    at += 1;
                    continue;
                }
            },
            byte => {
                out.put_slice(&bytes[from..at]);
                put_escape(out, byte);
                1
            }
        };
        at += length;
        from = at;
    }
    out.put_slice(&bytes[from..]);
    out.put_u8(b'"');
}

/// Whether this byte needs an escape, or begins a character that may need one.
fn may_need_escape(byte: u8) -> bool {
    byte < 0x20 || matches!(byte, b'"' | b'\\' | FIRST_OF_TWO | FIRST_OF_THREE)
}

fn put_escape(out: &mut BytesMut, byte: u8) {
    match byte {
        b'"' => out.put_slice(b"\\\""),
        b'\\' => out.put_slice(b"\\\\"),
        b'\n' => out.put_slice(b"\\n"),
        b'\r' => out.put_slice(b"\\r"),
        b'\t' => out.put_slice(b"\\t"),
        other => {
            let digits = b"0123456789abcdef";
            out.put_slice(b"\\u00");
            out.put_u8(digits[usize::from(other >> 4)]);
            out.put_u8(digits[usize::from(other & 0xf)]);
        }
    }
}
