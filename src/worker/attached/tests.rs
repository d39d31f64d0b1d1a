//! What a worker elsewhere may send of its sequences, and what becomes of it.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::sequences::Sequences;
use crate::proto::worker as proto;
use crate::request::{Caller, FinishReason, Sampling, StopTokens};
use crate::runner::{ModelError, Sequence};
use crate::worker::Assignment;
use crate::worker::lane::{Failure, LaneReceiver, Output, lane};
use crate::worker::wire::Named;

mod children;
mod scoring;

const NO_PATIENCE: u64 = u64::MAX;

/// A sequence whose reader has room for so many tokens, of which some are delivered.
fn assignment(room: usize, max_tokens: u32, delivered: u32) -> (Assignment, LaneReceiver) {
    let (sender, receiver) = lane(room, Arc::new(Notify::new()), Counter::noop());
    let sequence = Sequence {
        prompt: [0].into(),
        delivered: (0..delivered).collect(),
        choice: 0,
        seed: 0,
        max_tokens,
        sampling: Sampling::default(),
        logit_bias: [].into(),
        stop_tokens: StopTokens::default(),
        logprobs: None,
        scores_prompt: false,
        stamps: false,
        caller: Caller::default(),
    };
    let assignment = Assignment {
        sequence,
        lane: sender,
        deadline: Instant::now() + Duration::from_secs(3_600),
        is_suspect: false,
    };
    (assignment, receiver)
}

/// None yet, on a worker with so many slots in its third life.
fn sequences(slots: usize) -> Sequences {
    let last = Named { number: 0, life: 3 };
    Sequences::new(slots, NO_PATIENCE, last)
}

/// A worker with one slot that has accepted a sequence; the sequence's number and credit.
fn accepted(assignment: Assignment) -> (Sequences, u64, u32) {
    let mut sequences = sequences(1);
    let submit = sequences.submit(assignment).expect("it is wanted");
    assert_eq!(submit.life, 3);
    sequences.accepted(submit.sequence);
    (sequences, submit.sequence, submit.credit)
}

