//! Decodes the events of a gRPC stream. Only the fields that a client needs are parsed, because the load
//! generator shares its processors with the servers that it measures.

use std::borrow::Cow;

use prost::encoding::{WireType, decode_key, decode_varint};

use super::decoder::{Event, Token};
use crate::fault::Fault;
use crate::stamp::Stamp;

/// Field numbers in `proto/tokenway/v1/inference.proto`.
mod field {
    pub(super) const STARTED: u32 = 1;
    pub(super) const TOKENS: u32 = 2;
    pub(super) const SUMMARY: u32 = 3;
    pub(super) const PROMPT: u32 = 4;
    pub(super) const TOKENS_FIRST_INDEX: u32 = 2;
    pub(super) const TOKENS_TOKENS: u32 = 3;
    pub(super) const TOKENS_FINISH_REASON: u32 = 4;
    pub(super) const TOKEN_TEXT: u32 = 2;
    pub(super) const TOKEN_DUE_NS: u32 = 3;
    pub(super) const TOKEN_EMITTED_NS: u32 = 4;
}

/// A field's value, of the two wire types that events have.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Decodes a `CompletionEvent`, and passes its events to `take`.
pub(super) fn decode(
    mut message: &[u8],
    mut take: impl FnMut(Event<'_>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    if message.is_empty() {
        return Err(malformed());
    }
    while !message.is_empty() {
        match next(&mut message)? {
            (field::STARTED, Value::Bytes(_)) => take(Event::Started)?,
            (field::TOKENS, Value::Bytes(message)) => tokens(message, &mut take)?,
            (field::SUMMARY, Value::Bytes(_)) => take(Event::Done)?,
            (field::PROMPT, Value::Bytes(_)) => take(Event::Other)?,
            _ => return Err(malformed()),
        }
    }
    Ok(())
}

fn tokens(
    mut message: &[u8],
    take: &mut impl FnMut(Event<'_>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    // The wire format leaves out a number that is 0.
    let (mut index, mut has_finished) = (0, false);
    while !message.is_empty() {
        match next(&mut message)? {
            (field::TOKENS_FIRST_INDEX, Value::Number(first)) => index = first,
            (field::TOKENS_TOKENS, Value::Bytes(message)) => {
                take(Event::Token(token(message, index)?))?;
                index += 1;
            }
            (field::TOKENS_FINISH_REASON, Value::Number(reason)) => has_finished = reason != 0,
            _ => {}
        }
    }
    if has_finished {
        take(Event::Finished)?;
    }
    Ok(())
}

fn token(mut message: &[u8], index: u64) -> Result<Token<'_>, Fault> {
    let bytes = message.len();
    let (mut text, mut due_ns, mut emitted_ns) = (&[][..], None, None);
    while !message.is_empty() {
        match next(&mut message)? {
            (field::TOKEN_TEXT, Value::Bytes(bytes)) => text = bytes,
            (field::TOKEN_DUE_NS, Value::Number(ns)) => due_ns = Some(ns),
            (field::TOKEN_EMITTED_NS, Value::Number(ns)) => emitted_ns = Some(ns),
            _ => {}
        }
    }
    Ok(Token {
        text: Cow::Borrowed(str::from_utf8(text).map_err(|_| malformed())?),
        index: Some(u32::try_from(index).map_err(|_| malformed())?),
        stamp: emitted_ns.map(|emitted_ns| Stamp { due_ns, emitted_ns }),
        bytes,
    })
}

/// Splits the next field off a message.
fn next<'a>(message: &mut &'a [u8]) -> Result<(u32, Value<'a>), Fault> {
    let (field, wire_type) = decode_key(message).map_err(|_| malformed())?;
    let number = decode_varint(message).map_err(|_| malformed())?;
    if wire_type == WireType::Varint {
        return Ok((field, Value::Number(number)));
    }
    let length = usize::try_from(number).unwrap_or(usize::MAX);
    let is_bytes = wire_type == WireType::LengthDelimited;
    let split = message.split_at_checked(length).filter(|_| is_bytes);
    let (bytes, rest) = split.ok_or_else(malformed)?;
    *message = rest;
    Ok((field, Value::Bytes(bytes)))
}

fn malformed() -> Fault {
    Fault::Malformed("a message that is not a completion event".to_owned())
}
