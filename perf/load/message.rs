//! The messages of a gRPC stream, cut anywhere by its pieces, of which only what a measurement needs is
//! looked at: a message is five bytes of head and a `CompletionEvent`.

use super::Fault;
use super::figures::Figures;
use super::taker::{Came, Taker};
use crate::stamp::Stamp;

/// The fields' numbers of `proto/tokenway/v1/inference.proto`.
mod field {
    pub(super) const STARTED: u64 = 1;
    pub(super) const TOKENS: u64 = 2;
    pub(super) const SUMMARY: u64 = 3;
    pub(super) const TOKENS_FIRST_INDEX: u64 = 2;
    pub(super) const TOKENS_TOKENS: u64 = 3;
    pub(super) const TOKEN_TEXT: u64 = 2;
    pub(super) const TOKEN_DUE_NS: u64 = 3;
    pub(super) const TOKEN_EMITTED_NS: u64 = 4;
}

const HEAD: usize = 5;

/// The messages of one stream.
#[derive(Default)]
pub(super) struct Messages {
    unfinished: Vec<u8>,
    has_summary: bool,
}

impl Messages {
    /// Whether the summary has come, and nothing after it.
    pub(super) fn has_finished(&self) -> bool {
        self.has_summary && self.unfinished.is_empty()
    }

    /// Takes the next piece.
    pub(super) fn read(
        &mut self,
        piece: &[u8],
        received_ns: u64,
        taker: &mut impl Taker,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        if self.unfinished.is_empty() {
            let left = self.whole(piece, received_ns, taker, figures)?;
            self.unfinished.extend_from_slice(left);
            return Ok(());
        }
        let mut all = std::mem::take(&mut self.unfinished);
        all.extend_from_slice(piece);
        let left = self.whole(&all, received_ns, taker, figures)?;
        self.unfinished.extend_from_slice(left);
        Ok(())
    }

    /// Takes the messages that are whole, and returns what is left.
    fn whole<'a>(
        &mut self,
        mut bytes: &'a [u8],
        received_ns: u64,
        taker: &mut impl Taker,
        figures: &mut Figures,
    ) -> Result<&'a [u8], Fault> {
        while let Some((head, rest)) = bytes.split_at_checked(HEAD) {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some((message, rest)) = rest.split_at_checked(length) else {
                break;
            };
            self.event(message, received_ns, taker, figures)
                .ok_or_else(|| Fault::Malformed("a message that is no event".to_owned()))??;
            bytes = rest;
        }
        Ok(bytes)
    }

    fn event(
        &mut self,
        mut message: &[u8],
        received_ns: u64,
        taker: &mut impl Taker,
        figures: &mut Figures,
    ) -> Option<Result<(), Fault>> {
        while !message.is_empty() {
            match next(&mut message)? {
                (field::TOKENS, Value::Bytes(tokens)) => {
                    if let Err(fault) = take(tokens, received_ns, taker, figures)? {
                        return Some(Err(fault));
                    }
                }
                (field::SUMMARY, Value::Bytes(_)) => self.has_summary = true,
                (field::STARTED, Value::Bytes(_)) => {}
                _ => return None,
            }
        }
        Some(Ok(()))
    }
}

fn take(
    mut tokens: &[u8],
    received_ns: u64,
    taker: &mut impl Taker,
    figures: &mut Figures,
) -> Option<Result<(), Fault>> {
    // A number that is 0 is not written.
    let mut index = 0;
    while !tokens.is_empty() {
        match next(&mut tokens)? {
            (field::TOKENS_FIRST_INDEX, Value::Number(first_index)) => index = first_index,
            (field::TOKENS_TOKENS, Value::Bytes(token)) => {
                figures.token_bytes(token.len());
                let (text, stamp) = fields(token)?;
                let token = Came {
                    index,
                    text: Some(text),
                    received_ns,
                    stamp,
                };
                if let Err(fault) = taker.take(&token, figures) {
                    return Some(Err(fault));
                }
                index += 1;
            }
            _ => {}
        }
    }
    Some(Ok(()))
}

fn fields(mut token: &[u8]) -> Option<(&[u8], Option<Stamp>)> {
    let (mut text, mut due_ns, mut emitted_ns) = (&[][..], None, None);
    while !token.is_empty() {
        match next(&mut token)? {
            (field::TOKEN_TEXT, Value::Bytes(bytes)) => text = bytes,
            (field::TOKEN_DUE_NS, Value::Number(ns)) => due_ns = Some(ns),
            (field::TOKEN_EMITTED_NS, Value::Number(ns)) => emitted_ns = Some(ns),
            _ => {}
        }
    }
    let stamp = emitted_ns.map(|emitted_ns| Stamp { due_ns, emitted_ns });
    Some((text, stamp))
}

/// A field's value, of the two kinds that events have.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Takes the next field off a message.
fn next<'a>(message: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let key = varint(message)?;
    let value = match key & 7 {
        0 => Value::Number(varint(message)?),
        2 => {
            let length = usize::try_from(varint(message)?).ok()?;
            let (bytes, rest) = message.split_at_checked(length)?;
            *message = rest;
            Value::Bytes(bytes)
        }
        _ => return None,
    };
    Some((key >> 3, value))
}

fn varint(message: &mut &[u8]) -> Option<u64> {
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

#[cfg(test)]
mod tests {
    use prost::Message;
    use tokenway::proto::v1;
    use tokenway::proto::v1::completion_event::Event;

    use super::super::counted::Counted;
    use super::*;

    fn framed(event: Event) -> Vec<u8> {
        let message = v1::CompletionEvent { event: Some(event) }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), &message].concat()
    }

    fn tokens(first_index: u32, indices: &[u32]) -> Event {
        let token = |index: &u32| v1::Token {
            id: *index,
            text: format!("token_{index}"),
            due_ns: Some(100),
            emitted_ns: Some(400),
            logprobs: None,
        };
        Event::Tokens(v1::Tokens {
            first_index,
            tokens: indices.iter().map(token).collect(),
            ..v1::Tokens::default()
        })
    }

    fn read(pieces: &[&[u8]]) -> (Result<(), Fault>, Figures, Messages) {
        let (mut messages, mut counted, mut figures) =
            (Messages::default(), Counted::begin(0, 3), Figures::new());
        for piece in pieces {
            let read = messages.read(piece, 1_000, &mut counted, &mut figures);
            if read.is_err() {
                return (read, figures, messages);
            }
        }
        (Ok(()), figures, messages)
    }

    #[test]
    fn events_are_read_as_prost_writes_them_wherever_they_are_cut() {
        let events = [
            framed(Event::Started(v1::Started::default())),
            framed(tokens(0, &[0, 1])),
            framed(tokens(2, &[2])),
            framed(Event::Summary(v1::Summary::default())),
        ];
        let bytes = events.concat();
        for cut in 1..bytes.len() {
            let (ended, figures, messages) = read(&[&bytes[..cut], &bytes[cut..]]);
            ended.unwrap();
            assert_eq!(figures.tokens, 3);
            // The text takes 9 bytes, the times 2 and 3, and an id 2, but for 0, which is not written.
            assert_eq!(figures.token_bytes, 3 * (9 + 2 + 3) + 2 * 2);
            assert!(messages.has_finished());
            assert_eq!(figures.times.runner.max(), 300);
        }
    }

    #[test]
    fn a_token_that_is_lost_or_under_another_index_is_a_fault() {
        for wrong in [tokens(1, &[1]), tokens(0, &[0, 2]), tokens(1, &[0])] {
            assert!(read(&[&framed(wrong)]).0.is_err());
        }
    }
}
