//! Property tests of the hand-written messages, with arbitrary messages and with broken encodings.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message;

use super::fuzzing;
use super::generated::{GeneratedSequenceStep, GeneratedStep, GeneratedTokens};
use super::packed_varints::PackedVarints;
use super::{v1, worker};

/// Numbers whose varints have every length.
fn number() -> impl Strategy<Value = u32> {
    (0..=32_u32, any::<u32>())
        .prop_map(|(bits, number)| number & u32::MAX.checked_shr(32 - bits).unwrap_or(0))
}

fn logprobs() -> impl Strategy<Value = v1::Logprobs> {
    let top = (number(), vec(any::<u8>(), 0..4), -100.0..0.0_f32);
    let top = top.prop_map(|(id, token_bytes, logprob)| v1::TopLogprob {
        id,
        token_bytes,
        logprob,
    });
    let parts = (
        option::of(-100.0..0.0_f32),
        vec(any::<u8>(), 0..4),
        vec(top, 0..3),
    );
    parts.prop_map(|(logprob, token_bytes, top)| v1::Logprobs {
        logprob,
        token_bytes,
        top,
    })
}

/// Times are above 0, because 0 means "unknown" in the hand-written code.
fn token() -> impl Strategy<Value = v1::Token> {
    let times = (option::of(1..u64::MAX), option::of(1..u64::MAX));
    (number(), any::<String>(), times, option::of(logprobs())).prop_map(
        |(id, text, (due_ns, emitted_ns), logprobs)| v1::Token {
            id,
            text,
            due_ns,
            emitted_ns,
            logprobs,
        },
    )
}

fn tokens() -> impl Strategy<Value = GeneratedTokens> {
    (number(), number(), vec(token(), 0..5), any::<i32>()).prop_map(
        |(choice, first_index, tokens, finish_reason)| GeneratedTokens {
            choice,
            first_index,
            tokens,
            finish_reason,
        },
    )
}

fn sequence_step() -> impl Strategy<Value = GeneratedSequenceStep> {
    let failure = (any::<bool>(), any::<String>());
    let failure = failure.prop_map(|(is_invalid, message)| worker::Failure {
        is_invalid,
        message,
    });
    let lists = (
        vec(number(), 0..6),
        vec(number(), 0..6),
        vec(any::<u64>(), 0..6),
        vec(any::<u64>(), 0..6),
    );
    let end = (any::<bool>(), any::<i32>(), option::of(failure));
    (any::<u64>(), number(), vec(any::<u8>(), 0..8), lists, end).prop_map(
        |(
            sequence,
            first_index,
            bytes,
            (ids, lengths, due_ns, emitted_ns),
            (is_prompt, end, failure),
        )| {
            GeneratedSequenceStep {
                sequence,
                first_index,
                logprobs: ids.iter().map(|_| v1::Logprobs::default()).collect(),
                ids,
                bytes,
                lengths,
                is_prompt,
                due_ns,
                emitted_ns,
                end,
                failure,
            }
        },
    )
}

fn step() -> impl Strategy<Value = GeneratedStep> {
    vec(sequence_step(), 0..4).prop_map(|sequences| GeneratedStep { sequences })
}

/// Replaces `removed` bytes of an encoding with `added`, at a random position.
fn with_fault(mut encoded: Vec<u8>, at: Index, removed: usize, added: Vec<u8>) -> Vec<u8> {
    let from = at.index(encoded.len() + 1);
    let to = (from + removed).min(encoded.len());
    encoded.splice(from..to, added);
    encoded
}

proptest! {
    #[test]
    fn any_numbers_read_back_from_their_varints(numbers in vec(number(), 0..40)) {
        let packed: PackedVarints = numbers.iter().copied().collect();
        prop_assert_eq!(packed.len(), numbers.len());
        prop_assert_eq!(packed.iter().collect::<Vec<_>>(), numbers);
    }

    #[test]
    fn any_tokens_encode_like_the_generated_message(message in tokens()) {
        let encoded = message.encode_to_vec();
        let written = v1::Tokens::from(message);
        prop_assert_eq!(written.encode_to_vec(), &encoded[..]);
        prop_assert_eq!(written.encoded_len(), encoded.len());
        prop_assert_eq!(v1::Tokens::decode(&*encoded), Ok(written));
    }

    #[test]
    fn any_step_encodes_like_the_generated_message(message in step()) {
        let encoded = message.encode_to_vec();
        let sequences = message.sequences.into_iter().map(Into::into).collect();
        let written = worker::Step { sequences };
        prop_assert_eq!(written.encode_to_vec(), &encoded[..]);
        prop_assert_eq!(written.encoded_len(), encoded.len());
        prop_assert_eq!(worker::Step::decode(&*encoded), Ok(written));
    }

    #[test]
    fn a_broken_encoding_is_read_like_the_generated_message_reads_it(
        tokens in tokens(),
        step in step(),
        at: Index,
        removed in 0..4_usize,
        added in vec(any::<u8>(), 0..4),
        split: u8,
    ) {
        let input = |encoded: Vec<u8>| {
            [vec![split], with_fault(encoded, at, removed, added.clone())].concat()
        };
        fuzzing::tokens(&input(tokens.encode_to_vec()));
        fuzzing::step(&input(step.encode_to_vec()));
    }
}
