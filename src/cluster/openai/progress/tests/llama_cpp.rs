//! Tests of the progress of a response of llama.cpp's own API.

use super::*;

fn llama_cpp(choices: u32, logprobs: Option<u32>) -> Progress {
    Progress::new(RequestFacts {
        api: Api::LlamaCpp,
        has_token_ids: true,
        logprobs,
        ..facts(choices)
    })
}

/// Returns an event of llama.cpp's own API. `predicted` is the number of tokens so far.
fn llama_cpp_delta(index: u32, text: &str, ids: &[u32], predicted: u32) -> Value {
    json!({"index": index, "content": text, "tokens": ids, "tokens_predicted": predicted,
        "tokens_evaluated": 5, "stop": false})
}

fn llama_cpp_end(index: u32, stop_type: &str, predicted: u32) -> Value {
    json!({"index": index, "content": "", "tokens": [], "tokens_predicted": predicted, "tokens_evaluated": 5,
        "stop": true, "stop_type": stop_type, "model": "l", "timings": {"cache_n": 4}})
}

#[test]
fn a_token_of_llama_cpps_own_api_has_its_id() {
    let mut progress = llama_cpp(2, None);
    let chunks = [
        llama_cpp_delta(1, " the", &[260], 1),
        llama_cpp_delta(0, " Paris", &[7042], 1),
        // The text is held back, because it may become a stop string.
        llama_cpp_delta(0, "", &[30], 2),
        llama_cpp_end(0, "limit", 2),
        // The end-of-sequence token has no event.
        llama_cpp_end(1, "eos", 2),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let owned = |texts: &[&str]| {
        texts
            .iter()
            .map(|text| (*text).to_owned())
            .collect::<Vec<_>>()
    };
    let expected = [
        (1, 0, owned(&[" the"]), vec![260]),
        (0, 0, owned(&[" Paris", ""]), vec![7042, 30]),
        (1, 1, owned(&[]), vec![]),
    ];
    assert_eq!(batches(&progress), expected);
    assert!(progress.is_whole());
    let usage = progress.summary().usage.unwrap_or_default();
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_prompt_tokens
        ),
        (5, 4, Some(4))
    );
}

#[test]
fn a_character_of_llama_cpp_whose_first_tokens_have_no_event_has_no_id() {
    let mut progress = llama_cpp(1, None);
    let chunks = [
        llama_cpp_delta(0, "a", &[1], 1),
        // Tokens 2 and 3 make the character, and a token of which the text is held back follows.
        llama_cpp_delta(0, "", &[4], 4),
        llama_cpp_delta(0, "ö", &[5], 5),
        llama_cpp_delta(0, "b", &[6], 6),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let ids: Vec<_> = batches(&progress).into_iter().flat_map(|it| it.3).collect();
    assert_eq!(ids, [1, 4, 0, 6]);
}

#[test]
fn the_log_probabilities_of_llama_cpps_own_api_are_read() {
    let mut progress = llama_cpp(1, Some(1));
    let mut chunk = llama_cpp_delta(0, "a", &[1], 1);
    let likely = json!({"id": 2, "token": "b", "bytes": [98], "logprob": -0.25});
    chunk["completion_probabilities"] = json!([
        {"id": 1, "token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": [likely]},
    ]);
    read_all(&mut progress, &[chunk]).expect("the chunk is valid");
    let Some(Event::Tokens(tokens)) = progress.ready.back() else {
        panic!("there are tokens");
    };
    let token = tokens.tokens.iter().next().expect("there is a token");
    let logprobs = token.logprobs.expect("there are log probabilities");
    assert_eq!((token.id, logprobs.logprob), (1, Some(-0.5)));
    assert_eq!((logprobs.top[0].id, logprobs.top[0].logprob), (2, -0.25));
}

#[test]
fn an_error_event_of_llama_cpps_own_api_ends_the_stream() {
    let error = json!({"error": {"code": 500, "message": "no", "type": "server_error"}});
    let read = read_all(&mut llama_cpp(1, None), &[error]);
    assert_eq!(read.expect_err("an error").kind, ErrorKind::UpstreamError);
}

#[test]
fn the_log_probabilities_of_a_character_with_missing_ids_give_it_no_id() {
    let mut progress = llama_cpp(1, Some(0));
    let mut chunk = llama_cpp_delta(0, "\u{f6}", &[3], 3);
    chunk["completion_probabilities"] =
        json!([{"id": 3, "token": "\u{f6}", "bytes": [195, 182], "logprob": -0.5}]);
    read_all(&mut progress, &[chunk]).expect("the chunk is valid");
    assert_eq!(batches(&progress)[0].3, [0]);
}
