//! Tests of prompt scoring: all prompt tokens must arrive before the completion, and must match the prompt.

use super::*;

/// A prompt in which each token's id is its index, as in the steps that `step` creates.
const PROMPT: [u32; 4] = [0, 1, 2, 3];

/// Creates a worker that has accepted a sequence with a scored prompt. Returns the worker's sequences, the number of
/// the new one, and its reader.
fn scoring(max_tokens: u32) -> (Sequences, u64, TokenReceiver) {
    let (mut assignment, reader) = assignment(16, max_tokens, 0);
    assignment.sequence.prompt = PROMPT.into();
    assignment.sequence.scores_prompt = true;
    let (sequences, number, _) = accepted(assignment);
    (sequences, number, reader)
}

/// Creates a step with `count` prompt tokens whose indices start at `first_index`.
fn prompt_step(sequence: u64, first_index: u32, count: u32, end: proto::End) -> proto::Step {
    let mut step = step(sequence, first_index, count, end);
    let entry = &mut step.sequences[0];
    entry.is_prompt = true;
    entry.logprobs = vec![v1::Logprobs::default(); entry.ids.len()];
    step
}

fn with_other_ids(mut step: proto::Step) -> proto::Step {
    let ids = &mut step.sequences[0].ids;
    *ids = ids.iter().map(|id| id + 1).collect();
    step
}

#[tokio::test]
async fn prompt_tokens_may_arrive_in_parts_before_the_completion() {
    let (mut sequences, number, mut reader) = scoring(2);
    for part in [
        prompt_step(number, 0, 3, CONTINUES),
        prompt_step(number, 3, 1, CONTINUES),
        step(number, 0, 2, proto::End::Length),
    ] {
        sequences.handle_step(part, 1).unwrap();
    }
    let outputs = read(&mut reader).await;
    let prompt_tokens = outputs.iter().filter_map(|output| {
        if let Output::Prompt(token) = output {
            Some(token.id)
        } else {
            None
        }
    });
    assert!(prompt_tokens.eq(PROMPT));
    assert_eq!(ids(&outputs), [0, 1]);
}

#[test]
fn only_a_failure_may_come_before_the_whole_prompt() {
    let early_token = "has completion tokens before the last of its prompt tokens";
    let early_end = "ends before the last of its prompt tokens";
    type Make = fn(u64) -> proto::Step;
    let steps: [(&str, Make); 6] = [
        (early_token, |number| step(number, 0, 1, CONTINUES)),
        (early_token, |number| step(number, 0, 1, proto::End::Stop)),
        (early_token, |number| step(number, 0, 1, proto::End::Failed)),
        (early_end, |number| step(number, 0, 0, proto::End::Stop)),
        (early_end, |number| step(number, 0, 0, proto::End::Length)),
        (early_end, |number| {
            prompt_step(number, 3, 0, proto::End::Length)
        }),
    ];
    for (rule, next) in steps {
        let (mut sequences, number, _reader) = scoring(0);
        sequences
            .handle_step(prompt_step(number, 0, 3, CONTINUES), 1)
            .unwrap();
        let violation = sequences
            .handle_step(next(number), 1)
            .unwrap_err()
            .to_string();
        assert!(violation.contains(rule), "{violation}");
    }
    for failed in [
        step(1, 0, 0, proto::End::Failed),
        prompt_step(1, 3, 0, proto::End::Failed),
    ] {
        let (mut sequences, number, _reader) = scoring(2);
        sequences
            .handle_step(prompt_step(number, 0, 3, CONTINUES), 1)
            .unwrap();
        sequences.handle_step(failed, 1).unwrap();
        assert_eq!(sequences.take_effects().released, [ID]);
    }
}

#[test]
fn prompt_tokens_must_match_the_prompt() {
    let not_requested = "has prompt tokens that were not requested";
    let different = "has prompt tokens that differ from its prompt";
    type Make = fn(u64) -> proto::Step;
    let steps: [(&str, Make); 3] = [
        (different, |number| {
            with_other_ids(prompt_step(number, 2, 2, CONTINUES))
        }),
        (not_requested, |number| prompt_step(number, 2, 3, CONTINUES)),
        ("ends with END_STOP on a prompt token", |number| {
            prompt_step(number, 2, 2, proto::End::Stop)
        }),
    ];
    for (rule, next) in steps {
        let (mut sequences, number, _reader) = scoring(5);
        sequences
            .handle_step(prompt_step(number, 0, 2, CONTINUES), 1)
            .unwrap();
        let violation = sequences
            .handle_step(next(number), 1)
            .unwrap_err()
            .to_string();
        assert!(violation.contains(rule), "{violation}");
    }
    let (mut sequences, number, _reader) = scoring(5);
    sequences
        .handle_step(prompt_step(number, 0, 4, CONTINUES), 1)
        .unwrap();
    let violation = sequences
        .handle_step(prompt_step(number, 4, 1, CONTINUES), 1)
        .unwrap_err();
    assert!(
        violation.to_string().contains(not_requested),
        "{violation:?}"
    );
    let (assignment, _reader) = assignment(16, 5, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let violation = sequences
        .handle_step(prompt_step(number, 0, 1, CONTINUES), 1)
        .unwrap_err();
    assert!(
        violation.to_string().contains(not_requested),
        "{violation:?}"
    );
}

#[test]
fn a_sequence_without_completion_ends_with_its_last_prompt_token() {
    for end in [CONTINUES, proto::End::Length] {
        let (mut sequences, number, _reader) = scoring(0);
        sequences
            .handle_step(prompt_step(number, 0, 4, end), 1)
            .unwrap();
        assert_eq!(sequences.take_effects().released, [ID]);
    }
    let (mut sequences, number, _reader) = scoring(1);
    let ends = prompt_step(number, 0, 4, proto::End::Length);
    let violation = sequences.handle_step(ends, 1).unwrap_err().to_string();
    assert!(
        violation.contains("before it has max_tokens"),
        "{violation}"
    );
}
