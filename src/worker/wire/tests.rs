//! Tests of submissions: what the engine sends is what the worker receives.

use super::*;

const ID: SequenceId = SequenceId {
    number: 1,
    generation: 2,
};

#[test]
fn a_worker_receives_the_sequence_that_the_engine_submitted() {
    let mut submitted = Sequence {
        delivered: vec![3],
        choice: 4,
        scores_prompt: true,
        ..Sequence::new([1, 2], 5)
    };
    submitted.options.logprobs = Some(6);
    submitted.options.seed = u64::MAX;
    let received = sequence_from_submit(submit_message(&submitted, ID, 1)).unwrap();
    assert_eq!(received, submitted);
}

#[test]
fn an_invalid_submission_is_a_violation_that_names_the_field() {
    type Change = fn(&mut v1::CompletionRequest);
    let changes: [(&str, Change); 6] = [
        ("prompt_token_ids", |request| request.input = None),
        ("prompt_token_ids", |request| {
            request.input = Some(Input::PromptTokenIds(v1::TokenIds::default()));
        }),
        ("max_tokens", |request| request.max_tokens = None),
        ("seed", |request| request.seed = None),
        ("temperature", |request| request.temperature = Some(2.5)),
        ("logprobs", |request| request.logprobs = Some(21)),
    ];
    for (field, change) in changes {
        let mut submission = submit_message(&Sequence::new([1], 5), ID, 1);
        change(submission.request.as_mut().unwrap());
        let violation = sequence_from_submit(submission).unwrap_err().to_string();
        let named = format!("submit.request.{field} ");
        assert!(violation.starts_with(&named), "{violation}");
    }
}
