//! The parts of a line that are written for every token.

use bytes::{BufMut, BytesMut};

use crate::tokens::Stamp;

pub(super) fn put_number(out: &mut BytesMut, number: impl itoa::Integer) {
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

pub(super) fn put_stamp(out: &mut BytesMut, stamp: Stamp) {
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
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|byte| needs_escape(*byte)) {
        out.put_slice(&rest[..at]);
        put_escape(out, rest[at]);
        rest = &rest[at + 1..];
    }
    out.put_slice(rest);
    out.put_u8(b'"');
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
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
