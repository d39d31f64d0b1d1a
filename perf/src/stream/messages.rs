//! Decodes the events of a gRPC stream. Only the fields that a client needs are parsed, because the load generator
//! shares its processors with the servers that it measures.

use std::borrow::Cow;

use prost::Message;
use tokenway::proto::v1::{self, completion_event};

use super::decoder::{Event, TakeEvent, Token};
use super::object::Timings;
use crate::fault::Fault;
use crate::timestamps::TokenTimestamps;

/// Field numbers in `proto/tokenway/v1/inference.proto`.
mod field {
    pub(super) const STARTED: u64 = 1;
    pub(super) const TOKENS: u64 = 2;
    pub(super) const SUMMARY: u64 = 3;
    pub(super) const PROMPT: u64 = 4;
    pub(super) const CHAT: u64 = 5;
    pub(super) const TOKENS_FIRST_INDEX: u64 = 2;
    pub(super) const TOKENS_TOKENS: u64 = 3;
    pub(super) const TOKENS_FINISH_REASON: u64 = 4;
    pub(super) const TOKEN_TEXT: u64 = 2;
    pub(super) const TOKEN_DUE_NS: u64 = 3;
    pub(super) const TOKEN_EMITTED_NS: u64 = 4;
}

/// Value of a field. Events have only these two wire types.
enum FieldValue<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Decodes a `CompletionEvent`, and passes its events to `take`.
pub(super) fn decode(mut message: &[u8], mut take: impl TakeEvent) -> Result<(), Fault> {
    let malformed = || Fault::Malformed("a message that is not a completion event".to_owned());
    loop {
        match next_field(&mut message).ok_or_else(malformed)? {
            (field::STARTED, FieldValue::Bytes(_)) => take(Event::Started)?,
            (field::TOKENS, FieldValue::Bytes(mut tokens)) => {
                // The wire format leaves out a number that is 0.
                let (mut index, mut has_finished) = (0, false);
                while !tokens.is_empty() {
                    match next_field(&mut tokens).ok_or_else(malformed)? {
                        (field::TOKENS_FIRST_INDEX, FieldValue::Number(first)) => index = first,
                        (field::TOKENS_TOKENS, FieldValue::Bytes(message)) => {
                            take(Event::Token(
                                decode_token(message, index).ok_or_else(malformed)?,
                            ))?;
                            index += 1;
                        }
                        (field::TOKENS_FINISH_REASON, FieldValue::Number(reason)) => {
                            has_finished = reason != 0;
                        }
                        _ => {}
                    }
                }
                if has_finished {
                    take(Event::FinishReason)?;
                }
            }
            (field::SUMMARY, FieldValue::Bytes(_)) => take(Event::EndOfStream)?,
            (field::PROMPT | field::CHAT, FieldValue::Bytes(_)) => take(Event::Other)?,
            _ => return Err(malformed()),
        }
        if message.is_empty() {
            return Ok(());
        }
    }
}

/// Returns the timings of a `CompletionEvent` with a summary.
pub(super) fn timings(message: &[u8]) -> Option<Timings> {
    let event = v1::CompletionEvent::decode(message).ok()?.event?;
    let completion_event::Event::Summary(summary) = event else {
        return None;
    };
    let timings = summary.timings?;
    let method = timings.resumption_method().as_str_name();
    let method = method
        .trim_start_matches("RESUMPTION_METHOD_")
        .to_ascii_lowercase();
    Some(Timings {
        resumptions: timings.resumptions,
        resumption_method: Some(method).filter(|method| method != "unspecified"),
    })
}

/// Decodes a token. Returns `None` if it is malformed.
fn decode_token(mut message: &[u8], index: u64) -> Option<Token<'_>> {
    let bytes = message.len();
    let (mut text, mut due_ns, mut emitted_ns) = (&[][..], None, None);
    while !message.is_empty() {
        match next_field(&mut message)? {
            (field::TOKEN_TEXT, FieldValue::Bytes(bytes)) => text = bytes,
            (field::TOKEN_DUE_NS, FieldValue::Number(ns)) => due_ns = Some(ns),
            (field::TOKEN_EMITTED_NS, FieldValue::Number(ns)) => emitted_ns = Some(ns),
            _ => {}
        }
    }
    Some(Token {
        text: Cow::Borrowed(str::from_utf8(text).ok()?),
        index: Some(u32::try_from(index).ok()?),
        stamp: emitted_ns.map(|emitted_ns| TokenTimestamps { due_ns, emitted_ns }),
        bytes,
    })
}

/// Removes the next field from the message and returns its number and value.
fn next_field<'a>(message: &mut &'a [u8]) -> Option<(u64, FieldValue<'a>)> {
    let key = read_varint(message)?;
    let number = read_varint(message)?;
    let value = match key & 7 {
        0 => FieldValue::Number(number),
        2 => {
            let (bytes, rest) = message.split_at_checked(usize::try_from(number).ok()?)?;
            *message = rest;
            FieldValue::Bytes(bytes)
        }
        _ => return None,
    };
    Some((key >> 3, value))
}

/// Removes a varint from the start of the message and returns it. prost's own function is slower.
#[inline]
fn read_varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
