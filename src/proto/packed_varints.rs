//! A list of numbers as it is on the wire, where one behind the other takes the fewest bytes.

use bytes::{Buf, BufMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, bytes as raw, decode_varint, encode_varint, uint32,
};

/// A packed `repeated uint32`. It is not taken apart until it is read, and a message that is sent is a copy of
/// what was pushed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedVarints {
    wire: Vec<u8>,
    count: usize,
}

/// The bit of a byte that says that its number goes on in the next.
const CONTINUATION_BIT: u8 = 0x80;

impl PackedVarints {
    /// None yet, with room for so many bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self {
            wire: Vec::with_capacity(bytes),
            count: 0,
        }
    }

    /// Appends a number.
    pub fn push(&mut self, number: u32) {
        encode_varint(number.into(), &mut self.wire);
        self.count += 1;
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The numbers, in order.
    #[must_use]
    pub fn iter(&self) -> PackedVarintsIter<'_> {
        PackedVarintsIter {
            wire: &self.wire,
            count: self.count,
        }
    }

    pub(super) fn merge(
        &mut self,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        if wire_type != WireType::LengthDelimited {
            // Whoever writes them one by one may do so.
            let mut number = 0;
            uint32::merge(wire_type, &mut number, buf, ctx)?;
            self.push(number);
            return Ok(());
        }
        let mut wire = Vec::new();
        raw::merge(wire_type, &mut wire, buf, ctx)?;
        let end = wire.iter().rposition(|byte| byte & CONTINUATION_BIT == 0);
        let mut rest = &wire[end.map_or(0, |end| end + 1)..];
        if !rest.is_empty() {
            // A number that is cut off: prost knows what to say.
            decode_varint(&mut rest)?;
        }
        self.count += wire
            .iter()
            .filter(|byte| *byte & CONTINUATION_BIT == 0)
            .count();
        if self.wire.is_empty() {
            self.wire = wire;
        } else {
            self.wire.append(&mut wire);
        }
        Ok(())
    }

    pub(super) fn encode(&self, tag: u32, buf: &mut impl BufMut) {
        if !self.is_empty() {
            raw::encode(tag, &self.wire, buf);
        }
    }

    pub(super) fn encoded_len(&self, tag: u32) -> usize {
        if self.is_empty() {
            0
        } else {
            raw::encoded_len(tag, &self.wire)
        }
    }
}

impl FromIterator<u32> for PackedVarints {
    fn from_iter<T: IntoIterator<Item = u32>>(numbers: T) -> Self {
        let mut packed = Self::default();
        for number in numbers {
            packed.push(number);
        }
        packed
    }
}

/// The numbers of a [`PackedVarints`].
#[derive(Clone, Debug)]
pub struct PackedVarintsIter<'a> {
    wire: &'a [u8],
    count: usize,
}

impl Iterator for PackedVarintsIter<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let end = self
            .wire
            .iter()
            .position(|byte| byte & CONTINUATION_BIT == 0)?;
        let (number, rest) = self.wire.split_at(end + 1);
        self.wire = rest;
        self.count -= 1;
        // What is above the lowest 32 bits is dropped, as it is elsewhere.
        let with = |number: u32, byte: &u8| number << 7 | u32::from(byte & !CONTINUATION_BIT);
        Some(number.iter().rev().fold(0, with))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count, Some(self.count))
    }
}

impl ExactSizeIterator for PackedVarintsIter<'_> {}
