//! Hand-written messages `Step` and `SequenceStep`. Their wire format is defined in `worker.proto`. In memory, their
//! lists of small numbers stay in the wire encoding. These messages carry every token of a worker in another process,
//! so they dominate the cost of encoding and decoding there.
//!
//! An entry can be as small as two bytes on the wire but uses a hundred times as much memory. Decoding therefore
//! limits the number of entries.

use bytes::{Buf, BufMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, bool, bytes as raw, fixed64, int32, message, skip_field, uint32,
    uint64,
};

use super::packed_varints::PackedVarints;
use super::v1::Logprobs;
use super::worker::{End, Failure};

/// Maximum number of entries in a step: for each of a worker's 65,536 slots, one entry with prompt tokens and one
/// with completion tokens.
pub const MAX_STEP_ENTRIES: usize = 131_072;

/// Output of one device step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Output for each sequence. Decoding keeps at most one entry more than [`MAX_STEP_ENTRIES`], so that the
    /// receiver can detect a step that is too large.
    pub sequences: Vec<SequenceStep>,
}

/// Output of a device step for one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceStep {
    /// Id of the sequence.
    pub sequence: u64,
    /// Index of the first token.
    pub first_index: u32,
    /// Ids of the tokens.
    pub ids: PackedVarints,
    /// Concatenated bytes of all tokens.
    pub bytes: Vec<u8>,
    /// Length in bytes of each token.
    pub lengths: PackedVarints,
    /// True if these are prompt tokens.
    pub is_prompt: bool,
    /// Scheduled emission time of each token, in nanoseconds of CLOCK_MONOTONIC.
    pub due_ns: Vec<u64>,
    /// Actual emission time of each token, in nanoseconds of CLOCK_MONOTONIC.
    pub emitted_ns: Vec<u64>,
    /// Log probabilities of each token. Decoding keeps at most one item more than there are ids, so that the receiver
    /// can detect surplus items.
    pub logprobs: Vec<Logprobs>,
    /// Reason why the sequence ended, a value of [`End`].
    pub end: i32,
    /// Description of the failure if the sequence failed.
    pub failure: Option<Failure>,
}

/// Field numbers of the messages `Step` (`SEQUENCES`) and `SequenceStep` (all others).
mod field {
    pub(super) const SEQUENCES: u32 = 1;

    pub(super) const SEQUENCE: u32 = 1;
    pub(super) const FIRST_INDEX: u32 = 2;
    pub(super) const IDS: u32 = 3;
    pub(super) const BYTES: u32 = 4;
    pub(super) const LENGTHS: u32 = 5;
    pub(super) const IS_PROMPT: u32 = 6;
    pub(super) const DUE_NS: u32 = 7;
    pub(super) const EMITTED_NS: u32 = 8;
    pub(super) const LOGPROBS: u32 = 9;
    pub(super) const END: u32 = 10;
    pub(super) const FAILURE: u32 = 11;
}

impl SequenceStep {
    /// Returns the reason why the sequence ended.
    #[must_use]
    pub fn end(&self) -> End {
        End::try_from(self.end).unwrap_or_default()
    }

    /// Decodes a list of times. Reserves memory for one time per id, because the ids come first on the wire.
    fn merge_times(
        times: &mut Vec<u64>,
        tokens: usize,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        // The peer chooses the number of ids, so the size of the rest of the message bounds the reservation.
        times.reserve(tokens.min(buf.remaining() / size_of::<u64>()));
        fixed64::merge_repeated(wire_type, times, buf, ctx)
    }
}

/// A list for decoding. It keeps at most one item more than `max`.
struct BoundedList<'a, M> {
    list: &'a mut Vec<M>,
    max: usize,
}

impl<M: prost::Message + Default> BoundedList<'_, M> {
    /// Decodes a message and appends it to the list. If the list is full, skips the message.
    fn merge(
        self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        if self.list.len() > self.max {
            return skip_field(wire_type, tag, buf, ctx);
        }
        message::merge_repeated(wire_type, self.list, buf, ctx)
    }
}

