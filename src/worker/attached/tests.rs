//! Tests of the sequences of a remote worker: valid and invalid steps, credit, cancellation and failures.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::sequences::Sequences;
use crate::proto::v1;
use crate::proto::worker as proto;
use crate::request::FinishReason;
use crate::runner::{ModelError, Sequence};
use crate::worker::token_channel::{Failure, Output, TokenReceiver, token_channel};
use crate::worker::wire::SequenceId;
use crate::worker::{Assignment, AssignmentId};

mod children;
mod scoring;

const NO_SLOW_READER_TIMEOUT: u64 = u64::MAX;
/// Id of every assignment.
const ID: AssignmentId = AssignmentId(7);

/// Creates a sequence whose token channel has this credit. The client already has `delivered` tokens.
fn assignment(credit: usize, max_tokens: u32, delivered: u32) -> (Assignment, TokenReceiver) {
    let (sender, receiver) = token_channel(credit, Arc::new(Notify::new()), Counter::noop());
    let sequence = Sequence {
        delivered: (0..delivered).collect(),
        ..Sequence::new([0], max_tokens)
    };
    let assignment = Assignment {
        id: ID,
        sequence,
        token_channel: sender,
        deadline: Instant::now() + Duration::from_secs(3_600),
        prompt_blocks: Arc::default(),
        is_suspect: false,
    };
    (assignment, receiver)
}

/// Creates the sequences of a worker with this number of slots, in generation 3.
fn sequences(slots: usize) -> Sequences {
    let last = SequenceId {
        number: 0,
        generation: 3,
    };
    Sequences::new(slots, NO_SLOW_READER_TIMEOUT, last)
}

fn accepted_message(sequence: u64) -> proto::Accepted {
    proto::Accepted {
        sequence,
        cached_tokens: 0,
    }
}

/// Submits `assignment` to a worker with one slot that accepts it. Returns the worker's sequences, and the number and
/// credit of the new one.
fn accepted(assignment: Assignment) -> (Sequences, u64, u32) {
    let mut sequences = sequences(1);
    let submit = sequences
        .submit(assignment)
        .expect("the sequence is runnable");
    assert_eq!(submit.generation, 3);
    sequences
        .handle_accepted(accepted_message(submit.sequence))
        .unwrap();
    (sequences, submit.sequence, submit.credit)
}

/// Creates a step with `count` tokens whose indices start at `first_index`. Each token's id is its index.
fn step(sequence: u64, first_index: u32, count: u32, end: proto::End) -> proto::Step {
    let ids: proto::PackedVarints = (first_index..first_index + count).collect();
    let entry = proto::SequenceStep {
        sequence,
        first_index,
        bytes: vec![b'x'; ids.len()],
        lengths: ids.iter().map(|_| 1).collect(),
        ids,
        end: end.into(),
        ..proto::SequenceStep::default()
    };
    proto::Step {
        sequences: vec![entry],
    }
}

const CONTINUES: proto::End = proto::End::Unspecified;

async fn read(receiver: &mut TokenReceiver) -> Vec<Output> {
    let mut outputs = Vec::new();
    poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, 64)).await;
    outputs
}

fn ids(outputs: &[Output]) -> Vec<u32> {
    let tokens = outputs.iter().flat_map(Output::completion_tokens);
    tokens.map(|token| token.id).collect()
}

#[tokio::test]
async fn tokens_arrive_in_order_and_the_last_one_ends_the_sequence() {
    let (assignment, mut reader) = assignment(8, 3, 0);
    let (mut sequences, number, credit) = accepted(assignment);
    assert_eq!(credit, 3, "credit is at most max_tokens");
    sequences
        .handle_step(step(number, 0, 2, CONTINUES), 1)
        .unwrap();
    sequences
        .handle_step(step(number, 2, 1, proto::End::Length), 1)
        .unwrap();
    let outputs = read(&mut reader).await;
    assert!(matches!(outputs[0], Output::Accepted { .. }));
    assert_eq!(ids(&outputs), [0, 1, 2]);
    let end = outputs.last();
    assert!(matches!(
        end,
        Some(Output::Finished(Some(_), FinishReason::Length))
    ));
    assert_eq!(sequences.take_effects().released, [ID]);
}

#[tokio::test]
async fn a_resumed_sequence_continues_after_its_delivered_tokens() {
    let (assignment, mut reader) = assignment(8, 5, 3);
    let (mut sequences, number, credit) = accepted(assignment);
    assert_eq!(credit, 2);
    assert!(
        sequences
            .handle_step(step(number, 0, 1, CONTINUES), 1)
            .is_err()
    );
    let (assignment, _) = self::assignment(8, 5, 3);
    drop(assignment);
    sequences
        .handle_step(step(number, 3, 2, proto::End::Stop), 1)
        .unwrap();
    assert_eq!(ids(&read(&mut reader).await), [3, 4]);
}

