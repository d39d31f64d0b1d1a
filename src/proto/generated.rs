//! The hand-written messages as prost would generate them, to compare both with each other.

use prost::Message;

use super::{v1, worker};

/// `Tokens`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GeneratedTokens {
    #[prost(uint32, tag = "1")]
    pub(super) choice: u32,
    #[prost(uint32, tag = "2")]
    pub(super) first_index: u32,
    #[prost(message, repeated, tag = "3")]
    pub(super) tokens: Vec<v1::Token>,
    #[prost(enumeration = "v1::FinishReason", tag = "4")]
    pub(super) finish_reason: i32,
}

/// `SequenceStep`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GeneratedSequenceStep {
    #[prost(uint64, tag = "1")]
    pub(super) sequence: u64,
    #[prost(uint32, tag = "2")]
    pub(super) first_index: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub(super) ids: Vec<u32>,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) bytes: Vec<u8>,
    #[prost(uint32, repeated, tag = "5")]
    pub(super) lengths: Vec<u32>,
    #[prost(bool, tag = "6")]
    pub(super) is_prompt: bool,
    #[prost(fixed64, repeated, tag = "7")]
    pub(super) due_ns: Vec<u64>,
    #[prost(fixed64, repeated, tag = "8")]
    pub(super) emitted_ns: Vec<u64>,
    #[prost(message, repeated, tag = "9")]
    pub(super) logprobs: Vec<v1::Logprobs>,
    #[prost(enumeration = "worker::End", tag = "10")]
    pub(super) end: i32,
    #[prost(message, optional, tag = "11")]
    pub(super) failure: Option<worker::Failure>,
}

/// `Step`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GeneratedStep {
    #[prost(message, repeated, tag = "1")]
    pub(super) sequences: Vec<GeneratedSequenceStep>,
}

impl From<GeneratedTokens> for v1::Tokens {
    fn from(message: GeneratedTokens) -> Self {
        Self {
            choice: message.choice,
            first_index: message.first_index,
            tokens: message.tokens.into_iter().collect(),
            finish_reason: message.finish_reason,
        }
    }
}

impl From<GeneratedSequenceStep> for worker::SequenceStep {
    fn from(message: GeneratedSequenceStep) -> Self {
        Self {
            sequence: message.sequence,
            first_index: message.first_index,
            ids: message.ids.into_iter().collect(),
            bytes: message.bytes,
            lengths: message.lengths.into_iter().collect(),
            is_prompt: message.is_prompt,
            due_ns: message.due_ns,
            emitted_ns: message.emitted_ns,
            logprobs: message.logprobs,
            end: message.end,
            failure: message.failure,
        }
    }
}

impl From<GeneratedStep> for worker::Step {
    fn from(message: GeneratedStep) -> Self {
        Self {
            sequences: message.sequences.into_iter().map(Into::into).collect(),
        }
    }
}
