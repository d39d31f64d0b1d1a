//! Tests of the progress of a stream.

use vllm_proto::PromptInfo;

use super::*;

fn progress(choices: u32, has_logprobs: bool) -> Progress {
    Progress::new(RequestFacts {
        request_id: "id".to_owned(),
        model: "m".to_owned(),
        choices,
        seed: 7,
        has_logprobs,
        arrived: Instant::now(),
    })
}

fn prompt(tokens: u32) -> GenerateResponse {
    GenerateResponse {
        prompt_info: Some(PromptInfo {
            num_prompt_tokens: tokens,
            ..PromptInfo::default()
        }),
        outputs: None,
    }
}

fn output(index: u32, text: &str, ids: &[u32]) -> SequenceOutput {
    SequenceOutput {
        index,
        text: text.to_owned(),
        num_tokens: u32::try_from(ids.len()).unwrap(),
        token_ids: ids.to_vec(),
        ..SequenceOutput::default()
    }
}

fn ending(mut output: SequenceOutput, reason: impl Into<i32>, total: u32) -> SequenceOutput {
    output.finish_info = Some(FinishInfo {
        num_output_tokens: total,
        finish_reason: reason.into(),
        ..FinishInfo::default()
    });
    output
}

fn with_logprobs(mut output: SequenceOutput, logprobs: &[f32]) -> SequenceOutput {
    output.logprobs = logprobs.to_vec();
    output
}

fn response(output: SequenceOutput) -> GenerateResponse {
    GenerateResponse {
        prompt_info: None,
        outputs: Some(output),
    }
}

/// Reads responses. Returns the events, and the result of the last response.
fn read(
    mut progress: Progress,
    responses: impl IntoIterator<Item = GenerateResponse>,
) -> (Vec<Event>, Result<(), Error>) {
    let mut responses = responses.into_iter();
    let read = responses.try_for_each(|response| progress.read(response));
    let events = std::iter::from_fn(|| progress.next_event()).collect();
    (events, read)
}

/// An event of tokens as (choice, first index, [(id, text)], finish reason).
type SeenTokens = (u32, u32, Vec<(u32, String)>, v1::FinishReason);

fn tokens(events: &[Event]) -> Vec<SeenTokens> {
    let tokens = events.iter().filter_map(|event| match event {
        Event::Tokens(tokens) => Some(tokens),
        Event::Started(_) | Event::Summary(_) | Event::Prompt(_) | Event::Chat(_) => None,
    });
    tokens
        .map(|it| {
            let pairs = it
                .tokens
                .iter()
                .map(|token| (token.id, token.text.to_owned()));
            (
                it.choice,
                it.first_index,
                pairs.collect(),
                it.finish_reason(),
            )
        })
        .collect()
}

fn usage(events: &[Event]) -> Option<v1::Usage> {
    match events.last() {
        Some(Event::Summary(summary)) => summary.usage,
        Some(Event::Started(_) | Event::Tokens(_) | Event::Prompt(_) | Event::Chat(_)) | None => {
            None
        }
    }
}

#[test]
fn each_output_is_one_event_whose_text_belongs_to_its_last_token() {
    let (events, result) = read(
        progress(1, false),
        [
            prompt(3),
            response(output(0, "a", &[5])),
            response(output(0, "\u{e9}b", &[6, 7])),
            response(ending(output(0, "", &[2]), FinishReason::Stop, 4)),
        ],
    );
    assert_eq!(result, Ok(()));
    let Event::Started(started) = &events[0] else {
        panic!("the first event is {:?}", events[0]);
    };
    assert_eq!((started.prompt_tokens, started.seed), (3, 7));
    assert!(!started.text_only);
    let going_on = v1::FinishReason::Unspecified;
    let token = |id, text: &str| (id, text.to_owned());
    assert_eq!(
        tokens(&events),
        [
            (0, 0, vec![token(5, "a")], going_on),
            (0, 1, vec![token(6, ""), token(7, "\u{e9}b")], going_on),
            (0, 3, vec![token(2, "")], v1::FinishReason::Stop),
        ]
    );
    let expected = v1::Usage {
        prompt_tokens: 3,
        completion_tokens: 4,
        ..v1::Usage::default()
    };
    assert_eq!(usage(&events), Some(expected));
}

#[test]
fn a_response_may_report_the_prompt_and_an_output_together() {
    let whole = GenerateResponse {
        outputs: Some(ending(output(0, "a", &[5]), FinishReason::Length, 1)),
        ..prompt(3)
    };
    let (events, result) = read(progress(1, false), [whole]);
    assert_eq!((events.len(), result), (3, Ok(())));
}