#[test]
fn a_gap_a_repetition_or_a_token_without_credit_is_a_violation() {
    for (first_index, count, rule) in [
        (1, 1, "sequence 1 has first_index 1, expected 0"),
        (0, 3, "sequence 1 has more tokens than credit"),
    ] {
        let (assignment, _reader) = assignment(2, 100, 0);
        let (mut sequences, number, credit) = accepted(assignment);
        assert_eq!(credit, 2);
        let violation = sequences.handle_step(step(number, first_index, count, CONTINUES), 1);
        assert_eq!(violation.unwrap_err().to_string(), rule);
    }
    let (assignment, _reader) = assignment(2, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    sequences
        .handle_step(step(number, 0, 1, CONTINUES), 1)
        .unwrap();
    let violation = sequences
        .handle_step(step(number, 0, 1, CONTINUES), 1)
        .unwrap_err();
    assert_eq!(
        violation.to_string(),
        "sequence 1 has first_index 0, expected 1"
    );
}

#[test]
fn an_inconsistent_step_is_a_violation() {
    type Change = fn(&mut proto::SequenceStep);
    let changes: [(&str, Change); 8] = [
        ("ends with END_LENGTH before it has max_tokens", |entry| {
            entry.end = proto::End::Length.into();
        }),
        ("at most 1024 bytes each", |entry| {
            entry.bytes = vec![b'x'; 1_025];
            entry.lengths = proto::PackedVarints::from_iter([1_025]);
        }),
        ("logprobs must be from -9999 to 0", |entry| {
            entry.logprobs = vec![v1::Logprobs {
                logprob: Some(f32::NAN),
                ..v1::Logprobs::default()
            }];
        }),
        ("logprobs must be from -9999 to 0", |entry| {
            entry.logprobs = vec![v1::Logprobs {
                logprob: Some(0.002),
                ..v1::Logprobs::default()
            }];
        }),
        ("lengths must have as many entries as ids", |entry| {
            entry.lengths = proto::PackedVarints::default();
        }),
        ("add up to the length of bytes", |entry| {
            entry.lengths = proto::PackedVarints::from_iter([2]);
        }),
        ("emitted_ns must have as many entries as ids", |entry| {
            entry.emitted_ns = vec![1, 2]
        }),
        ("END_STOP but without a token", |entry| {
            *entry = proto::SequenceStep {
                sequence: entry.sequence,
                end: proto::End::Stop.into(),
                ..proto::SequenceStep::default()
            };
        }),
    ];
    for (rule, change) in changes {
        let (assignment, _reader) = assignment(2, 100, 0);
        let (mut sequences, number, _) = accepted(assignment);
        let mut step = step(number, 0, 1, CONTINUES);
        change(&mut step.sequences[0]);
        let violation = sequences.handle_step(step, 1).unwrap_err().to_string();
        assert!(violation.contains(rule), "{violation}");
    }
    let (assignment, _reader) = assignment(2, 100, 0);
    let mut sequences = sequences(1);
    let submit = sequences
        .submit(assignment)
        .expect("the sequence is runnable");
    let violation = sequences.handle_step(step(submit.sequence, 0, 1, CONTINUES), 1);
    assert!(
        violation
            .unwrap_err()
            .to_string()
            .contains("before it was accepted")
    );
}

#[test]
fn a_step_with_too_many_entries_is_a_violation() {
    let entries = |count| proto::Step {
        sequences: vec![proto::SequenceStep::default(); count],
    };
    let mut sequences = sequences(1);
    let max_entries = proto::MAX_STEP_ENTRIES;
    sequences.handle_step(entries(max_entries), 1).unwrap();
    let violation = sequences
        .handle_step(entries(max_entries + 1), 1)
        .unwrap_err();
    assert!(
        violation.to_string().contains("at most 131072"),
        "{violation:?}"
    );
}

#[test]
fn tokens_without_requested_logprobs_are_a_violation() {
    let (mut assignment, _reader) = assignment(8, 100, 0);
    assignment.sequence.options.logprobs = Some(0);
    let (mut sequences, number, _) = accepted(assignment);
    let mut with_logprobs = step(number, 0, 1, CONTINUES);
    with_logprobs.sequences[0].logprobs = vec![v1::Logprobs::default()];
    sequences.handle_step(with_logprobs, 1).unwrap();
    let violation = sequences
        .handle_step(step(number, 1, 1, CONTINUES), 1)
        .unwrap_err();
    assert!(
        violation.to_string().contains("without their log"),
        "{violation:?}"
    );
}

#[tokio::test]
async fn a_single_last_token_and_its_end_are_one_output() {
    let (assignment, mut reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let last = step(number, 0, 1, proto::End::Stop);
    sequences.handle_step(last, 1).unwrap();
    let outputs = read(&mut reader).await;
    assert!(
        matches!(
            &outputs[..],
            [
                Output::Accepted { .. },
                Output::Finished(Some(_), FinishReason::Stop)
            ]
        ),
        "{outputs:?}"
    );
}

#[tokio::test]
async fn a_token_without_an_emission_time_gets_its_arrival_time() {
    let (assignment, mut reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let mut two = step(number, 0, 2, CONTINUES);
    two.sequences[0].emitted_ns = vec![0, 7];
    sequences.handle_step(two, 9).unwrap();
    let outputs = read(&mut reader).await;
    let emitted: Vec<_> = outputs
        .iter()
        .flat_map(Output::completion_tokens)
        .map(|it| it.emitted_ns)
        .collect();
    assert_eq!(emitted, [9, 7]);
}

#[tokio::test]
async fn credit_is_granted_again_after_the_reader_has_read() {
    let (assignment, mut reader) = assignment(2, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    sequences
        .handle_step(step(number, 0, 2, CONTINUES), 1)
        .unwrap();
    assert!(
        sequences.take_effects().grants.is_empty(),
        "the channel is full"
    );
    assert_eq!(ids(&read(&mut reader).await), [0, 1]);
    sequences.end_overdue_and_grant_credit(1);
    let grants = sequences.take_effects().grants;
    let expected = proto::Grant {
        sequence: number,
        tokens: 2,
    };
    assert_eq!(grants, [expected]);
}

#[test]
fn a_dropped_reader_cancels_the_sequence_and_late_tokens_are_ignored() {
    let (assignment, reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    drop(reader);
    sequences.end_overdue_and_grant_credit(1);
    let effects = sequences.take_effects();
    assert_eq!(
        (effects.cancelled, effects.released),
        (vec![number], vec![ID])
    );
    sequences
        .handle_step(step(number, 0, 1, CONTINUES), 1)
        .unwrap();
    let (next, _reader) = self::assignment(8, 100, 0);
    let next = sequences.submit(next).expect("the slot is free");
    assert_ne!(next.sequence, number);
}

#[test]
fn a_crash_suspect_that_ends_before_it_is_submitted_is_cleared() {
    let (mut suspect, reader) = assignment(8, 100, 0);
    suspect.is_suspect = true;
    drop(reader);
    let mut sequences = sequences(1);
    assert!(sequences.submit(suspect).is_none());
    let effects = sequences.take_effects();
    assert_eq!((effects.cleared, effects.released), (1, vec![ID]));
}

#[tokio::test]
async fn a_rejection_and_a_failure_end_only_their_own_sequence() {
    let failure = |is_invalid| proto::Failure {
        is_invalid,
        message: "no".to_owned(),
    };
    let (assignment, mut reader) = assignment(8, 100, 0);
    let mut sequences = sequences(2);
    let refused = sequences
        .submit(assignment)
        .expect("the sequence is runnable")
        .sequence;
    sequences.handle_refused(proto::Refused {
        sequence: refused,
        failure: Some(failure(true)),
    });
    let outputs = read(&mut reader).await;
    let invalid = ModelError::Invalid("no".to_owned());
    assert!(matches!(&outputs[..], [Output::Failed(Failure::Model(error))] if *error == invalid));

    let (assignment, mut reader) = self::assignment(8, 100, 0);
    let failed = sequences
        .submit(assignment)
        .expect("the sequence is runnable")
        .sequence;
    sequences.handle_accepted(accepted_message(failed)).unwrap();
    let mut step = step(failed, 0, 1, proto::End::Failed);
    step.sequences[0].failure = Some(failure(false));
    sequences.handle_step(step, 1).unwrap();
    let outputs = read(&mut reader).await;
    assert_eq!(ids(&outputs), [0]);
    let last = outputs.last();
    assert!(matches!(
        last,
        Some(Output::Failed(Failure::Model(ModelError::Failed(_))))
    ));
}

#[test]
fn an_accepted_sequence_no_longer_awaits_acceptance() {
    let (assignment, _reader) = assignment(8, 100, 0);
    let mut sequences = sequences(1);
    let submit = sequences
        .submit(assignment)
        .expect("the sequence is runnable");
    assert!(sequences.oldest_unaccepted_ns().is_some());
    sequences
        .handle_accepted(accepted_message(submit.sequence))
        .unwrap();
    assert_eq!(sequences.oldest_unaccepted_ns(), None);
}

#[test]
fn a_crash_is_visible_to_the_readers_of_its_sequences() {
    let (assignment, reader) = assignment(8, 100, 0);
    let (mut sequences, _, _) = accepted(assignment);
    assert!(!reader.has_crashed());
    sequences.crash_all();
    assert!(reader.has_crashed());
}
