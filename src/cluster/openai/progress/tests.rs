//! Tests of the progress of a response, without sockets.

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;

mod llama_cpp;

fn facts(choices: u32) -> RequestFacts {
    RequestFacts {
        api: Api::Completions,
        request_id: "r".to_owned(),
        model: "m".to_owned(),
        choices,
        seed: 7,
        has_token_ids: false,
        logprobs: None,
        echo: None,
        arrived: Instant::now(),
    }
}

fn progress(choices: u32) -> Progress {
    Progress::new(facts(choices))
}

fn progress_with_logprobs() -> Progress {
    Progress::new(RequestFacts {
        logprobs: Some(1),
        ..facts(1)
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
        Event::Started(_) | Event::Summary(_) | Event::Prompt(_) | Event::Chat(_) => None,
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

/// Returns the parts of messages besides their text, in order.
fn chat_deltas(progress: &Progress) -> Vec<&v1::ChatDelta> {
    let events = progress.ready.iter();
    let deltas = events.filter_map(|event| match event {
        Event::Chat(delta) => Some(delta),
        Event::Started(_) | Event::Summary(_) | Event::Prompt(_) | Event::Tokens(_) => None,
    });
    deltas.collect()
}

fn chat_chunk(delta: &Value, finish_reason: Option<&str>) -> Value {
    json!({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})
}

#[test]
fn text_a_tool_call_a_refusal_and_the_end_in_one_chunk_are_all_kept() {
    let mut progress = progress(1);
    let delta = json!({
        "content": "a", "reasoning_content": "b", "refusal": "c\n",
        "tool_calls": [{"index": 1, "id": "x", "type": "function",
            "function": {"name": "f", "arguments": "{\"q\": \"\u{e9}\"}"}}],
    });
    let chunk = chat_chunk(&delta, Some("tool_calls"));
    read_all(&mut progress, &[chunk]).expect("the chunk is valid");
    let expected = v1::ChatDelta {
        choice: 0,
        tool_calls: vec![v1::ToolCallDelta {
            index: 1,
            id: "x".to_owned(),
            r#type: "function".to_owned(),
            name: "f".to_owned(),
            arguments: "{\"q\": \"\u{e9}\"}".to_owned(),
        }],
        reasoning_content: "b".to_owned(),
        refusal: "c\n".to_owned(),
    };
    assert_eq!(chat_deltas(&progress), [&expected]);
    let Some(Event::Tokens(tokens)) = progress.ready.back() else {
        panic!("the last event has the finish reason");
    };
    assert_eq!(tokens.tokens.text(), "a");
    assert_eq!(tokens.finish_reason(), v1::FinishReason::ToolCalls);
}

#[test]
fn both_names_of_reasoning_are_read_once() {
    for (delta, expected) in [
        (json!({"reasoning": "a"}), "a"),
        (json!({"reasoning_content": "b"}), "b"),
        (json!({"reasoning_content": "c", "reasoning": "c"}), "c"),
        (json!({"reasoning_content": "", "reasoning": "d"}), "d"),
        (json!({"reasoning_content": null, "reasoning": "e"}), "e"),
    ] {
        let mut progress = progress(1);
        read_all(&mut progress, &[chat_chunk(&delta, None)]).expect("the chunk is valid");
        assert_eq!(chat_deltas(&progress)[0].reasoning_content, expected);
    }
}

#[test]
fn empty_parts_of_a_message_are_no_event() {
    for delta in [
        json!({"role": "assistant", "content": "", "tool_calls": []}),
        json!({"tool_calls": null, "reasoning_content": "", "refusal": null}),
    ] {
        let mut progress = progress(1);
        read_all(&mut progress, &[chat_chunk(&delta, None)]).expect("the chunk is valid");
        assert_eq!(progress.ready.len(), 1, "only the start: {delta}");
    }
}

#[test]
fn tool_calls_without_an_index_are_numbered_in_their_order() {
    let mut progress = progress(1);
    let delta = json!({"tool_calls": [{"function": {"name": "f"}}, {"id": "b", "function": null}]});
    read_all(&mut progress, &[chat_chunk(&delta, None)]).expect("the chunk is valid");
    let calls = &chat_deltas(&progress)[0].tool_calls;
    let shown: Vec<_> = calls
        .iter()
        .map(|call| (call.index, &*call.name, &*call.id))
        .collect();
    assert_eq!(shown, [(0, "f", ""), (1, "", "b")]);
}

#[test]
fn a_part_of_a_message_that_cannot_be_read_is_an_upstream_error() {
    for delta in [
        json!({"tool_calls": "f"}),
        json!({"tool_calls": [{"index": -1}]}),
        json!({"tool_calls": [{"function": {"arguments": {}}}]}),
        json!({"reasoning_content": 1}),
        json!({"refusal": {}}),
    ] {
        let chunk = chat_chunk(&delta, None).to_string();
        let error = progress(1).read(&sent(&chunk)).expect_err(&chunk);
        assert_eq!(error.kind, ErrorKind::UpstreamError, "{delta}");
    }
}

#[test]
fn without_usage_reasoning_and_tool_calls_count_as_tokens() {
    let mut progress = progress(1);
    let chunks = [
        chat_chunk(&json!({"reasoning": "a"}), None),
        chat_chunk(&json!({"content": "b"}), Some("stop")),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let usage = progress.summary().usage.expect("a usage");
    assert_eq!(usage.completion_tokens, 2);
    assert_eq!(
        (usage.cached_prompt_tokens, usage.reasoning_tokens),
        (None, None)
    );
}

#[test]
fn the_details_of_the_usage_are_kept_if_the_engine_reports_them() {
    let mut progress = progress(1);
    let usage = json!({
        "prompt_tokens": 9, "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": null},
        "completion_tokens_details": {"reasoning_tokens": 0},
    });
    let chunks = [
        delta(0, "a", Some("stop")),
        json!({"choices": [], "usage": usage}),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let usage = progress.summary().usage.expect("a usage");
    assert_eq!(
        (usage.cached_prompt_tokens, usage.reasoning_tokens),
        (Some(8), Some(0))
    );
}

fn scored_chunk(text: &str, tokens: &[&str]) -> Value {
    let content = tokens
        .iter()
        .map(|token| json!({"token": token, "logprob": -0.5}));
    let logprobs = json!({"content": content.collect::<Vec<_>>()});
    json!({"choices": [{"index": 0, "delta": {"content": text}, "logprobs": logprobs}]})
}

#[test]
fn with_logprobs_each_entry_is_one_token_and_no_text_is_lost() {
    let mut progress = progress_with_logprobs();
    let chunks = [
        scored_chunk("ab", &["a", "b"]),
        // The bytes of the tokens are not those of the text.
        scored_chunk("c", &["x", "y"]),
        scored_chunk("", &["<|im_end|>"]),
        delta(0, "d", None),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let texts = ["a", "b", "", "c", "", "d"].map(str::to_owned).to_vec();
    assert_eq!(batches(&progress), [(0, 0, texts, vec![0; 6])]);
    let Some(Event::Tokens(tokens)) = progress.ready.back() else {
        panic!("the last event has tokens");
    };
    let scored = tokens.tokens.iter().map(|token| token.logprobs.is_some());
    assert_eq!(
        scored.collect::<Vec<_>>(),
        [true, true, true, true, true, false]
    );
}

#[test]
fn ids_that_come_with_logprobs_are_kept() {
    let chunk = |ids: Value, entries: Value| {
        json!({"choices": [{"index": 0, "text": "ab", "token_ids": ids,
            "logprobs": {"content": entries}}]})
    };
    let entries = json!([{"token": "a", "id": 3}, {"token": "b"}]);
    for (ids, expected) in [
        (Value::Null, (vec!["a", "b"], vec![3, 0])),
        (json!([7, 8]), (vec!["a", "b"], vec![7, 8])),
        // The engine disagrees with itself: its ids are the tokens.
        (json!([7, 8, 9]), (vec!["", "", "ab"], vec![7, 8, 9])),
    ] {
        let mut progress = progress_with_logprobs();
        read_all(&mut progress, &[chunk(ids, entries.clone())]).expect("the chunk is valid");
        let (texts, ids) = expected;
        let texts = texts.into_iter().map(str::to_owned).collect();
        assert_eq!(batches(&progress), [(0, 0, texts, ids)]);
    }
}

#[test]
fn logprobs_that_nobody_asked_for_are_not_read() {
    let mut progress = progress(1);
    let chunk = json!({"choices": [{"index": 0, "text": "ab", "logprobs": 7}]});
    read_all(&mut progress, std::slice::from_ref(&chunk)).expect("the chunk is valid");
    assert_eq!(batches(&progress), [(0, 0, vec!["ab".to_owned()], vec![0])]);
    assert!(read_all(&mut progress_with_logprobs(), &[chunk]).is_err());
}

fn echoing(choices: u32) -> Progress {
    Progress::new(RequestFacts {
        echo: Some("The ".to_owned()),
        ..facts(choices)
    })
}

#[test]
fn an_echoed_prompt_is_reported_once_and_is_part_of_no_token() {
    let mut progress = echoing(2);
    let chunks = [
        delta(1, "The cat", None),
        delta(0, "The ", None),
        delta(0, "The ", Some("stop")),
    ];
    read_all(&mut progress, &chunks).expect("the chunks are valid");
    let owned = |text: &str| vec![text.to_owned()];
    let expected = [
        (1, 0, owned("cat"), vec![0]),
        (0, 0, owned("The "), vec![0]),
    ];
    assert_eq!(batches(&progress), expected);
    let prompts: Vec<_> = progress
        .ready
        .iter()
        .filter_map(|event| match event {
            Event::Prompt(prompt) => Some(&*prompt.text),
            Event::Started(_) | Event::Summary(_) | Event::Chat(_) | Event::Tokens(_) => None,
        })
        .collect();
    assert_eq!(prompts, ["The "]);
}

#[test]
fn a_text_without_the_echoed_prompt_is_an_upstream_error() {
    let error = echoing(1).read(&sent(&delta(0, "cat", None).to_string()));
    assert_eq!(error.expect_err("no prompt").kind, ErrorKind::UpstreamError);
}

#[test]
fn a_text_that_is_no_string_is_a_broken_stream_and_no_token() {
    for choice in [
        json!({"index": 0, "text": 5}),
        json!({"index": 0, "delta": {"content": [{"type": "text", "text": "a"}]}}),
    ] {
        let mut progress = progress(1);
        let chunks = [delta(0, "a", None), json!({"choices": [choice]})];
        assert!(read_all(&mut progress, &chunks).is_err());
        assert_eq!(batches(&progress).len(), 1);
        assert_eq!(batches(&progress)[0].2, ["a"]);
    }
}

#[test]
fn events_that_can_have_no_text_are_skipped() {
    let mut progress = progress(1);
    let chunks = [
        json!(null),
        json!("ping"),
        delta(0, "a", Some("stop")),
        json!({"choices": [], "usage": {"completion_tokens": 1.5}}),
    ];
    read_all(&mut progress, &chunks).expect("no text is lost");
    assert!(progress.all_choices_ended());
    assert!(progress.read(&sent("{nul}")).is_err());
}

#[test]
fn white_space_before_an_event_does_not_hide_its_text() {
    let mut progress = progress(1);
    let event = format!(" \n{}", delta(0, "a", None));
    progress.read(&sent(&event)).expect("it is valid");
    assert_eq!(batches(&progress)[0].2, ["a"]);
    let list = format!("[{}]", delta(0, "b", None));
    assert!(progress.read(&sent(&list)).is_err());
}
