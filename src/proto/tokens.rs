//! Hand-written message `Tokens`. Its wire format is defined in `inference.proto`. In memory, all tokens of a message
//! share two allocations, while generated code would allocate the text of each token. Most messages of a stream are
//! `Tokens`, so they dominate the cost of encoding and decoding.

use bytes::{Buf, BufMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, check_wire_type, decode_key, decode_varint, encode_key, encode_varint,
    encoded_len_varint, int32, key_len, merge_loop, message, skip_field, string, uint32, uint64,
};

use super::v1;
use crate::tokens::{Logprobs, TextToken, Timestamps, TokenBatch, TopLogprob};

/// Consecutive tokens of one choice that were ready at the same time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Index of the choice, from 0.
    pub choice: u32,
    /// Index of the first token within its choice, from 0. A gap is an error.
    pub first_index: u32,
    /// The tokens, in order. Empty only in the last message of a choice that ends without another token.
    pub tokens: TokenBatch,
    /// Finish reason, a value of [`v1::FinishReason`]. Set in the last message of the choice.
    pub finish_reason: i32,
}

/// Field numbers of `Tokens`.
mod field {
    pub(super) const CHOICE: u32 = 1;
    pub(super) const FIRST_INDEX: u32 = 2;
    pub(super) const TOKENS: u32 = 3;
    pub(super) const FINISH_REASON: u32 = 4;
}

/// Field numbers of `Token`.
mod token_field {
    pub(super) const ID: u32 = 1;
    pub(super) const TEXT: u32 = 2;
    pub(super) const DUE_NS: u32 = 3;
    pub(super) const EMITTED_NS: u32 = 4;
    pub(super) const LOGPROBS: u32 = 5;
}

/// Estimated encoded size of a short token in bytes, used to estimate the number of tokens in a message.
const TYPICAL_TOKEN_BYTES: usize = 8;

impl Tokens {
    /// Returns the finish reason, which is `Unspecified` unless the choice ends with this message.
    #[must_use]
    pub fn finish_reason(&self) -> v1::FinishReason {
        v1::FinishReason::try_from(self.finish_reason).unwrap_or_default()
    }
}