impl prost::Message for Step {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        message::encode_repeated(field::SEQUENCES, &self.sequences, buf);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            field::SEQUENCES => {
                let (list, max) = (&mut self.sequences, MAX_STEP_ENTRIES);
                BoundedList { list, max }.merge(tag, wire_type, buf, ctx)
            }
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        message::encoded_len_repeated(field::SEQUENCES, &self.sequences)
    }

    fn clear(&mut self) {
        self.sequences.clear();
    }
}

impl prost::Message for SequenceStep {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if self.sequence != 0 {
            uint64::encode(field::SEQUENCE, &self.sequence, buf);
        }
        if self.first_index != 0 {
            uint32::encode(field::FIRST_INDEX, &self.first_index, buf);
        }
        self.ids.encode(field::IDS, buf);
        if !self.bytes.is_empty() {
            raw::encode(field::BYTES, &self.bytes, buf);
        }
        self.lengths.encode(field::LENGTHS, buf);
        if self.is_prompt {
            bool::encode(field::IS_PROMPT, &self.is_prompt, buf);
        }
        fixed64::encode_packed(field::DUE_NS, &self.due_ns, buf);
        fixed64::encode_packed(field::EMITTED_NS, &self.emitted_ns, buf);
        message::encode_repeated(field::LOGPROBS, &self.logprobs, buf);
        if self.end != 0 {
            int32::encode(field::END, &self.end, buf);
        }
        if let Some(failure) = &self.failure {
            message::encode(field::FAILURE, failure, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let tokens = self.ids.len();
        match tag {
            field::SEQUENCE => uint64::merge(wire_type, &mut self.sequence, buf, ctx),
            field::FIRST_INDEX => uint32::merge(wire_type, &mut self.first_index, buf, ctx),
            field::IDS => self.ids.merge(wire_type, buf, ctx),
            field::BYTES => raw::merge(wire_type, &mut self.bytes, buf, ctx),
            field::LENGTHS => self.lengths.merge(wire_type, buf, ctx),
            field::IS_PROMPT => bool::merge(wire_type, &mut self.is_prompt, buf, ctx),
            field::DUE_NS => Self::merge_times(&mut self.due_ns, tokens, wire_type, buf, ctx),
            field::EMITTED_NS => {
                Self::merge_times(&mut self.emitted_ns, tokens, wire_type, buf, ctx)
            }
            field::LOGPROBS => {
                let list = &mut self.logprobs;
                BoundedList { list, max: tokens }.merge(tag, wire_type, buf, ctx)
            }
            field::END => int32::merge(wire_type, &mut self.end, buf, ctx),
            field::FAILURE => {
                let failure = self.failure.get_or_insert_with(Failure::default);
                message::merge(wire_type, failure, buf, ctx)
            }
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let sequence = match self.sequence {
            0 => 0,
            sequence => uint64::encoded_len(field::SEQUENCE, &sequence),
        };
        let first_index = match self.first_index {
            0 => 0,
            first => uint32::encoded_len(field::FIRST_INDEX, &first),
        };
        let text = match self.bytes.len() {
            0 => 0,
            _ => raw::encoded_len(field::BYTES, &self.bytes),
        };
        let is_prompt = match self.is_prompt {
            false => 0,
            true => bool::encoded_len(field::IS_PROMPT, &true),
        };
        let end = match self.end {
            0 => 0,
            end => int32::encoded_len(field::END, &end),
        };
        let failure = self.failure.as_ref();
        sequence
            + first_index
            + self.ids.encoded_len(field::IDS)
            + text
            + self.lengths.encoded_len(field::LENGTHS)
            + is_prompt
            + fixed64::encoded_len_packed(field::DUE_NS, &self.due_ns)
            + fixed64::encoded_len_packed(field::EMITTED_NS, &self.emitted_ns)
            + message::encoded_len_repeated(field::LOGPROBS, &self.logprobs)
            + end
            + failure.map_or(0, |failure| message::encoded_len(field::FAILURE, failure))
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::generated::{GeneratedSequenceStep as Generated, GeneratedStep};

    /// A `SequenceStep` whose lists are written in the unpacked encoding.
    #[derive(Clone, PartialEq, Message)]
    struct Unpacked {
        #[prost(uint32, repeated, packed = "false", tag = "3")]
        ids: Vec<u32>,
        #[prost(uint32, repeated, packed = "false", tag = "5")]
        lengths: Vec<u32>,
        #[prost(fixed64, repeated, packed = "false", tag = "7")]
        due_ns: Vec<u64>,
    }

    /// Ids whose varints have different lengths.
    const IDS: [u32; 8] = [0, 1, 127, 128, 16_383, 16_384, 1 << 28, u32::MAX];

    fn full() -> Generated {
        Generated {
            sequence: u64::MAX,
            first_index: 300,
            ids: IDS.to_vec(),
            bytes: vec![7; 200],
            lengths: vec![25; 8],
            is_prompt: true,
            due_ns: vec![1, u64::MAX],
            emitted_ns: vec![0; 8],
            logprobs: vec![Logprobs {
                logprob: Some(-1.0),
                ..Logprobs::default()
            }],
            end: End::Failed.into(),
            failure: Some(Failure {
                is_invalid: true,
                message: "out of memory".to_owned(),
            }),
        }
    }

    #[test]
    fn a_sequence_step_encodes_like_the_generated_message() {
        for message in [full(), Generated::default()] {
            let wire = message.encode_to_vec();
            let step = SequenceStep::from(message);
            assert_eq!(step.encode_to_vec(), wire);
            assert_eq!(SequenceStep::decode(&*wire), Ok(step));
        }
    }

    #[test]
    fn a_step_encodes_like_the_generated_message() {
        for sequences in [vec![], vec![full(), Generated::default(), full()]] {
            let wire = GeneratedStep {
                sequences: sequences.clone(),
            };
            let wire = wire.encode_to_vec();
            let sequences = sequences.into_iter().map(SequenceStep::from).collect();
            let step = Step { sequences };
            assert_eq!(step.encode_to_vec(), wire);
            assert_eq!(Step::decode(&*wire), Ok(step));
        }
    }

    #[test]
    fn decoding_keeps_at_most_one_entry_over_the_limit() {
        for (count, kept) in [
            (MAX_STEP_ENTRIES, MAX_STEP_ENTRIES),
            (MAX_STEP_ENTRIES + 1, MAX_STEP_ENTRIES + 1),
            (8 * MAX_STEP_ENTRIES, MAX_STEP_ENTRIES + 1),
        ] {
            // Field 1 with length 0.
            let wire = [0x0a, 0].repeat(count);
            let step = Step::decode(&*wire).unwrap();
            assert_eq!(step.sequences.len(), kept);
        }
    }

    #[test]
    fn decoding_keeps_at_most_one_logprobs_entry_more_than_ids() {
        for (count, kept) in [(7, 7), (8, 8), (100, 9)] {
            let message = Generated {
                logprobs: vec![Logprobs::default(); count],
                ..full()
            };
            let step = SequenceStep::decode(&*message.encode_to_vec()).unwrap();
            assert_eq!(step.logprobs.len(), kept);
        }
    }

    #[test]
    fn unpacked_and_repeated_packed_fields_decode_into_one_list() {
        let (ids, due_ns) = (IDS.to_vec(), vec![1, 2]);
        let lengths = ids.clone();
        let unpacked = Unpacked {
            ids,
            lengths,
            due_ns,
        };
        let mut wire = unpacked.encode_to_vec();
        wire.extend(full().encode_to_vec());
        let step = SequenceStep::decode(&*wire).unwrap();
        assert!(step.ids.iter().eq([IDS, IDS].concat()));
        assert_eq!((step.ids.len(), step.lengths.len()), (16, 16));
        assert_eq!(step.due_ns, [1, 2, 1, u64::MAX]);
    }

    #[test]
    fn a_truncated_list_is_an_error() {
        // In this order: an incomplete varint in field 3, a length beyond the end of the message, and a list of
        // fixed64 with only 3 bytes.
        for wire in [&[0x1a, 2, 1, 0x80][..], &[0x1a, 2, 1], &[0x3a, 3, 0, 0, 0]] {
            SequenceStep::decode(wire).expect_err("the list is truncated");
        }
    }

    #[test]
    fn decoding_reserves_no_more_than_the_message_can_hold() {
        let message = Generated {
            ids: vec![0; 100_000],
            due_ns: vec![1],
            ..Generated::default()
        };
        let step = SequenceStep::decode(&*message.encode_to_vec()).unwrap();
        assert!(step.due_ns.capacity() < 16, "{}", step.due_ns.capacity());
    }
}