/// So many tokens from this index on, whose ids are their indices.
fn step(sequence: u64, first_index: u32, count: u32, end: proto::End) -> proto::Step {
    let ids: proto::Packed = (first_index..first_index + count).collect();
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

const ON: proto::End = proto::End::Unspecified;

async fn read(lane: &mut LaneReceiver) -> Vec<Output> {
    let mut outputs = Vec::new();
    poll_fn(|cx| lane.poll_recv_many(cx, &mut outputs, 64)).await;
    outputs
}

fn ids(outputs: &[Output]) -> Vec<u32> {
    let made = outputs.iter().flat_map(Output::made);
    made.map(|token| token.id).collect()
}

#[tokio::test]
async fn tokens_reach_their_reader_in_order_and_the_last_ends_it() {
    let (assignment, mut reader) = assignment(8, 3, 0);
    let (mut sequences, number, credit) = accepted(assignment);
    assert_eq!(credit, 3, "no more than it may make");
    sequences.step(step(number, 0, 2, ON), 1).unwrap();
    sequences
        .step(step(number, 2, 1, proto::End::Length), 1)
        .unwrap();
    let outputs = read(&mut reader).await;
    assert!(matches!(outputs[0], Output::Accepted));
    assert_eq!(ids(&outputs), [0, 1, 2]);
    let end = outputs.last();
    assert!(matches!(
        end,
        Some(Output::Finished(Some(_), FinishReason::Length))
    ));
    assert_eq!(sequences.take_effects().released, [3]);
}

#[tokio::test]
async fn a_sequence_goes_on_behind_what_is_delivered() {
    let (assignment, mut reader) = assignment(8, 5, 3);
    let (mut sequences, number, credit) = accepted(assignment);
    assert_eq!(credit, 2);
    assert!(sequences.step(step(number, 0, 1, ON), 1).is_err());
    let (assignment, _) = self::assignment(8, 5, 3);
    drop(assignment);
    sequences
        .step(step(number, 3, 2, proto::End::Stop), 1)
        .unwrap();
    assert_eq!(ids(&read(&mut reader).await), [3, 4]);
}

#[test]
fn a_gap_a_repetition_or_a_token_without_credit_breaks_the_contract() {
    for (first_index, count, rule) in [
        (1, 1, "sequence 1 goes on at 1, where 0 was next"),
        (0, 3, "sequence 1 has more tokens than it had credit for"),
    ] {
        let (assignment, _reader) = assignment(2, 100, 0);
        let (mut sequences, number, credit) = accepted(assignment);
        assert_eq!(credit, 2);
        let broke = sequences.step(step(number, first_index, count, ON), 1);
        assert_eq!(broke.unwrap_err().to_string(), rule);
    }
    let (assignment, _reader) = assignment(2, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    sequences.step(step(number, 0, 1, ON), 1).unwrap();
    let broke = sequences.step(step(number, 0, 1, ON), 1).unwrap_err();
    assert_eq!(
        broke.to_string(),
        "sequence 1 goes on at 0, where 1 was next"
    );
}

#[test]
fn what_does_not_fit_together_breaks_the_contract() {
    type Change = fn(&mut proto::SequenceStep);
    let changes: [(&str, Change); 8] = [
        ("ends with END_LENGTH before it has max_tokens", |entry| {
            entry.end = proto::End::Length.into();
        }),
        ("at most 1024 bytes", |entry| {
            entry.bytes = vec![b'x'; 1_025];
            entry.lengths = proto::Packed::from_iter([1_025]);
        }),
        ("a log probability is from -9999", |entry| {
            entry.logprobs = vec![proto::Logprobs {
                logprob: Some(f32::NAN),
                ..proto::Logprobs::default()
            }];
        }),
        ("a log probability is from -9999 to 0", |entry| {
            entry.logprobs = vec![proto::Logprobs {
                logprob: Some(0.002),
                ..proto::Logprobs::default()
            }];
        }),
        ("lengths must be as many", |entry| {
            entry.lengths = proto::Packed::default();
        }),
        ("add up to its bytes", |entry| {
            entry.lengths = proto::Packed::from_iter([2]);
        }),
        ("emitted_ns must be as many", |entry| {
            entry.emitted_ns = vec![1, 2]
        }),
        ("END_STOP and no token", |entry| {
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
        let mut step = step(number, 0, 1, ON);
        change(&mut step.sequences[0]);
        let broke = sequences.step(step, 1).unwrap_err().to_string();
        assert!(broke.contains(rule), "{broke}");
    }
    let (assignment, _reader) = assignment(2, 100, 0);
    let mut sequences = sequences(1);
    let submit = sequences.submit(assignment).expect("it is wanted");
    let broke = sequences.step(step(submit.sequence, 0, 1, ON), 1);
    assert!(
        broke
            .unwrap_err()
            .to_string()
            .contains("before it was accepted")
    );
}

#[test]
fn a_step_of_more_entries_than_a_worker_may_have_breaks_the_contract() {
    let entries = |count| proto::Step {
        sequences: vec![proto::SequenceStep::default(); count],
    };
    let mut sequences = sequences(1);
    let most = proto::MOST_ENTRIES;
    sequences.step(entries(most), 1).unwrap();
    let broke = sequences.step(entries(most + 1), 1).unwrap_err();
    assert!(broke.to_string().contains("at most 131072"), "{broke:?}");
}

#[test]
fn tokens_without_the_log_probabilities_that_were_asked_for_break_the_contract() {
    let (mut assignment, _reader) = assignment(8, 100, 0);
    assignment.sequence.logprobs = Some(0);
    let (mut sequences, number, _) = accepted(assignment);
    let mut told = step(number, 0, 1, ON);
    told.sequences[0].logprobs = vec![proto::Logprobs::default()];
    sequences.step(told, 1).unwrap();
    let broke = sequences.step(step(number, 1, 1, ON), 1).unwrap_err();
    assert!(broke.to_string().contains("without their log"), "{broke:?}");
}

#[tokio::test]
async fn a_last_token_that_comes_alone_is_one_output() {
    let (assignment, mut reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let last = step(number, 0, 1, proto::End::Stop);
    sequences.step(last, 1).unwrap();
    let outputs = read(&mut reader).await;
    assert!(
        matches!(
            &outputs[..],
            [
                Output::Accepted,
                Output::Finished(Some(_), FinishReason::Stop)
            ]
        ),
        "{outputs:?}"
    );
}

#[tokio::test]
async fn a_token_that_was_emitted_at_no_time_is_stamped_as_it_arrives() {
    let (assignment, mut reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let mut two = step(number, 0, 2, ON);
    two.sequences[0].emitted_ns = vec![0, 7];
    sequences.step(two, 9).unwrap();
    let outputs = read(&mut reader).await;
    let emitted: Vec<_> = outputs
        .iter()
        .flat_map(Output::made)
        .map(|it| it.emitted_ns)
        .collect();
    assert_eq!(emitted, [9, 7]);
}

#[tokio::test]
async fn credit_comes_back_when_the_reader_has_read() {
    let (assignment, mut reader) = assignment(2, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    sequences.step(step(number, 0, 2, ON), 1).unwrap();
    assert!(sequences.take_effects().grants.is_empty(), "it is full");
    assert_eq!(ids(&read(&mut reader).await), [0, 1]);
    sequences.look(1);
    let grants = sequences.take_effects().grants;
    let expected = proto::Grant {
        sequence: number,
        tokens: 2,
    };
    assert_eq!(grants, [expected]);
}

#[test]
fn a_reader_that_goes_is_a_cancellation_and_late_tokens_are_passed_over() {
    let (assignment, reader) = assignment(8, 100, 0);
    let (mut sequences, number, _) = accepted(assignment);
    drop(reader);
    sequences.look(1);
    let effects = sequences.take_effects();
    assert_eq!(
        (effects.cancelled, effects.released),
        (vec![number], vec![100])
    );
    sequences.step(step(number, 0, 1, ON), 1).unwrap();
    let (next, _reader) = self::assignment(8, 100, 0);
    let next = sequences.submit(next).expect("the slot is free");
    assert_ne!(next.sequence, number);
}

#[tokio::test]
async fn a_refusal_and_a_failure_end_a_sequence_alone() {
    let failure = |is_invalid| proto::Failure {
        is_invalid,
        message: "no".to_owned(),
    };
    let (assignment, mut reader) = assignment(8, 100, 0);
    let mut sequences = sequences(2);
    let refused = sequences.submit(assignment).expect("it is wanted").sequence;
    sequences.refused(proto::Refused {
        sequence: refused,
        failure: Some(failure(true)),
    });
    let outputs = read(&mut reader).await;
    let invalid = ModelError::Invalid("no".to_owned());
    assert!(matches!(&outputs[..], [Output::Failed(Failure::Model(error))] if *error == invalid));

    let (assignment, mut reader) = self::assignment(8, 100, 0);
    let failed = sequences.submit(assignment).expect("it is wanted").sequence;
    sequences.accepted(failed);
    let mut step = step(failed, 0, 1, proto::End::Failed);
    step.sequences[0].failure = Some(failure(false));
    sequences.step(step, 1).unwrap();
    let outputs = read(&mut reader).await;
    assert_eq!(ids(&outputs), [0]);
    let last = outputs.last();
    assert!(matches!(
        last,
        Some(Output::Failed(Failure::Model(ModelError::Failed(_))))
    ));
}

#[test]
fn a_sequence_that_was_taken_is_not_waited_for() {
    let (assignment, _reader) = assignment(8, 100, 0);
    let mut sequences = sequences(1);
    let submit = sequences.submit(assignment).expect("it is wanted");
    assert!(sequences.waits_since_ns().is_some());
    sequences.accepted(submit.sequence);
    assert_eq!(sequences.waits_since_ns(), None);
}

#[test]
fn a_crash_is_told_to_those_who_were_there() {
    let (assignment, reader) = assignment(8, 100, 0);
    let (mut sequences, _, _) = accepted(assignment);
    assert!(!reader.has_crashed());
    sequences.crash_all();
    assert!(reader.has_crashed());
}