impl prost::Message for Tokens {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        put_uint32(field::CHOICE, self.choice, buf);
        put_uint32(field::FIRST_INDEX, self.first_index, buf);
        for token in self.tokens.iter() {
            encode_key(field::TOKENS, WireType::LengthDelimited, buf);
            encode_varint(len_as_u64(token_len(&token)), buf);
            put_token(&token, buf);
        }
        if self.finish_reason != 0 {
            int32::encode(field::FINISH_REASON, &self.finish_reason, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            field::CHOICE => uint32::merge(wire_type, &mut self.choice, buf, ctx),
            field::FIRST_INDEX => uint32::merge(wire_type, &mut self.first_index, buf, ctx),
            field::TOKENS => {
                check_wire_type(WireType::LengthDelimited, wire_type)?;
                if self.tokens.is_empty() {
                    // Most of the rest of the message is tokens. Half of the estimate is reserved, to avoid reserving
                    // too much.
                    let rest = buf.remaining();
                    self.tokens
                        .reserve(rest / TYPICAL_TOKEN_BYTES / 2, rest / 2);
                }
                merge_token(&mut self.tokens, buf, &ctx)
            }
            field::FINISH_REASON => int32::merge(wire_type, &mut self.finish_reason, buf, ctx),
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let tokens: usize = self
            .tokens
            .iter()
            .map(|token| {
                let len = token_len(&token);
                key_len(field::TOKENS) + encoded_len_varint(len_as_u64(len)) + len
            })
            .sum();
        let finish_reason = match self.finish_reason {
            0 => 0,
            reason => int32::encoded_len(field::FINISH_REASON, &reason),
        };
        uint32_len(field::CHOICE, self.choice)
            + uint32_len(field::FIRST_INDEX, self.first_index)
            + tokens
            + finish_reason
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

fn put_token(token: &TextToken<'_>, buf: &mut impl BufMut) {
    put_uint32(token_field::ID, token.id, buf);
    if !token.text.is_empty() {
        encode_key(token_field::TEXT, WireType::LengthDelimited, buf);
        encode_varint(len_as_u64(token.text.len()), buf);
        buf.put_slice(token.text.as_bytes());
    }
    for (tag, time) in timestamp_fields(token.timestamps) {
        if time != 0 {
            uint64::encode(tag, &time, buf);
        }
    }
    if let Some(logprobs) = token.logprobs {
        message::encode(token_field::LOGPROBS, &v1::Logprobs::from(logprobs), buf);
    }
}

fn token_len(token: &TextToken<'_>) -> usize {
    let text = match token.text.len() {
        0 => 0,
        len => key_len(token_field::TEXT) + encoded_len_varint(len_as_u64(len)) + len,
    };
    let times = timestamp_fields(token.timestamps).map(|(tag, time)| match time {
        0 => 0,
        time => uint64::encoded_len(tag, &time),
    });
    let logprobs = token.logprobs.map_or(0, |logprobs| {
        message::encoded_len(token_field::LOGPROBS, &v1::Logprobs::from(logprobs))
    });
    uint32_len(token_field::ID, token.id) + text + times.iter().sum::<usize>() + logprobs
}

fn timestamp_fields(timestamps: Timestamps) -> [(u32, u64); 2] {
    [
        (token_field::DUE_NS, timestamps.due_ns),
        (token_field::EMITTED_NS, timestamps.emitted_ns),
    ]
}

/// Decodes one token and appends it, including its text, to the batch.
fn merge_token(
    batch: &mut TokenBatch,
    buf: &mut impl Buf,
    ctx: &DecodeContext,
) -> Result<(), DecodeError> {
    // Decoding from one slice is several times as fast as decoding from a buffer of several chunks.
    let mut slice = buf.chunk();
    if merge_token_from(batch, &mut slice, ctx).is_ok() {
        let read = buf.chunk().len() - slice.len();
        buf.advance(read);
        return Ok(());
    }
    // The token spans two chunks or is invalid. The general decoder starts again, and overwrites a text that was
    // already set.
    merge_token_from(batch, buf, ctx)
}

fn merge_token_from(
    batch: &mut TokenBatch,
    buf: &mut impl Buf,
    ctx: &DecodeContext,
) -> Result<(), DecodeError> {
    let (mut id, mut timestamps, mut logprobs) = (0, Timestamps::default(), None);
    merge_loop(batch, buf, ctx.clone(), |batch, buf, ctx| {
        let (tag, wire_type) = decode_key(buf)?;
        match tag {
            token_field::ID => uint32::merge(wire_type, &mut id, buf, ctx),
            token_field::TEXT => merge_text(wire_type, batch, buf, ctx),
            token_field::DUE_NS => uint64::merge(wire_type, &mut timestamps.due_ns, buf, ctx),
            token_field::EMITTED_NS => {
                uint64::merge(wire_type, &mut timestamps.emitted_ns, buf, ctx)
            }
            token_field::LOGPROBS => {
                let logprobs = logprobs.get_or_insert_with(v1::Logprobs::default);
                message::merge(wire_type, logprobs, buf, ctx)
            }
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    })?;
    batch.finish_token(id, timestamps);
    batch.set_last_logprobs(logprobs.map(|logprobs| Box::new(logprobs.into())));
    Ok(())
}

fn merge_text(
    wire_type: WireType,
    batch: &mut TokenBatch,
    buf: &mut impl Buf,
    ctx: DecodeContext,
) -> Result<(), DecodeError> {
    let mut slice = buf.chunk();
    if wire_type == WireType::LengthDelimited
        && let Some(text) = next_text(&mut slice)
    {
        batch.set_text(text);
        let read = buf.chunk().len() - slice.len();
        buf.advance(read);
        return Ok(());
    }
    // The text spans two chunks or is invalid. prost handles both cases and returns its own error.
    let mut text = String::new();
    string::merge(wire_type, &mut text, buf, ctx)?;
    batch.set_text(&text);
    Ok(())
}

/// Reads a length-prefixed text from the start of `bytes`. Returns `None` if the text is incomplete or not valid
/// UTF-8.
fn next_text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let len = usize::try_from(decode_varint(bytes).ok()?).ok()?;
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

fn put_uint32(tag: u32, value: u32, buf: &mut impl BufMut) {
    if value != 0 {
        uint32::encode(tag, &value, buf);
    }
}

fn uint32_len(tag: u32, value: u32) -> usize {
    match value {
        0 => 0,
        value => uint32::encoded_len(tag, &value),
    }
}

fn len_as_u64(len: usize) -> u64 {
    u64::try_from(len).expect("a length has at most 64 bits")
}

impl From<&v1::Token> for Timestamps {
    fn from(token: &v1::Token) -> Self {
        Self {
            due_ns: token.due_ns(),
            emitted_ns: token.emitted_ns(),
        }
    }
}

impl From<TextToken<'_>> for v1::Token {
    fn from(token: TextToken<'_>) -> Self {
        let [due_ns, emitted_ns] = [token.timestamps.due_ns, token.timestamps.emitted_ns];
        Self {
            id: token.id,
            text: token.text.to_owned(),
            due_ns: Some(due_ns).filter(|ns| *ns > 0),
            emitted_ns: Some(emitted_ns).filter(|ns| *ns > 0),
            logprobs: token.logprobs.map(v1::Logprobs::from),
        }
    }
}

impl From<&Logprobs> for v1::Logprobs {
    fn from(logprobs: &Logprobs) -> Self {
        logprobs.clone().into()
    }
}

impl From<Logprobs> for v1::Logprobs {
    fn from(logprobs: Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|top| v1::TopLogprob {
            id: top.id,
            token_bytes: top.token_bytes,
            logprob: top.logprob,
        });
        Self {
            logprob: logprobs.logprob,
            token_bytes: logprobs.token_bytes,
            top: top.collect(),
        }
    }
}

impl From<v1::Logprobs> for Logprobs {
    fn from(logprobs: v1::Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|top| TopLogprob {
            id: top.id,
            token_bytes: top.token_bytes,
            logprob: top.logprob,
        });
        Self {
            logprob: logprobs.logprob,
            token_bytes: logprobs.token_bytes,
            top: top.collect(),
        }
    }
}

impl FromIterator<v1::Token> for TokenBatch {
    fn from_iter<T: IntoIterator<Item = v1::Token>>(tokens: T) -> Self {
        let mut batch = Self::default();
        for token in tokens {
            let timestamps = Timestamps::from(&token);
            batch.push(TextToken {
                id: token.id,
                text: &token.text,
                timestamps,
                logprobs: None,
            });
            let logprobs = token.logprobs.map(Logprobs::from);
            batch.set_last_logprobs(logprobs.map(Box::new));
        }
        batch
    }
}

#[cfg(test)]
mod tests;
