//! Prompts whose own tokens are asked for: all of them come, before anything else, and as they were given.

use super::*;

/// A prompt whose ids are their indices, as those of a step are.
const PROMPT: [u32; 4] = [0, 1, 2, 3];

/// A worker that has accepted a sequence whose prompt is to be scored, and the sequence's number.
fn scoring(max_tokens: u32) -> (Sequences, u64, TokenReceiver) {
    let (mut assignment, reader) = assignment(16, max_tokens, 0);
    assignment.sequence.prompt = PROMPT.into();
    assignment.sequence.scores_prompt = true;
    let (sequences, number, _) = accepted(assignment);
    (sequences, number, reader)
}

/// So many tokens of the prompt from this index on.
fn of_prompt(sequence: u64, first_index: u32, count: u32, end: proto::End) -> proto::Step {
    let mut step = step(sequence, first_index, count, end);
    let entry = &mut step.sequences[0];
    entry.is_prompt = true;
    entry.logprobs = vec![proto::Logprobs::default(); entry.ids.len()];
    step
}

fn other_ids(mut step: proto::Step) -> proto::Step {
    let ids = &mut step.sequences[0].ids;
    *ids = ids.iter().map(|id| id + 1).collect();
    step
}

#[tokio::test]
async fn prompt_tokens_may_arrive_in_parts_before_the_completion() {
    let (mut sequences, number, mut reader) = scoring(2);
    for part in [
        of_prompt(number, 0, 3, ON),
        of_prompt(number, 3, 1, ON),
        step(number, 0, 2, proto::End::Length),
    ] {
        sequences.step(part, 1).unwrap();
    }
    let outputs = read(&mut reader).await;
    let of_prompt = outputs.iter().filter_map(|output| {
        if let Output::Prompt(token) = output {
            Some(token.id)
        } else {
            None
        }
    });
    assert!(of_prompt.eq(PROMPT));
    assert_eq!(ids(&outputs), [0, 1]);
}

#[test]
fn only_a_failure_may_come_before_the_whole_prompt() {
    let before_all = "has tokens before all of its prompt's";
    let ends = "ends before it has all of its prompt's tokens";
    type Make = fn(u64) -> proto::Step;
    let steps: [(&str, Make); 6] = [
        (before_all, |number| step(number, 0, 1, ON)),
        (before_all, |number| step(number, 0, 1, proto::End::Stop)),
        (before_all, |number| step(number, 0, 1, proto::End::Failed)),
        (ends, |number| step(number, 0, 0, proto::End::Stop)),
        (ends, |number| step(number, 0, 0, proto::End::Length)),
        (ends, |number| of_prompt(number, 3, 0, proto::End::Length)),
    ];
    for (rule, next) in steps {
        let (mut sequences, number, _reader) = scoring(0);
        sequences.step(of_prompt(number, 0, 3, ON), 1).unwrap();
        let broke = sequences.step(next(number), 1).unwrap_err().to_string();
        assert!(broke.contains(rule), "{broke}");
    }
    for failed in [
        step(1, 0, 0, proto::End::Failed),
        of_prompt(1, 3, 0, proto::End::Failed),
    ] {
        let (mut sequences, number, _reader) = scoring(2);
        sequences.step(of_prompt(number, 0, 3, ON), 1).unwrap();
        sequences.step(failed, 1).unwrap();
        assert_eq!(sequences.take_effects().released, [2]);
    }
}

#[test]
fn prompt_tokens_must_match_the_prompt() {
    let more = "has tokens of its prompt that nobody asked for";
    let other = "has other tokens for its prompt's";
    type Make = fn(u64) -> proto::Step;
    let steps: [(&str, Make); 3] = [
        (other, |number| other_ids(of_prompt(number, 2, 2, ON))),
        (more, |number| of_prompt(number, 2, 3, ON)),
        ("ends with END_STOP and a token of its prompt", |number| {
            of_prompt(number, 2, 2, proto::End::Stop)
        }),
    ];
    for (rule, next) in steps {
        let (mut sequences, number, _reader) = scoring(5);
        sequences.step(of_prompt(number, 0, 2, ON), 1).unwrap();
        let broke = sequences.step(next(number), 1).unwrap_err().to_string();
        assert!(broke.contains(rule), "{broke}");
    }
    let (mut sequences, number, _reader) = scoring(5);
    sequences.step(of_prompt(number, 0, 4, ON), 1).unwrap();
    let broke = sequences.step(of_prompt(number, 4, 1, ON), 1).unwrap_err();
    assert!(broke.to_string().contains(more), "{broke:?}");
    let (assignment, _reader) = assignment(16, 5, 0);
    let (mut sequences, number, _) = accepted(assignment);
    let broke = sequences.step(of_prompt(number, 0, 1, ON), 1).unwrap_err();
    assert!(broke.to_string().contains(more), "{broke:?}");
}

#[test]
fn a_sequence_without_completion_ends_with_its_last_prompt_token() {
    for end in [ON, proto::End::Length] {
        let (mut sequences, number, _reader) = scoring(0);
        sequences.step(of_prompt(number, 0, 4, end), 1).unwrap();
        assert_eq!(sequences.take_effects().released, [0]);
    }
    let (mut sequences, number, _reader) = scoring(1);
    let ends = of_prompt(number, 0, 4, proto::End::Length);
    let broke = sequences.step(ends, 1).unwrap_err().to_string();
    assert!(broke.contains("before it has max_tokens"), "{broke}");
}