#[test]
fn the_summary_follows_the_end_of_the_last_choice() {
    let responses = [
        prompt(3),
        response(ending(output(1, "b", &[6]), FinishReason::Length, 1)),
        response(output(0, "a", &[5])),
        response(ending(output(0, "", &[]), FinishReason::Stop, 1)),
    ];
    let (events, result) = read(progress(2, false), responses[..3].to_vec());
    assert_eq!((usage(&events), result), (None, Ok(())));
    let (events, result) = read(progress(2, false), responses);
    assert_eq!(result, Ok(()));
    assert_eq!(usage(&events).map(|usage| usage.completion_tokens), Some(2));
    assert_eq!(
        tokens(&events)[2],
        (0, 1, Vec::new(), v1::FinishReason::Stop)
    );
}

#[test]
fn the_tokens_before_a_failure_are_delivered() {
    for reason in [FinishReason::Aborted.into(), 4, -1] {
        let responses = [prompt(3), response(ending(output(0, "a", &[5]), reason, 1))];
        let (events, result) = read(progress(1, false), responses);
        let error = result.expect_err("an aborted choice is no success");
        assert_eq!(error.kind, ErrorKind::UpstreamError);
        let going_on = v1::FinishReason::Unspecified;
        assert_eq!(
            tokens(&events),
            [(0, 0, vec![(5, "a".to_owned())], going_on)]
        );
    }
}

#[test]
fn a_choice_that_is_not_finished_goes_on() {
    let responses = [
        prompt(3),
        response(ending(output(0, "", &[]), FinishReason::NotFinished, 0)),
        response(ending(output(0, "a", &[5]), FinishReason::NotFinished, 1)),
        response(ending(output(0, "b", &[6]), FinishReason::Length, 2)),
    ];
    let (events, result) = read(progress(1, false), responses);
    assert_eq!((tokens(&events).len(), result), (2, Ok(())));
}

#[test]
fn a_response_that_contradicts_the_protocol_breaks_the_stream() {
    let first = |output| vec![response(output)];
    let second = |output| vec![prompt(3), response(output)];
    let without_ids = SequenceOutput {
        num_tokens: 1,
        ..output(0, "", &[])
    };
    for (name, responses) in [
        ("output before the prompt", first(output(0, "a", &[5]))),
        ("unknown choice", second(output(1, "a", &[5]))),
        ("largest choice", second(output(u32::MAX, "a", &[5]))),
        ("token without id", second(without_ids)),
        ("text without token", second(output(0, "a", &[]))),
        (
            "token after the end",
            vec![
                prompt(3),
                response(ending(output(0, "a", &[5]), FinishReason::Stop, 1)),
                response(output(0, "b", &[6])),
            ],
        ),
    ] {
        let (_, result) = read(progress(1, false), responses);
        let error = result.expect_err(name);
        assert_eq!(error.kind, ErrorKind::UpstreamError, "{name}");
    }
}

#[test]
fn each_token_has_its_log_probability_and_its_text_as_bytes() {
    let output = with_logprobs(output(0, "ab", &[5, 6]), &[f32::NEG_INFINITY, -0.5]);
    let (events, result) = read(progress(1, true), [prompt(3), response(output)]);
    assert_eq!(result, Ok(()));
    let Some(Event::Tokens(tokens)) = events.last() else {
        panic!("the last event is {:?}", events.last());
    };
    let logprobs: Vec<_> = tokens.tokens.iter().map(|token| token.logprobs).collect();
    let expected = |logprob, text: &str| Logprobs {
        logprob: Some(logprob),
        token_bytes: text.as_bytes().to_vec(),
        top: Vec::new(),
    };
    assert_eq!(
        logprobs,
        [
            Some(&expected(MIN_LOGPROB, "")),
            Some(&expected(-0.5, "ab"))
        ]
    );
}

#[test]
fn missing_log_probabilities_break_the_stream_and_unrequested_ones_are_dropped() {
    let output = with_logprobs(output(0, "ab", &[5, 6]), &[-0.5]);
    let responses = [prompt(3), response(output)];
    let (_, result) = read(progress(1, true), responses.clone());
    assert!(result.is_err());
    let (events, result) = read(progress(1, false), responses);
    assert_eq!(result, Ok(()));
    let Some(Event::Tokens(tokens)) = events.last() else {
        panic!("the last event is {:?}", events.last());
    };
    assert!(tokens.tokens.iter().all(|token| token.logprobs.is_none()));
}
