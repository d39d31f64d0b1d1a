//! Messages of a gRPC stream, wherever pieces are cut: five bytes of head and a `CompletionEvent`. Only
//! the fields that a measurement needs are parsed.

use super::consumer::{Consumer, ReceivedToken};
use crate::fault::Fault;
use crate::figures::Figures;
use crate::stamp::Stamp;

/// Field numbers in `proto/tokenway/v1/inference.proto`.
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

/// Messages of one stream.
#[derive(Default)]
pub(super) struct Messages {
    unfinished: Vec<u8>,
    has_summary: bool,
}

impl Messages {
    /// Reports if the summary has arrived, and nothing after it.
    pub(super) fn has_finished(&self) -> bool {
        self.has_summary && self.unfinished.is_empty()
    }

    /// Reads the next piece.
    pub(super) fn read(
        &mut self,
        piece: &[u8],
        received_ns: u64,
        consumer: &mut impl Consumer,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        let mut all = std::mem::take(&mut self.unfinished);
        let left = if all.is_empty() {
            self.complete(piece, received_ns, consumer, figures)?
        } else {
            all.extend_from_slice(piece);
            self.complete(&all, received_ns, consumer, figures)?
        };
        self.unfinished = left.to_vec();
        Ok(())
    }

    /// Reads the messages that are complete, and returns the rest.
    fn complete<'a>(
        &mut self,
        mut bytes: &'a [u8],
        received_ns: u64,
        consumer: &mut impl Consumer,
        figures: &mut Figures,
    ) -> Result<&'a [u8], Fault> {
        while let Some((head, rest)) = bytes.split_at_checked(HEAD) {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some((message, rest)) = rest.split_at_checked(length) else {
                break;
            };
            self.event(message, received_ns, consumer, figures)?;
            bytes = rest;
        }
        Ok(bytes)
    }

    fn event(
        &mut self,
        mut message: &[u8],
        received_ns: u64,
        consumer: &mut impl Consumer,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        while !message.is_empty() {
            match next(&mut message)? {
                (field::TOKENS, Value::Bytes(tokens)) => {
                    read_tokens(tokens, received_ns, consumer, figures)?;
                }
                (field::SUMMARY, Value::Bytes(_)) => self.has_summary = true,
                (field::STARTED, Value::Bytes(_)) => {}
                _ => return Err(malformed()),
            }
        }
        Ok(())
    }
}

fn read_tokens(
    mut tokens: &[u8],
    received_ns: u64,
    consumer: &mut impl Consumer,
    figures: &mut Figures,
) -> Result<(), Fault> {
    // The wire format leaves out a number that is 0.
    let mut index = 0;
    while !tokens.is_empty() {
        match next(&mut tokens)? {
            (field::TOKENS_FIRST_INDEX, Value::Number(first_index)) => index = first_index,
            (field::TOKENS_TOKENS, Value::Bytes(token)) => {
                figures.token_bytes(token.len());
                consumer.token(&received(token, index, received_ns)?, figures)?;
                index += 1;
            }
            _ => {}
        }
    }
    Ok(())
}

fn received(mut token: &[u8], index: u64, received_ns: u64) -> Result<ReceivedToken<'_>, Fault> {
    let (mut text, mut due_ns, mut emitted_ns) = (&[][..], None, None);
    while !token.is_empty() {
        match next(&mut token)? {
            (field::TOKEN_TEXT, Value::Bytes(bytes)) => text = bytes,
            (field::TOKEN_DUE_NS, Value::Number(ns)) => due_ns = Some(ns),
            (field::TOKEN_EMITTED_NS, Value::Number(ns)) => emitted_ns = Some(ns),
            _ => {}
        }
    }
    Ok(ReceivedToken {
        index,
        text: Some(text),
        received_ns,
        stamp: emitted_ns.map(|emitted_ns| Stamp { due_ns, emitted_ns }),
    })
}

/// A field's value, of the two wire types that events have.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Splits the next field off a message.
fn next<'a>(message: &mut &'a [u8]) -> Result<(u64, Value<'a>), Fault> {
    let key = varint(message)?;
    let value = match key & 7 {
        0 => Value::Number(varint(message)?),
        2 => {
            let length = usize::try_from(varint(message)?).unwrap_or(usize::MAX);
            let (bytes, rest) = message.split_at_checked(length).ok_or_else(malformed)?;
            *message = rest;
            Value::Bytes(bytes)
        }
        _ => return Err(malformed()),
    };
    Ok((key >> 3, value))
}

fn varint(message: &mut &[u8]) -> Result<u64, Fault> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().ok_or_else(malformed)?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(malformed())
}

fn malformed() -> Fault {
    Fault::Malformed("a message that is not a completion event".to_owned())
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tokenway::proto::v1;
    use tokenway::proto::v1::completion_event::Event;

    use super::super::counting::Counting;
    use super::*;
    use crate::stream::framed;

    fn message(event: Event) -> Vec<u8> {
        framed(&v1::CompletionEvent { event: Some(event) }.encode_to_vec()).to_vec()
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

    fn read(pieces: &[&[u8]]) -> Result<(Figures, Messages), Fault> {
        let (mut messages, mut counting, mut figures) =
            (Messages::default(), Counting::start(0, 3), Figures::new());
        for piece in pieces {
            messages.read(piece, 1_000, &mut counting, &mut figures)?;
        }
        Ok((figures, messages))
    }

    #[test]
    fn events_are_read_as_prost_writes_them_wherever_they_are_cut() {
        let bytes = [
            message(Event::Started(v1::Started::default())),
            message(tokens(0, &[0, 1])),
            message(tokens(2, &[2])),
            message(Event::Summary(v1::Summary::default())),
        ]
        .concat();
        for cut in 1..bytes.len() {
            let (figures, messages) = read(&[&bytes[..cut], &bytes[cut..]]).unwrap();
            assert_eq!(figures.tokens, 3);
            // A text takes 9 bytes, the times 2 and 3, and an id 2, except 0, which is left out.
            assert_eq!(figures.token_bytes, 3 * (9 + 2 + 3) + 2 * 2);
            assert!(messages.has_finished());
            assert_eq!(figures.times.runner.max(), 300);
        }
    }

    #[test]
    fn a_token_that_is_lost_or_has_another_index_is_a_fault() {
        for wrong in [tokens(1, &[1]), tokens(0, &[0, 2]), tokens(1, &[0])] {
            assert!(read(&[&message(wrong)]).is_err());
        }
    }
}
