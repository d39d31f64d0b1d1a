//! Tests of the progress of a response, without sockets.

use serde_json::{Value, json};

use super::*;

fn progress(choices: u32) -> Progress {
    Progress::new(RequestFacts {
        request_id: "r".to_owned(),
        model: "m".to_owned(),
        choices,
        seed: 7,
        has_token_ids: false,
        arrived: Instant::now(),
    })
}

fn sent(data: &str) -> SentEvent {
    SentEvent {
        data: Bytes::copy_from_slice(data.as_bytes()),
        is_error: false,
    }
}

fn delta(index: u32, text: &str, finish_reason: Option<&str>) -> Value {
    json!({"model": "engine-model", "choices": [
        {"index": index, "text": text, "finish_reason": finish_reason},
    ]})
}

fn read_all(progress: &mut Progress, chunks: &[Value]) -> Result<(), Error> {
    chunks
        .iter()
        .try_for_each(|chunk| progress.read(&sent(&chunk.to_string())))
}

/// Returns (choice, first index, texts, ids) of each event with tokens.
fn batches(progress: &Progress) -> Vec<(u32, u32, Vec<String>, Vec<u32>)> {
    let tokens = progress.ready.iter().filter_map(|event| match event {
        Event::Tokens(tokens) => Some(tokens),
        Event::Started(_) | Event::Summary(_) | Event::Prompt(_) => None,
    });
    tokens
        .map(|batch| {
            let texts = batch.tokens.iter().map(|token| token.text.to_owned());
            let ids = batch.tokens.iter().map(|token| token.id);
            (
                batch.choice,
                batch.first_index,
                texts.collect(),
                ids.collect(),
            )
        })
        .collect()
}

#[test]
fn deltas_that_arrive_together_are_one_event_per_run_of_a_choice() {
    let mut progress = progress(2);
    let chunks = [
        delta(0, "a", None),
        delta(0, "b", None),
        delta(1, "x", None),
        delta(0, "c", Some("stop")),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let expected = [
        (0, 0, owned(&["a", "b"]), vec![0, 0]),
        (1, 0, owned(&["x"]), vec![0]),
        (0, 2, owned(&["c"]), vec![0]),
    ];
    assert_eq!(batches(&progress), expected);
}

#[test]
fn the_start_names_the_model_that_the_engine_reports() {
    let mut progress = progress(1);
    read_all(&mut progress, &[delta(0, "a", None)]).expect("the chunk is valid");
    let Some(Event::Started(started)) = progress.ready.front() else {
        panic!("the first event is not the start");
    };
    assert_eq!((&*started.model, started.seed), ("engine-model", 7));
}

#[test]
fn a_chat_delta_without_content_is_no_token() {
    let mut progress = progress(1);
    let role = json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]});
    let text = json!({"choices": [{"index": 0, "delta": {"content": "hi"}}]});
    let end = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
    read_all(&mut progress, &[role, text, end]).expect("the chunks are valid");
    assert_eq!(batches(&progress), [(0, 0, vec!["hi".to_owned()], vec![0])]);
    assert!(progress.all_choices_ended());
}

#[test]
fn with_ids_each_token_is_one_token_and_the_last_has_the_text() {
    let mut progress = progress(1);
    let chunk = json!({"choices": [{"index": 0, "text": "ab", "token_ids": [5, 6]}]});
    let unfinished = json!({"choices": [{"index": 0, "text": "", "token_ids": [7]}]});
    read_all(&mut progress, &[chunk, unfinished]).expect("the chunks are valid");
    let texts = ["", "ab", ""].map(str::to_owned).to_vec();
    assert_eq!(batches(&progress), [(0, 0, texts, vec![5, 6, 7])]);
}

#[test]
fn a_usage_chunk_and_empty_choices_are_no_tokens() {
    let mut progress = progress(1);
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}});
    read_all(&mut progress, &[delta(0, "a", Some("length")), usage]).expect("valid chunks");
    assert!(progress.is_whole());
    let usage = progress.summary().usage.expect("the engine reports usage");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 9));
}

#[test]
fn the_end_marker_inside_a_text_ends_nothing() {
    let mut progress = progress(1);
    read_all(&mut progress, &[delta(0, "[DONE]", None)]).expect("the chunk is valid");
    assert!(!progress.has_end_marker);
}

#[test]
fn a_stream_that_ends_before_its_choices_is_cut() {
    let mut progress = progress(2);
    read_all(&mut progress, &[delta(0, "a", Some("stop"))]).expect("the chunk is valid");
    assert!(progress.check_end().is_err());
    assert!(progress.read(&sent("[DONE]")).is_err());
}

#[test]
fn anything_that_could_hide_lost_text_is_an_upstream_error() {
    for data in [
        "{\"choices\":[{\"index\":0,\"te",
        "{\"choices\":[{\"index\":1,\"text\":\"a\"}]}",
        "{\"choices\":[{\"index\":0,\"text\":7}]}",
        "{\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":\"abort\"}]}",
        "{\"error\":{\"message\":\"out of memory\"}}",
    ] {
        let error = progress(1).read(&sent(data)).expect_err(data);
        assert_eq!(error.kind, ErrorKind::UpstreamError, "{data}");
    }
}

#[test]
fn text_after_the_end_of_its_choice_is_an_upstream_error() {
    let mut progress = progress(1);
    let chunks = [delta(0, "a", Some("stop")), delta(0, "b", None)];
    assert!(read_all(&mut progress, &chunks).is_err());
}
