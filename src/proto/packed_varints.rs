//! A list of numbers that stays in protobuf's wire encoding.

use bytes::{Buf, BufMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, bytes as raw, decode_varint, encode_varint, uint32,
};

/// A packed `repeated uint32`, stored as encoded varints. Decoding copies the bytes, and parses them only during
/// iteration. Encoding copies the stored bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedVarints {
    wire: Vec<u8>,
    count: usize,
}

/// Bit that is set in every byte of a varint except its last.
const CONTINUATION_BIT: u8 = 0x80;

impl PackedVarints {
    /// Creates an empty list with a capacity of `bytes` encoded bytes.
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

    /// Returns the number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns true if the list is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Iterates over the numbers in order.
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
            // The proto3 specification also allows unpacked elements in a packed field.
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
            // The last varint is incomplete. Decoding it returns prost's error.
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

/// Iterator over the numbers of a [`PackedVarints`].
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
        // Bits above the lowest 32 are dropped, as prost does when it decodes a uint32.
        let append = |number: u32, byte: &u8| number << 7 | u32::from(byte & !CONTINUATION_BIT);
        Some(number.iter().rev().fold(0, append))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count, Some(self.count))
    }
}

impl ExactSizeIterator for PackedVarintsIter<'_> {}
