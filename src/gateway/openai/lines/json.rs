//! Encoders for the parts of a line that differ per token.

use bytes::{BufMut, BytesMut};

use crate::gateway::json::{FIRST_BYTE_OF_U0085, FIRST_BYTE_OF_U2028, line_break};
use crate::tokens::Timestamps;

pub(super) fn put_number(out: &mut BytesMut, number: impl itoa::Integer) {
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

pub(super) fn put_timestamps(out: &mut BytesMut, timestamps: Timestamps) {
    out.put_slice(b",\"stamp\":{\"due_ns\":");
    put_time(out, timestamps.due_ns);
    out.put_slice(b",\"emitted_ns\":");
    put_time(out, timestamps.emitted_ns);
    out.put_slice(b"}");
}

/// Writes a time in nanoseconds; 0 means unknown.
fn put_time(out: &mut BytesMut, time_ns: u64) {
    match time_ns {
        0 => out.put_slice(b"null"),
        time_ns => put_number(out, time_ns),
    }
}

/// Writes a JSON string. The text between two characters that need an escape is copied as a whole.
pub(super) fn put_json_string(out: &mut BytesMut, text: &str) {
    out.put_u8(b'"');
    let bytes = text.as_bytes();
    let (mut from, mut at) = (0, 0);
    while let Some(next) = bytes[at..].iter().position(|byte| may_need_escape(*byte)) {
        at += next;
        let length = match bytes[at] {
            FIRST_BYTE_OF_U0085 | FIRST_BYTE_OF_U2028 => match line_break(&bytes[at..]) {
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

/// Returns true for a byte that needs an escape, and for the first byte of a character that may need an escape.
fn may_need_escape(byte: u8) -> bool {
    byte < 0x20
        || matches!(
            byte,
            b'"' | b'\\' | FIRST_BYTE_OF_U0085 | FIRST_BYTE_OF_U2028
        )
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
